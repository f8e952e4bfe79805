"""Figures of results: time against the roofline, ratios to each peer, WER against bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.report.markdown import geometric
from saml_kernels.files import write_figure
from saml_models.evaluation.figures import new_figure

__all__ = ["plot_layers", "plot_wer"]

SUBJECT = "saml + experts"


def plot_layers(data: dict[str, Any], path: Path) -> bool:
    """A PNG of two panels: measured time over its floor, and our time over each contender's.

    Returns:
        False, and no PNG, where no layers were timed.

    Raises:
        SAMLError: matplotlib is not installed, or the file cannot be written.
    """
    rows = [r for entry in data["works"].values() for r in entry["rows"] if "m" in r]
    if not rows:
        return False
    figure = new_figure(13.0, 5.5)
    left, right = figure.subplots(1, 2)
    names = dict.fromkeys(r["contender"] for r in rows)
    colours = {name: f"C{i % 10}" for i, name in enumerate(names)}
    for name in names:
        mine = [r for r in rows if r["contender"] == name]
        ours = name.startswith("saml")
        left.scatter(
            [r["floor_us"] for r in mine], [r["median_us"] for r in mine], label=name,
            color=colours[name],
            marker="o" if ours else "x", s=26 if ours else 20, alpha=0.8,
        )  # fmt: skip
    ends = [min(r["floor_us"] for r in rows), max(r["floor_us"] for r in rows)]
    left.plot(ends, ends, color="black", linewidth=1, label="roofline")
    left.set(xscale="log", yscale="log", xlabel="floor of the shape (us)", ylabel="measured (us)")
    left.legend(frameon=False, fontsize=7)
    _bars(right, data, colours)
    about = data["about"]
    figure.suptitle(f"{about['device']}, {about['date']}")
    write_figure(path, figure)
    return True


def _bars(axes: Any, data: dict[str, Any], colours: dict[str, str]) -> None:
    """Our time with experts over each peer's, by work and mode: below 1 we are faster."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for work, entry in data["works"].items():
        for row in entry["rows"]:
            if row["contender"] == SUBJECT and "m" in row:
                groups.setdefault(f"{work}\n{row['mode']}", []).append(row)
    heights: dict[str, dict[str, float]] = {}
    for group, rows in groups.items():
        for other in dict.fromkeys(name for r in rows for name in r["ratios"]):
            if other.startswith("saml"):
                continue
            ratios = [r["ratios"][other] for r in rows if other in r["ratios"]]
            heights.setdefault(other, {})[group] = geometric(ratios)
    names = [g for g in groups if any(g in h for h in heights.values())]
    width = 0.8 / max(1, len(heights))
    for i, (other, found) in enumerate(heights.items()):
        places = [j + i * width for j, name in enumerate(names) if name in found]
        axes.bar(
            places,
            [found[name] for name in names if name in found],
            width,
            label=other,
            color=colours.get(other),
        )
    axes.axhline(1.0, color="black", linewidth=1)
    axes.set_xticks([j + 0.4 for j in range(len(names))], names, fontsize=7)
    axes.set(yscale="log", ylabel=f"time of {SUBJECT} / time of the other")
    _plain_numbers(axes.yaxis)
    if heights:
        axes.legend(frameon=False, fontsize=7)


def plot_wer(results: Sequence[tuple[str, dict[str, Any]]], path: Path) -> None:
    """A PNG of WER against bytes on disk; `results` are (name, a `saml evaluate --json`).

    Raises:
        SAMLError: matplotlib is not installed, or the file cannot be written.
    """
    figure = new_figure(8.5, 4.5)
    from matplotlib import colormaps

    axes = figure.subplots()
    marks = {"full_precision": "s", "quantised": "v", "experts": "o", "adapted": "*"}
    for i, (name, result) in enumerate(results):
        size, colour = result["size"], colormaps["tab20"](i % 20)
        held = {"full_precision": size["full_bytes"], "quantised": size["quantised_bytes"]}
        points = [(held.get(s, size["saml_bytes"]) / 1e6, result["wer"][s], s) for s in marks]
        axes.plot([p[0] for p in points], [p[1] for p in points], color=colour, alpha=0.4)
        for x, y, system in points:
            axes.scatter([x], [y], marker=marks[system], color=colour, s=50)
        axes.plot([], [], color=colour, label=name)
    for system, mark in marks.items():
        axes.scatter([], [], marker=mark, color="grey", label=system.replace("_", " "))
    axes.set(xscale="log", yscale="log", xlabel="MB on disk", ylabel="word error rate (%)")
    for axis in (axes.xaxis, axes.yaxis):
        _plain_numbers(axis)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    write_figure(path, figure)


def plot_curves(results: Mapping[str, dict[str, Any]], path: Path) -> None:
    """A PNG of what adaptation leaves of the errors, by utterances learnt from.

    Args:
        results: by voices, what `saml evaluate --curve --json` wrote.
        path: of the PNG.

    Raises:
        SAMLError: matplotlib is not installed, or the file cannot be written.
    """
    figure = new_figure(7.0, 4.0)
    axes = figure.subplots()
    counts = sorted({point["utterances"] for one in results.values() for point in one["curve"]})
    for i, (name, one) in enumerate(results.items()):
        points = one["curve"]
        at = [counts.index(point["utterances"]) for point in points]
        ratios = [point["wer"] / point["unadapted"] for point in points]
        axes.plot(at, ratios, "o-", color=f"C{i}", label=f"{name} ({points[0]['speakers']})")
        known = [(k, p["ratio_interval_95"]) for k, p in zip(at, points, strict=True)]
        spans = [(k, *ends) for k, ends in known if ends]
        if spans and points[0]["speakers"] != 2:  # of two speakers an interval knows no end
            axes.fill_between(*zip(*spans, strict=True), color=f"C{i}", alpha=0.15, linewidth=0)
    lines = [y for line in axes.get_lines() for y in line.get_ydata()]
    axes.set_ylim(min(lines) - 0.2, max(lines) + 0.2)  # some intervals reach far
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(counts)), [str(count) for count in counts])
    axes.set(xlabel="utterances learnt from", ylabel="errors, to those unadapted")
    axes.legend(frameon=False, fontsize=8, title="voices (speakers)")
    write_figure(path, figure)


def _plain_numbers(axis: Any) -> None:
    """On a logarithmic axis: no powers of ten, and only as many numbers as fit side by side."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "235" else "")
