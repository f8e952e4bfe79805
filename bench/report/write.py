"""Figures and tables from the files of results, for README and docs.

    python -m bench report [--results bench/results] [--add wer-NAME.json] [PAGE ...]

<device>-<date>.json (of `python -m bench`, `pytest bench`) become PNGs, wer-*.json (`saml evaluate
--json`) one of WER against bytes, curve-*.json (with `--curve`) one for the documentation. A page
gets a table wherever it has a pair of lines `<!-- results: NAME -->` and `<!-- results: end -->`;
without PAGE, README.md and docs/ do.

With --add a file of `saml evaluate --json`, wer-NAME.json or with `--curve` curve-NAME.json, from
this machine and commit, joins the results under its own name: without what was said, which belongs
to the corpus, and with what it was measured on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.place import REPOSITORY, RESULTS
from bench.report import accuracy
from bench.report.environment import about
from bench.report.figures import plot_curves, plot_layers, plot_wer
from bench.report.tables import has_tables, write_tables
from bench.report.timed import load, timed_files
from saml_kernels.errors import SAMLError
from saml_kernels.files import read_json, write_json

IMAGES = REPOSITORY / "docs" / "images"


def pages() -> list[Path]:
    """The pages of this repository that have tables of results."""
    candidates = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
    return [page for page in candidates if has_tables(page)]


def add(path: Path, results: Path) -> Path:
    """Copy a file of `saml evaluate --json` to the results, without its utterances' text.

    Raises:
        SAMLError: it is none, or its name is not wer-*.json or curve-*.json.
    """
    data = read_json(path)
    expected = {"wer": {"wer", "detail", "utterances"}, "curve": {"curve", "speakers"}}
    kind, found, _ = path.name.partition("-")
    if not found or kind not in expected or not expected[kind] <= set(data):
        raise SAMLError(
            f"{path}: expected wer-NAME.json or curve-NAME.json of `saml evaluate --json`"
        )
    kept = {key: value for key, value in data.items() if key != "utterances"}
    measured = about(torch.device("cpu"))
    chosen = {key: measured[key] for key in ("device", "versions", "date", "commit")}
    write_json(results / path.name, chosen | kept)
    return results / path.name


def main(
    page: Annotated[list[Path] | None, typer.Argument(help="Default: README.md, docs/.")] = None,
    results: Annotated[Path, typer.Option(help="Folder of JSON files.")] = RESULTS,
    more: Annotated[
        list[Path] | None, typer.Option("--add", help="Of `saml evaluate --json`: wer-NAME.json.")
    ] = None,
    images: Annotated[Path, typer.Option(help="Folder of the documentation's figures.")] = IMAGES,
) -> None:
    for path in more or []:
        print(f"results: {add(path, results)}")
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
    if learnt := accuracy.read_curves(results):
        plot_curves(learnt, images / "curves.png")
        print(f"figure: {images / 'curves.png'}")
    for path in page or pages():
        print(f"{path}: {'rewritten' if write_tables(path, results) else 'unchanged'}")
