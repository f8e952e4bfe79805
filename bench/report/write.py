"""Figures from the files of results, and the README's table from the same, never by hand.

    python bench/report.py [--results bench/results] [--readme README.md]

<device>-<date>.json (of `saml bench`, `pytest bench`, the rest) become PNGs,
wer-*.json (`saml evaluate --json`) one of WER against bytes. The README gets the newest file of
each device.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from bench.report.figures import plot_layers, plot_wer
from bench.report.tables import load, markdown, write_readme

HERE = Path(__file__).resolve().parent


def main(
    results: Annotated[Path, typer.Option(help="Folder of JSON files.")] = HERE / "results",
    readme: Annotated[Path, typer.Option()] = HERE.parent / "README.md",
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


if __name__ == "__main__":
    typer.run(main)
