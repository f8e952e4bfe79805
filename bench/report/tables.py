"""Tables of results in the README and docs/, between markers.

A page asks for a table with a pair of comments, `<!-- results: NAME -->` and
`<!-- results: end -->`; `write_tables` fills what lies between them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from bench.layers import predicted
from bench.layers.host import launches
from bench.report import accuracy, timed
from bench.report.markdown import markdown_table, read, spread
from saml_kernels.errors import SAMLError
from saml_kernels.files import atomic_path

__all__ = ["TABLES", "has_tables", "write_tables"]

END = "<!-- results: end -->"
CONFORMER = ("train-clean-5", "test-other", "speechocean762")  # what conformer-tiny.en heard
_BLOCK = re.compile(rf"(<!-- results: (?!end -->)(\S+) -->\n)(.*?)({END})", re.DOTALL)
_OPENING = re.compile(r"<!-- results: (?!end -->)")


def _cpu_operator(file: str, results: Path) -> str:
    """Time of the operator with experts over float32 `F.linear` without, by shape and cache."""
    data = read(results / file)
    found = {(r["in"], r["out"], r["rows"], r["warm"]): r for r in data["rows"]}
    shapes = list(dict.fromkeys((r["in"], r["out"]) for r in data["rows"]))
    rows = []
    for count, warm in sorted({key[2:] for key in found}, key=lambda key: (key[0], not key[1])):
        own = [found.get((*shape, count, warm)) for shape in shapes]
        over = [r["experts_over_bitsandbytes"] for r in own if r]
        cells = [f"{r['experts']:.2f}" if r else "-" for r in own]
        peer = f"{min(over):.2f} to {max(over):.2f}"
        rows.append([str(count), "warm" if warm else "cold", *cells, peer])
    heads = ["rows", "caches", *(f"{k} -> {n}" for k, n in shapes), "/ bitsandbytes"]
    return "\n".join([*markdown_table(heads, rows), f"{data['about']}."])


def _cpu_speakers(results: Path) -> str:
    """Time of a batch of many speakers over the same rows of one, by number and cache."""
    data = read(results / "cpu-speakers.json")
    kinds = ("int8", "float32", "int8_over_one")
    rows = []
    for count, warm in dict.fromkeys((r["speakers"], r["warm"]) for r in data["rows"]):
        own = [r for r in data["rows"] if (r["speakers"], r["warm"]) == (count, warm)]
        cells = [spread([r[kind] for r in own]) for kind in kinds]
        rows.append([str(count), "warm" if warm else "cold", *cells])
    heads = ["speakers", "caches", "in int8", "in float32", "in int8, over one speaker in int8"]
    return "\n".join([*markdown_table(heads, rows), f"{data['about']}."])


def _serve(results: Path) -> str:
    """What the server was measured to do, from serve.json of `python -m bench serve`."""
    data = read(results / "serve.json")
    many, more, long = data["speakers"], data["more"], data["long"]
    memory, start = data["memory"], data["start"]
    told = (("200", "answered"), ("400", "refused"), ("left", "given up by the client"))
    answers = ", ".join(f"{memory['answers'].get(said, 0)} {name}" for said, name in told)
    rows = [
        (
            f"{many['speakers']} clips of {many['speakers']} speakers at once, of the speed one "
            "after the other",
            f"{many['faster']:.2f}, mean batch {many['batch']:.0f}, {many['texts as alone']} texts "
            "as `saml transcribe` alone gives them",
            many,
        ),
        (
            f"{many['speakers']} speakers in a batch, of the time of one speaker",
            f"{many['over one speaker']:.2f}",
            many,
        ),
        (
            f"{more['speakers']} speakers at once, of the time of one speaker",
            f"{more['over one speaker']:.2f}",
            more,
        ),
        (
            f"a clip of 3 s beside a recording of {long['minutes']:.0f} minutes",
            f"{long['median']:.2f} s, at worst {long['worst']:.2f} s; alone "
            f"{long['seconds alone']:.2f} s, a window {long['seconds of a window']:.2f} s",
            long,
        ),
        (
            f"memory over {memory['requests']} mixed requests, eight at a time",
            f"{memory['growth, %']:+.1f} % after the first 100, with which it is "
            f"{memory['MB after the first 100']:.0f} MB, the benchmark's own among them: "
            f"{answers}",
            memory,
        ),
        (
            "start of the process to the first answer",
            f"{start['seconds until it answers']:.1f} s (slowest of {start['starts']}: "
            f"{start['slowest start']:.1f} s)",
            start,
        ),
        (
            "packages that `[serve]` adds to `[whisper]`",
            f"{start['MB of packages']:.0f} MB, {start['packages']['av']:.0f} of them PyAV",
            start,
        ),
    ]
    table = markdown_table(
        ["measured", "result", "others' load"],
        [[name, value, f"{row['load']:.1f}"] for name, value, row in rows],
    )
    devices = sorted({f"{row['device']}; {row['date']}" for *_, row in rows})
    return "\n".join([*table, f"{many['model']}. Measured on: {' '.join(devices)}."])


def _host(results: Path) -> str:
    """Microseconds that Python takes for a call, launches replaced by nothing."""
    data = read(results / "host-amd-epyc.json")
    gating = {"layer": "`SAMLLinear`", "router": "`saml_linear_routed`", "gates": "`saml_linear`"}
    rows = [
        [
            row["path"], gating[row["gating"]], str(row["speakers"]),
            f"{row['forward_us']:.1f} ({row['forward_ratio']:.2f})",
            f"{row['both_us']:.1f} ({row['both_ratio']:.2f})",
        ]
        for row in data["host"] if not row["autocast"]
    ]  # fmt: skip
    heads = ["kernels", "call", "speakers", "forward, us", "forward and backward, us"]
    return "\n".join(markdown_table(heads, rows)).strip()


def _launches(results: Path) -> str:
    """What a routed call of one speaker launches on an H100; computed, not read from a file."""
    rows = [
        [str(m), *(", ".join(names) for names in launches(m, 512, 512, "sm_90", 132))]
        for m in (1, 32, 256, 1024, 4096)
    ]
    heads = ["rows", "forward", "forward that keeps P", "backward"]
    return "\n".join(markdown_table(heads, rows)).strip()


def _predicted(devices: tuple[predicted.Named, ...]) -> str:
    """The cost model's times for devices; computed, not read from a file."""
    return "\n".join(markdown_table(predicted.heads(), predicted.rows(devices))).strip()


