"""Tables of results: on a terminal, and in the README and docs/ between markers.

A page asks for a table with a pair of comments, `<!-- results: NAME -->` and
`<!-- results: end -->`; `write_tables` fills what lies between them.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.accuracy import rounding_rows
from bench.layers import predicted
from bench.layers.host import launches
from saml_kernels.errors import SAMLError
from saml_kernels.files import atomic_path

__all__ = [
    "TABLES",
    "geometric",
    "has_tables",
    "load",
    "markdown",
    "subjects",
    "tables",
    "timed_files",
    "write_tables",
]

END = "<!-- results: end -->"
_BLOCK = re.compile(rf"(<!-- results: (?!end -->)(\S+) -->\n)(.*?)({END})", re.DOTALL)
_OPENING = re.compile(r"<!-- results: (?!end -->)")
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


def geometric(values: Sequence[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


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


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{geometric(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _cells(rows: list[Row], everyone: list[Row]) -> list[str]:
    """Share of the roofline, times over each bar's, peak memory over the user's composition's."""
    cells = [_spread([r["of_roofline"] for r in rows])]
    for bar in BARS:
        cells.append(_spread([r["ratios"][bar] for r in rows if bar in r["ratios"]]))
    peaks = {_shape(r): r["peak_bytes"] for r in everyone if r["contender"] == COMPOSED}
    cells.append(_spread([r["peak_bytes"] / p for r in rows if (p := peaks.get(_shape(r)))]))
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
        lines += _markdown_table(heads, table)
        for work, entry in data["works"].items():
            rows = [r for r in entry["rows"] if "m" not in r]
            if rows:
                columns = [c for c in MODEL_COLUMNS if any(c[0] in r for r in rows)]
                heads = [f"{work}: {entry['title']}", *(head for _, head in columns)]
                lines += _markdown_table(
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


def _markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def timed_files(results: Path) -> list[Path]:
    """The files of a folder of results that hold times (those of `saml bench` and its like)."""
    return [f for f in sorted(results.glob("*.json")) if "works" in json.loads(f.read_text())]


# The sets of speech that wer-*.json is about: who speaks, and the protocol.
SPEECH = {
    "train-clean-5": ("readers", "20 utterances to adapt"),
    "test-other": ("readers", "two-fold, 5 utterances to adapt"),
    "speechocean762": ("learners of English", "two-fold, 10 utterances to adapt"),
}
SYSTEMS = {
    "full_precision": "full precision", "quantised": "quantised", "experts": "+ experts",
    "adapted": "+ adaptation", "other_speaker": "another's profile",
}  # fmt: skip


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SAMLError(f"{path}: cannot be read as results ({error})") from error


def _wer(prefix: str, sets: Sequence[str], results: Path) -> str:
    """WER of every system on each set of speech, from wer-*.json of `saml evaluate`."""
    found = {name: _read(results / f"{prefix}-{name}.json") for name in sets}
    rows, heads = [], ["speech", *SYSTEMS.values(), "adapted / full (95 %)"]
    over_speakers = all("ratios" in data for data in found.values())
    if over_speakers:
        heads += ["adapted / experts (95 %)", "by the paper's scoring: full, adapted"]
    for name, data in found.items():
        who, how = SPEECH[name]
        cells = [f"{data['wer'][system]:.2f}" for system in SYSTEMS]
        if over_speakers:
            for key in ("adapted_to_full_precision", "adapted_to_experts"):
                cells.append(_interval(data["ratios"][key]["ratio"], data["ratios"][key]))
            own = data["wer_by_scoring"]["paper"]
            cells.append(f"{own['full_precision']:.2f}, {own['adapted']:.2f}")
        else:
            one = data["relative"]
            cells.append(_interval(one["adapted_to_full_precision"], one))
        rows.append([f"{name}, {len(data['speakers'])} {who}, {how}", *cells])
    lines = _markdown_table(heads, rows)
    about, size = data, data["size"]
    lines.append(
        f"Whisper {about['model']}: {size['full_bytes'] / 1e6:.1f} MB in float32, "
        f"{size['quantised_bytes'] / 1e6:.1f} MB quantised, {size['saml_bytes'] / 1e6:.1f} MB with "
        f"experts ({size['ratio']:.2f}x smaller). {_measured(found)}"
    )
    return "\n".join(lines)


def _measured(found: dict[str, dict[str, Any]]) -> str:
    """On what; by set of speech where the sets were measured apart."""
    on: dict[str, list[str]] = {}
    for name, data in found.items():
        told = f"{data['device']}; torch {data['versions']['torch']}; {data['date']}"
        on.setdefault(told, []).append(name)
    if len(on) == 1:
        return f"Measured on: {next(iter(on))}."
    return " ".join(f"{', '.join(names)}: measured on {told}." for told, names in on.items())


def _interval(ratio: float, data: dict[str, Any]) -> str:
    low, high = data["interval_95"]
    return f"{ratio:.2f} ({low:.2f} to {high:.2f})"


def _sizes(results: Path) -> str:
    """Megabytes of a model on disk, by how much of it is there."""
    found = [_read(results / f"{file}-test-other.json") for file in ("wer", "wer-base")]
    keys = ("full_bytes", "quantised_bytes", "saml_bytes")
    rows = [
        [f"Whisper {d['model']}", *(f"{d['size'][k] / 1e6:.1f} MB" for k in keys)] for d in found
    ]
    return "\n".join(_markdown_table(["model", "float32", "quantised", "with experts"], rows))


PROFILES = {
    "experts": "pretrained experts",
    "gates": "gates alone",
    "adapted": "own experts",
    "unsupervised": "own experts, without transcripts (one round)",
    "pruned": "own experts, half of them",
}


def _profiles(results: Path) -> str:
    """WER and bytes by kind of profile, and what many speakers in a batch cost."""
    data = _read(results / "voices-tiny.en.json")
    rows = []
    for kind, label in PROFILES.items():
        own = [speaker[kind] for speaker in data["speakers"].values()]
        size = statistics.mean(row["bytes"] for row in own)
        seconds = statistics.median(row["seconds"] for row in own)
        took = f"{seconds:.0f}" if kind in ("gates", "adapted", "unsupervised") else "-"
        rows.append([label, f"{data['wer'][kind]:.2f}", f"{size:,.0f}", took])
    lines = _markdown_table(["profile", "WER %", "bytes", "seconds to adapt (median)"], rows)
    speed = data["throughput"]
    lines.append(
        f"Sixteen clips of sixteen speakers in one batch: "
        f"{speed['throughput_of_sixteen_to_one']:.2f} of the throughput of sixteen clips of one "
        f"speaker ({speed['device']}). Loading a profile: "
        f"{speed['milliseconds_to_load_a_profile']:.0f} ms."
    )
    return "\n".join(lines)


def _cpu_operator(file: str, results: Path) -> str:
    """Time of the operator with experts over float32 `F.linear` without, by shape and cache."""
    data = _read(results / file)
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
    return "\n".join([*_markdown_table(heads, rows), f"{data['about']}."])


def _cpu_speakers(results: Path) -> str:
    """Time of a batch of many speakers over the same rows of one, by number and cache."""
    data = _read(results / "cpu-speakers.json")
    kinds = ("int8", "float32", "int8_over_one")
    rows = []
    for count, warm in dict.fromkeys((r["speakers"], r["warm"]) for r in data["rows"]):
        own = [r for r in data["rows"] if (r["speakers"], r["warm"]) == (count, warm)]
        cells = [_spread([r[kind] for r in own]) for kind in kinds]
        rows.append([str(count), "warm" if warm else "cold", *cells])
    heads = ["speakers", "caches", "in int8", "in float32", "in int8, over one speaker in int8"]
    return "\n".join([*_markdown_table(heads, rows), f"{data['about']}."])


def _serve(results: Path) -> str:
    """What the server was measured to do, from serve.json of `python -m bench serve`."""
    data = _read(results / "serve.json")
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
    table = _markdown_table(
        ["measured", "result", "others' load"],
        [[name, value, f"{row['load']:.1f}"] for name, value, row in rows],
    )
    devices = sorted({f"{row['device']}; {row['date']}" for *_, row in rows})
    return "\n".join([*table, f"{many['model']}. Measured on: {' '.join(devices)}."])


def _rounding(results: Path) -> str:
    """WER and KL of full precision, plain and calibrated rounding, from rounding-*.json."""
    found = [_read(path) for path in sorted(results.glob("rounding-*.json"))]
    lines = []
    for data in found:
        about = data["about"]
        clips = ", ".join(f"{len(one['words'])} of {key}" for key, one in data["speech"].items())
        first, last = rounding_rows.HEADS
        lines += _markdown_table([first, *data["speech"], last], rounding_rows.rows(data))
        lines.append(
            f"Whisper {about['model']}; clips: {clips}. Measured on: {about['device']}; torch "
            f"{about['versions']['torch']}; {about['date']}."
        )
    return "\n".join(lines)


def _host(results: Path) -> str:
    """Microseconds that Python takes for a call, launches replaced by nothing."""
    data = _read(results / "host-amd-epyc.json")
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
    return "\n".join(_markdown_table(heads, rows)).strip()


def _launches(results: Path) -> str:
    """What a routed call of one speaker launches on an H100; computed, not read from a file."""
    rows = [
        [str(m), *(", ".join(names) for names in launches(m, 512, 512, "sm_90", 132))]
        for m in (1, 32, 256, 1024, 4096)
    ]
    heads = ["rows", "forward", "forward that keeps P", "backward"]
    return "\n".join(_markdown_table(heads, rows)).strip()


def _predicted(devices: tuple[predicted.Named, ...]) -> str:
    """The cost model's times for devices; computed, not read from a file."""
    return "\n".join(_markdown_table(predicted.heads(), predicted.rows(devices))).strip()


TABLES: dict[str, Callable[[Path], str]] = {
    "wer": lambda results: _wer("wer", tuple(SPEECH), results),
    "wer-base": lambda results: _wer("wer-base", ("test-other", "speechocean762"), results),
    "sizes": _sizes,
    "profiles": _profiles,
    "cpu-operator": lambda results: _cpu_operator("cpu-operator.json", results),
    "cpu-operator-avx2": lambda results: _cpu_operator("cpu-operator-avx2.json", results),
    "cpu-speakers": _cpu_speakers,
    "serve": _serve,
    "rounding": _rounding,
    "host": _host,
    "launches": _launches,
    "predicted": lambda results: _predicted(predicted.BOARDS),
    "predicted-servers": lambda results: _predicted(predicted.SERVERS),
    "benchmark": lambda results: markdown(load(timed_files(results))),
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
