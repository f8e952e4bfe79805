"""Tables of what `saml bench` and its like have timed: on a terminal, and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.report.markdown import markdown_table, spread
from saml_kernels.errors import SAMLError

__all__ = ["BARS", "Row", "load", "markdown", "subjects", "tables", "timed_files"]

BARS = {
    "dense": "dense", "bitsandbytes": "bitsandbytes", "bitsandbytes + gated PEFT": "+ gated PEFT",
    "saml, 1 speaker": "1 speaker",
}  # fmt: skip
COMPOSED = "bitsandbytes + gated PEFT"
Row = dict[str, Any]


def load(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Files of results, in order.

    Raises:
        SAMLError: a file is not one.
    """
    found = []
    for path in paths:
        try:
            data = json.loads(path.read_text())
            assert data["about"]["device"] and data["works"] is not None
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
            raise SAMLError(
                f"{path}: not a file of benchmark results; `python -m bench --json` writes one"
            ) from error
        found.append(data)
    return found


def subjects(data: dict[str, Any]) -> Iterator[tuple[str, str, list[Row]]]:
    """(work, what, rows) of this package's layers with experts; rows differ in width alone."""
    for work, entry in data["works"].items():
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in entry["rows"]:
            ours = row["contender"].startswith("saml")
            if "m" in row and ours and (row["contender"] != "saml base" or row["experts"] == 0):
                key = (row["mode"], row["m"], row["experts"], row["rank"], row["contender"])
                groups.setdefault(key, []).append(row)
        for (mode, m, experts, rank, name), rows in groups.items():
            who = f"{experts} experts of rank {rank}" if experts else "no experts"
            if name.startswith("saml, "):
                who = name.removeprefix("saml, ")
            yield work, f"{mode}, {m} token{'s' * (m > 1)}, {who}", rows


def _cells(rows: list[Row], everyone: list[Row]) -> list[str]:
    """Share of the roofline, times over each bar's, peak memory over the user's composition's."""
    cells = [spread([r["of_roofline"] for r in rows])]
    for bar in BARS:
        cells.append(spread([r["ratios"][bar] for r in rows if bar in r["ratios"]]))
    peaks = {_shape(r): r["peak_bytes"] for r in everyone if r["contender"] == COMPOSED}
    cells.append(spread([r["peak_bytes"] / p for r in rows if (p := peaks.get(_shape(r)))]))
    return cells


def _shape(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("mode", "m", "n", "k", "experts", "rank"))


def tables(data: dict[str, Any]) -> Iterator[Table]:
    """For a terminal: every contender of every case, then whole models."""
    about = data["about"]
    for work, entry in data["works"].items():
        title, rows = entry["title"], entry["rows"]
        layers = [r for r in rows if "m" in r]
        if layers:
            table = Table(title=f"{work}: {title}; {about['device']}")
            for column in ("in -> out", "tokens", "mode", "E x r", "", "us", "quartiles",
                           "floor us", "of it", "/ dense", "peak MB"):  # fmt: skip
                table.add_column(column, justify="left" if column == "" else "right")
            shown = None
            for r in layers:
                shape = (r["k"], r["n"], r["m"], r["mode"], r["experts"], r["rank"])
                if shown not in (None, shape):
                    table.add_section()
                head = ["", "", "", ""] if shape == shown else [
                    f"{r['k']} -> {r['n']}", str(r["m"]), r["mode"], f"{r['experts']} x {r['rank']}"
                ]  # fmt: skip
                shown = shape
                ratio = r["ratios"].get("dense")
                table.add_row(
                    *head, r["contender"], f"{r['median_us']:,.1f}",
                    f"{r['low_us']:,.1f}-{r['high_us']:,.1f}", f"{r['floor_us']:,.1f}",
                    f"{r['of_roofline']:.0%}", "" if ratio is None else f"{ratio:.2f}",
                    f"{r['peak_bytes'] / 1e6:.1f}",
                )  # fmt: skip
            yield table
        models = [r for r in rows if "m" not in r]
        if models:
            yield _models_table(work, entry["title"], models)
        for name, reason in entry["skipped"].items():
            note = Table.grid()
            note.add_row(f"{work} {name}: not run: {reason}")
            yield note


MODEL_COLUMNS = (
    ("seconds", "seconds"), ("quartiles", "quartiles"), ("real_time_factor", "real-time factor"),
    ("peak_megabytes", "peak MB"), ("wer", "WER %"),
)  # fmt: skip


def _models_table(work: str, title: str, rows: list[Row]) -> Table:
    table = Table(title=f"{work}: {title}")
    table.add_column("")
    columns = [(key, head) for key, head in MODEL_COLUMNS if any(key in r for r in rows)]
    for _, head in columns:
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(row["contender"], *(_show(row.get(key)) for key, _ in columns))
    return table


def _show(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(_show(v) for v in value)
    return "-" if value is None else f"{value:,.4g}"


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """Markdown of the newest results of each device: layers, then whole models."""
    by_date = sorted(results, key=lambda d: str(d["about"]["date"]))
    newest = {data["about"]["device"]: data for data in by_date}
    lines: list[str] = []
    for device, data in newest.items():
        about = data["about"]
        lines += [f"**{device}**, {about['date']}, torch {about['versions']['torch']}:", ""]
        heads = ["layers with experts", "of the roofline", *(f"/ {b}" for b in BARS.values())]
        heads.append("memory / + gated PEFT")
        table = [
            [f"{data['works'][work]['title']}, {what}", *_cells(rows, data["works"][work]["rows"])]
            for work, what, rows in subjects(data)
        ]
        lines += markdown_table(heads, table)
        for work, entry in data["works"].items():
            rows = [r for r in entry["rows"] if "m" not in r]
            if rows:
                columns = [c for c in MODEL_COLUMNS if any(c[0] in r for r in rows)]
                heads = [f"{work}: {entry['title']}", *(head for _, head in columns)]
                lines += markdown_table(
                    heads, [[r["contender"], *(_show(r.get(k)) for k, _ in columns)] for r in rows]
                )
        missing: dict[str, str] = {}
        for entry in data["works"].values():
            missing |= entry["skipped"]
        if missing:
            told = "; ".join(f"{name} ({reason})" for name, reason in missing.items())
            lines += [f"Not run: {told}.", ""]
    if not any(d["about"]["type"] == "cuda" for d in newest.values()):
        lines += ["GPU rows: not run; `python -m bench gpu` writes them.", ""]
    return "\n".join(lines)


def timed_files(results: Path) -> list[Path]:
    """The files of a folder of results that hold times (those of `saml bench` and its like)."""
    return [f for f in sorted(results.glob("*.json")) if "works" in json.loads(f.read_text())]
