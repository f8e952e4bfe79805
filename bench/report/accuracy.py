"""Tables of accuracy as Markdown: word errors, profiles, sizes and rounding."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.accuracy import conformer as grown
from bench.accuracy import defaults_rows, rounding_rows
from bench.accuracy import experts as alone
from bench.accuracy.over_speakers import ratio
from bench.accuracy.profiles import KINDS
from bench.report.markdown import markdown_table, read

__all__ = [
    "SPEECH",
    "conformer",
    "curves",
    "experts",
    "profiles",
    "read_curves",
    "rounding",
    "shapes",
    "sizes",
    "variants",
    "wer",
]

# The sets of speech that wer-*.json is about: who speaks, and the protocol.
SPEECH = {
    "train-clean-5": ("readers", "20 utterances to adapt"),
    "test-other": ("readers", "two-fold, 5 utterances to adapt"),
    "speechocean762": ("learners of English", "two-fold, 10 utterances to adapt"),
    "readers": ("of LibriSpeech", "60 utterances to adapt"),
    "england": ("man from England", "60 utterances to adapt"),
    "noisy": ("voice in noise", "60 utterances to adapt"),
}
CHOICE = "choosing"  # the forty speakers on whom defaults are chosen
SYSTEMS = {
    "full_precision": "full precision", "quantised": "quantised", "experts": "+ experts",
    "adapted": "+ adaptation", "other_speaker": "another's profile",
}  # fmt: skip


def wer(prefix: str, sets: Sequence[str], results: Path) -> str:
    """WER of every system on each set of speech, from wer-*.json of `saml evaluate`."""
    found = {name: read(results / f"{prefix}-{name}.json") for name in sets}
    ratios = ("adapted / full (95 %)", "adapted / experts (95 %)")
    heads = ["speech", *SYSTEMS.values(), *ratios, "words counted as in the paper: full, adapted"]
    rows = []
    for name, data in found.items():
        who, how = SPEECH[name]
        rates = [data["wer"][system] for system in SYSTEMS]
        cells = ["" if rate is None else f"{rate:.2f}" for rate in rates]
        over = "" if len(data["speakers"]) > 1 else ", clips"
        for key in ("adapted_to_full_precision", "adapted_to_experts"):
            one = data["ratios"][key]
            low, high = one["interval_95"]
            cells.append(f"{one['ratio']:.2f} ({low:.2f} to {high:.2f}{over})")
        own = data["wer_by_scoring"]["paper"]
        cells.append(f"{own['full_precision']:.2f}, {own['adapted']:.2f}")
        rows.append([f"{name}, {len(data['speakers'])} {who}, {how}", *cells])
    lines = markdown_table(heads, rows)
    model, size = data["model"], data["size"]
    lines.append(
        f"{_called(model)}: {size['full_bytes'] / 1e6:.1f} MB in float32, "
        f"{size['quantised_bytes'] / 1e6:.1f} MB quantised, {size['saml_bytes'] / 1e6:.1f} MB with "
        f"experts ({size['ratio']:.2f}x smaller). {_measured(found)}"
    )
    return "\n".join(lines)


def _called(model: str) -> str:
    """Whisper's names alone say little."""
    return model if model.startswith("conformer") else f"Whisper {model}"


def _measured(found: dict[str, dict[str, Any]]) -> str:
    """On what; by set of speech where the sets were measured apart."""
    on: dict[str, list[str]] = {}
    for name, data in found.items():
        told = f"{data['device']}; torch {data['versions']['torch']}; {data['date']}"
        on.setdefault(told, []).append(name)
    if len(on) == 1:
        return f"Measured on: {next(iter(on))}."
    return " ".join(f"{', '.join(names)}: measured on {told}." for told, names in on.items())


def sizes(results: Path) -> str:
    """Megabytes of a model on disk, by how much of it is there."""
    found = [read(results / f"{file}-test-other.json") for file in ("wer", "wer-base")]
    keys = ("full_bytes", "quantised_bytes", "saml_bytes")
    rows = [[_called(d["model"]), *(f"{d['size'][k] / 1e6:.1f} MB" for k in keys)] for d in found]
    return "\n".join(markdown_table(["model", "float32", "quantised", "with experts"], rows))


def profiles(results: Path) -> str:
    """WER and bytes by kind of profile, and what many speakers in a batch cost."""
    data = read(results / "voices-tiny.en.json")
    rows = []
    for kind, label in KINDS.items():
        own = [speaker[kind] for speaker in data["speakers"].values()]
        size = statistics.mean(row["bytes"] for row in own)
        seconds = statistics.median(row["seconds"] for row in own)
        took = f"{seconds:.0f}" if kind in ("gates", "adapted", "unsupervised") else "-"
        rows.append([label, f"{data['wer'][kind]:.2f}", f"{size:,.0f}", took])
    lines = markdown_table(["profile", "WER %", "bytes", "seconds to adapt (median)"], rows)
    speed = data["throughput"]
    lines.append(
        f"Sixteen clips of sixteen speakers in one batch: "
        f"{speed['throughput_of_sixteen_to_one']:.2f} of the throughput of sixteen clips of one "
        f"speaker ({speed['device']}). Loading a profile: "
        f"{speed['milliseconds_to_load_a_profile']:.0f} ms."
    )
    return "\n".join(lines)


