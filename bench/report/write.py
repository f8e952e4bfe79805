"""Figures and tables from the files of results, for README and docs.

    python -m bench report [--results bench/results] [PAGE ...]

<device>-<date>.json (of `python -m bench`, `pytest bench`) become PNGs, wer-*.json (`saml evaluate
--json`) one of WER against bytes. A page gets a table wherever it has a pair of lines
`<!-- results: NAME -->` and `<!-- results: end -->`; without PAGE, README.md and docs/ do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from bench.place import REPOSITORY, RESULTS
from bench.report.figures import plot_layers, plot_wer
from bench.report.tables import has_tables, load, timed_files, write_tables


def pages() -> list[Path]:
    """The pages of this repository that have tables of results."""
    candidates = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
    return [page for page in candidates if has_tables(page)]


def main(
    page: Annotated[list[Path] | None, typer.Argument(help="Default: README.md, docs/.")] = None,
    results: Annotated[Path, typer.Option(help="Folder of JSON files.")] = RESULTS,
) -> None:
    timed = timed_files(results)
    for path, data in zip(timed, load(timed), strict=True):
        if plot_layers(data, path.with_suffix(".png")):
            print(f"figure: {path.with_suffix('.png')}")
    scored = sorted(results.glob("wer-*.json"))
    if scored:
        figure = results / "wer-bytes.png"
        read = [(f.stem.removeprefix("wer-"), json.loads(f.read_text())) for f in scored]
        plot_wer(read, figure)
        print(f"figure: {figure}")
    for path in page or pages():
        print(f"{path}: {'rewritten' if write_tables(path, results) else 'unchanged'}")
