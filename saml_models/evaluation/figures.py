"""Figures of an evaluation, drawn from its JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saml_kernels.errors import needs
from saml_kernels.files import write_figure

__all__ = ["new_figure", "plot_curve", "plot_pruning", "plot_speakers"]

_SHOWN = {
    "full_precision": ("full precision", "#4c566a"),
    "quantised": ("quantised", "#bf616a"),
    "experts": ("+ experts", "#d08770"),
    "adapted": ("+ adaptation", "#2e7d4f"),
}


def plot_speakers(result: dict[str, Any], path: str | Path) -> None:
    """A PNG of WER per speaker, by system; `result` is `Evaluation.to_dict()`.

    Raises:
        SAMLError: matplotlib is not installed, or the file cannot be written.
    """
    names = list(result["speakers"])
    figure = new_figure(max(6.0, 1.0 + 0.9 * len(names)), 4.0)
    axes = figure.subplots()
    width = 0.8 / len(_SHOWN)
    for i, (system, (label, colour)) in enumerate(_SHOWN.items()):
        places = [j + (i - (len(_SHOWN) - 1) / 2) * width for j in range(len(names))]
        heights = [result["speakers"][name][system] for name in names]
        axes.bar(places, heights, width, label=label, color=colour)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlabel("speaker")
    axes.set_ylabel("word error rate (%)")
    axes.spines[["top", "right"]].set_visible(False)
    pooled = result["wer"]
    axes.set_title(
        f"pooled: {pooled['full_precision']:.1f} % full precision, {pooled['quantised']:.1f} % "
        f"quantised, {pooled['adapted']:.1f} % adapted"
    )
    axes.legend(frameon=False, ncols=2)
    write_figure(path, figure)


def plot_curve(result: dict[str, Any], path: str | Path) -> None:
    """A PNG of WER against utterances learnt from; `result` is `Curve.to_dict()`.

    Raises:
        SAMLError: matplotlib is not installed, or the file cannot be written.
    """
    points = result["curve"]
    figure = new_figure(6.0, 4.0)
    axes = figure.subplots()
    places = list(range(len(points)))
    for own in result["speakers"].values():
        known = [
            (i, own[key]) for i, p in enumerate(points) if (key := str(p["utterances"])) in own
        ]
        axes.plot(*zip(*known, strict=True), color="#d8dee9", linewidth=0.8, zorder=1)
    axes.plot(places, [p["wer"] for p in points], "o-", color="#2e7d4f", label="adapted")
    axes.plot(
        places,
        [p["unadapted"] for p in points],
        "--",
        color="#d08770",
        label="+ experts, unadapted",
    )
    spans = [(i, *p["interval_95"]) for i, p in enumerate(points) if p["interval_95"]]
    if spans:
        at, low, high = zip(*spans, strict=True)
        axes.fill_between(at, low, high, color="#2e7d4f", alpha=0.15, linewidth=0)
    axes.set_xticks(places, [f"{p['utterances']}\n({p['speakers']})" for p in points])
    axes.set_xlabel("utterances learnt from (speakers)")
    axes.set_ylabel("word error rate (%)")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    write_figure(path, figure)


def plot_pruning(result: dict[str, Any], path: str | Path) -> None:
    """A PNG of a speaker's pruning: WER against experts kept, and the gates, layers x experts.

    Args:
        result: what `saml speakers prune --json` writes: `speaker`, `curve`, `layers`, `gates`.
        path: of the PNG.

    Raises:
        SAMLError: matplotlib is not installed, or the file cannot be written.
    """
    layers, curve = result["layers"], result["curve"]
    figure = new_figure(10.0, max(4.0, 0.13 * len(layers)))
    left, right = figure.subplots(1, 2)
    left.plot([p["experts"] for p in curve], [p["wer"] for p in curve], "o-", color="#2e7d4f")
    left.set_xlabel("experts kept, of all layers")
    left.set_ylabel("word error rate (%)")
    left.set_ylim(bottom=0)
    left.set_title(f"speaker {result['speaker']}")
    left.spines[["top", "right"]].set_visible(False)
    image = right.imshow(result["gates"], aspect="auto", cmap="viridis", vmin=0)
    right.set_xlabel("expert")
    right.set_yticks(range(len(layers)), layers, fontsize=4)
    right.set_title("mean gate")
    figure.colorbar(image, ax=right)
    write_figure(path, figure, dpi=150)


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of that many inches.

    Raises:
        SAMLError: matplotlib is not installed.
    """
    with needs("the figure", "figures"):
        from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")