TABLES: dict[str, Callable[[Path], str]] = {
    "wer": lambda results: accuracy.wer("wer", tuple(accuracy.SPEECH), results),
    "wer-base": lambda results: accuracy.wer("wer-base", ("test-other", "speechocean762"), results),
    "wer-conformer": lambda results: accuracy.wer("wer-conformer", CONFORMER, results),
    "curves": accuracy.curves,
    "defaults": lambda results: accuracy.variants("tiny.en", results),
    "defaults-voices": lambda results: accuracy.variants("tiny.en-voices", results),
    "defaults-shapes": lambda results: accuracy.variants("tiny.en-shapes", results),
    "defaults-conformer": lambda results: accuracy.variants("conformer-tiny.en", results),
    "conformer": accuracy.conformer,
    "experts": lambda results: accuracy.experts("tiny.en", results),
    "experts-shapes": accuracy.shapes,
    "experts-base": lambda results: accuracy.experts("base", results),
    "sizes": accuracy.sizes,
    "profiles": accuracy.profiles,
    "cpu-operator": lambda results: _cpu_operator("cpu-operator.json", results),
    "cpu-operator-avx2": lambda results: _cpu_operator("cpu-operator-avx2.json", results),
    "cpu-speakers": _cpu_speakers,
    "serve": _serve,
    "rounding": accuracy.rounding,
    "host": _host,
    "launches": _launches,
    "predicted": lambda results: _predicted(predicted.BOARDS),
    "predicted-servers": lambda results: _predicted(predicted.SERVERS),
    "benchmark": lambda results: timed.markdown(timed.load(timed.timed_files(results))),
}
"""Markdown of a table from a folder of results, by the name that a page's marker has."""


def has_tables(page: Path) -> bool:
    """Whether a page asks for a table."""
    return _OPENING.search(page.read_text()) is not None


def write_tables(page: Path, results: Path) -> bool:
    """Write the tables of `TABLES` between a page's markers; whether that changed the file.

    Raises:
        SAMLError: the page has no markers, one without its end or with a name that is not in
            `TABLES`; or a file of results that a table needs is missing or damaged.
    """
    old = page.read_text()

    def filled(match: re.Match[str]) -> str:
        opening, name, _, end = match.groups()
        if name not in TABLES:
            raise SAMLError(f"{page}: asks for a table {name}; there are {', '.join(TABLES)}")
        return f"{opening}{TABLES[name](results).strip()}\n{end}"

    new, found = _BLOCK.subn(filled, old)
    if found == 0 or found != len(_OPENING.findall(old)) or found != old.count(END):
        raise SAMLError(
            f"{page}: needs pairs of lines <!-- results: NAME --> and {END} where its tables go"
        )
    if new == old:
        return False
    with atomic_path(page) as temporary:
        temporary.write_text(new)
    return True
