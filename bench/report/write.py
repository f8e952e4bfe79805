"""Figures and the README's table from files of results.

    python -m bench report

Nothing is written by hand: <device>-<date>.json (of `python -m bench`, `pytest bench`) become PNGs,
wer-*.json (of `saml evaluate --json`) one of WER against bytes. The README gets the newest file of
each device.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from bench.place import REPOSITORY, RESULTS
from bench.report.figures import plot_layers, plot_wer
from bench.report.tables import load, markdown, write_readme


def main(
    results: Annotated[Path, typer.Option(help="Folder of JSON files.")] = RESULTS,
    readme: Annotated[Path, typer.Option()] = REPOSITORY / "README.md",
) -> None:
    files = sorted(results.glob("*.json"))
    timed = [f for f in files if "works" in json.loads(f.read_text())]
    for path, data in zip(timed, load(timed), strict=True):
        if plot_layers(data, path.with_suffix(".png")):
            print(f"figure: {path.with_suffix('.png')}")
    scored = [f for f in files if f.stem.startswith("wer-")]
    if scored:
        figure = results / "wer-bytes.png"
        read = [(f.stem.removeprefix("wer-"), json.loads(f.read_text())) for f in scored]
        plot_wer(read, figure)
        print(f"figure: {figure}")
    changed = write_readme(readme, markdown(load(timed)))
    print(f"{readme}: {'rewritten' if changed else 'unchanged'}")