def rounding(results: Path) -> str:
    """WER and KL of full precision, plain and calibrated rounding, from rounding-*.json."""
    found = [read(path) for path in results.glob("rounding-*.json")]

    def rank(data: dict[str, Any]) -> tuple[int, str]:
        """The most clips first."""
        clips = sum(len(one["speakers"]) for one in data["speech"].values())
        return -clips, data["about"]["model"]

    parts = []
    for data in sorted(found, key=rank):
        about = data["about"]
        clips = ", ".join(f"{len(one['speakers'])} of {k}" for k, one in data["speech"].items())
        first, last = rounding_rows.HEADS
        lines = markdown_table([first, *data["speech"], last], rounding_rows.rows(data))
        lines.append(f"{_called(about['model'])}; clips: {clips}. {_on(about)}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def conformer(results: Path) -> str:
    """WER of the Conformer that ships, of it without its branches, and of its Whisper."""
    data = read(results / "conformer-tiny.en.json")
    return _unadapted(data, grown.HEADS, grown.rows(data), "Full precision, greedy")


def experts(model: str, results: Path) -> str:
    """WER of a model at full precision, quantised, and with experts alone."""
    data = read(results / f"experts-{model}.json")
    return _unadapted(data, alone.HEADS, alone.rows(data), "Greedy")


def shapes(results: Path) -> str:
    """WER of experts alone in other places and numbers; forty speakers say how they differ."""
    data = read(results / "experts-tiny.en-shapes.json")
    speech, systems = data["speech"], data["systems"]
    people, first = speech[CHOICE]["speakers"], next(iter(systems.values()))[CHOICE]
    rows = []
    for name, errors in systems.items():
        rates = [100 * sum(errors[k]) / sum(one["words"]) for k, one in speech.items()]
        apart = "" if errors[CHOICE] is first else ratio(people, errors[CHOICE], first)
        rows.append([name, *(f"{rate:.2f}" for rate in rates), apart])
    lines = markdown_table(["experts", *speech, f"{CHOICE}, to the first"], rows)
    lines.append(f"{_called(data['about']['model'])}, WER %, greedy. {_on(data['about'])}")
    return "\n".join(lines)


def variants(name: str, results: Path) -> str:
    """Recipes of both stages compared, from defaults-NAME.json of `bench defaults`."""
    data = read(results / f"defaults-{name}.json")
    lines = markdown_table(defaults_rows.HEADS, defaults_rows.rows(data))
    lines.append(f"{_called(data['about']['model'])}, greedy. {_on(data['about'])}")
    return "\n".join(lines)


def read_curves(results: Path) -> dict[str, dict[str, Any]]:
    """By voices, curve-*.json of `saml evaluate --curve`; the most speakers first."""
    found = {
        path.stem.removeprefix("curve-"): read(path)
        for path in sorted(results.glob("curve-*.json"))
    }
    return dict(sorted(found.items(), key=lambda one: -len(one[1]["speakers"])))


def curves(results: Path) -> str:
    """WER by how many utterances were learnt from, and its ratio to that of the same unadapted."""
    found = read_curves(results)
    counts = sorted({p["utterances"] for one in found.values() for p in one["curve"]} - {0})
    rows = []
    for name, one in found.items():
        points = {point["utterances"]: point for point in one["curve"]}
        people = len(one["speakers"])
        cells = [f"{name}, {people} speaker{'s' * (people > 1)}", f"{points[0]['wer']:.2f}"]
        rows.append([*cells, *(_learnt(points.get(count)) for count in counts)])
    lines = markdown_table(["voices", "unadapted", *map(str, counts)], rows)
    model = next(iter(found.values()))["model"]
    lines.append(f"{_called(model)}, greedy, with the guard. {_measured(found)}")
    return "\n".join(lines)


def _learnt(point: dict[str, Any] | None) -> str:
    if point is None:
        return ""
    ratio = point["wer"] / point["unadapted"]
    ends = point["ratio_interval_95"]
    spread = f", {ends[0]:.2f} to {ends[1]:.2f}" if ends else ""
    unused = f"; {point['unused']} unused" if point["unused"] else ""
    return f"{point['wer']:.2f} ({ratio:.2f}{spread}{unused})"


def _on(about: dict[str, Any]) -> str:
    return f"Measured on: {about['device']}; torch {about['versions']['torch']}; {about['date']}."


def _unadapted(data: dict[str, Any], heads: Sequence[str], rows: list[list[str]], how: str) -> str:
    """A table of systems that heard every utterance of some sets, without empty columns."""
    clips = ", ".join(f"{len(one['words'])} of {key}" for key, one in data["speech"].items())
    said = [n for n in range(len(heads)) if any(row[n] for row in rows)]
    lines = markdown_table([heads[n] for n in said], [[row[n] for n in said] for row in rows])
    lines.append(f"{how}; clips: {clips}. {_on(data['about'])}")
    return "\n".join(lines)
