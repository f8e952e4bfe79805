"""The commands `saml evaluate` and `saml demo`: the protocol run and shown on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from saml_models.cli.options import (
    Device,
    Experts,
    Guarded,
    Overwrite,
    checkpoint_of,
    device_named,
)
from saml_models.cli.output import progress, resumable
from saml_models.runtime.quiet import quiet_libraries

__all__ = ["demo", "evaluate"]

# Test clips of the demo at most, so that it ends within minutes on two cores.
DEMO_ADAPT, DEMO_TEST = 20, 60


def evaluate(
    data: Annotated[Path, typer.Option(help="A corpus, a manifest or a folder of clips.")],
    model: Annotated[str, typer.Option(help="A name, an id or a folder.")] = "tiny.en",
    speakers: Annotated[str | None, typer.Option(help="Comma-separated; default all.")] = None,
    adapt_utterances: Annotated[
        int | None, typer.Option(help="Adapt on the first K utterances, test on the rest.")
    ] = None,
    folds: Annotated[int, typer.Option(help="Without --adapt-utterances: cross-validation.")] = 2,
    curve: Annotated[
        str | None,
        typer.Option(
            metavar="COUNTS",
            help="Instead: WER against utterances learnt from, such as 5,10,20,40,80.",
        ),
    ] = None,
    experts: Experts = None,
    guard: Guarded = True,
    beam_size: Annotated[
        int, typer.Option("--beam-size", "--beam_size", min=1, help="Of every system; 1 is greedy.")
    ] = 1,
    language: Annotated[
        str | None,
        typer.Option(help="Code or name; default: detected in each clip, where there are several."),
    ] = None,
    scoring: Annotated[
        str,
        typer.Option(
            help="whisper: its English normaliser. paper: as SAML's authors, without normaliser, "
            "and the last third of what is adapted on chooses the epoch."
        ),
    ] = "whisper",
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write everything here; with it a killed run can go on."),
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(help="PNG of WER per speaker; default beside --json.")
    ] = None,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Word error rates by the paper's protocol: adapt to each speaker, test on unseen speech."""
    quiet_libraries()
    from saml_kernels.errors import SAMLError
    from saml_kernels.files import check_output, is_figure, is_json, write_json
    from saml_models.data.corpora import by_speaker, load_corpus
    from saml_models.evaluation.protocol import make_folds
    from saml_models.text.normalise import SCORINGS

    if scoring not in SCORINGS:
        raise SAMLError(f"--scoring {scoring}: expected one of {', '.join(SCORINGS)}")
    names = [s.strip() for s in speakers.split(",") if s.strip()] if speakers else None
    by_name = by_speaker(load_corpus(data, names))
    if curve is not None:
        if adapt_utterances is not None:
            raise SAMLError("--curve: has counts of its own; leave out --adapt-utterances")
        _curve(by_name, curve, model, experts, guard, beam_size, language, scoring, device,
               json_file, figure, overwrite)  # fmt: skip
        return
    plan = make_folds(by_name, adapt_utterances, folds, choosing=scoring == "paper")
    if json_file is not None:
        check_output(json_file, is_json("model", "wer", "utterances"), overwrite)
        figure = figure or json_file.with_suffix(".png")
    if figure is not None:
        check_output(figure, is_figure, overwrite)
    with _resumable(json_file) as checkpoint:
        result = _run(model, experts, plan, beam_size, device_named(device), language, scoring,
                      guard, checkpoint)  # fmt: skip
        if json_file is not None:
            write_json(json_file, result)
    console = Console()
    console.print(_table(result))
    console.print(_by_speaker(result))
    for line in _comparisons(result):
        console.print(line)
    if found := result["divergence"]:
        low, high = found["interval_95"]
        console.print(
            f"quantised to full precision: KL {found['kl']:.4f} nats a token ({low:.4f} to "
            f"{high:.4f}), {100 * found['agreement']:.1f} % of {found['tokens']} tokens agree"
        )
    if json_file is not None:
        console.print(f"JSON: {json_file}")
    if figure is not None:
        from saml_models.evaluation.figures import plot_speakers

        _draw(console, plot_speakers, result, figure)


def _curve(
    speakers: dict[str, list[Any]],
    counts: str,
    name: str,
    experts: Path | None,
    guard: bool,
    beam_size: int,
    language: str | None,
    scoring: str,
    device: str | None,
    json_file: Path | None,
    figure: Path | None,
    overwrite: bool,
) -> None:
    """`saml evaluate --curve`: computed, shown and written."""
    from saml_kernels.errors import SAMLError
    from saml_kernels.files import check_output, is_figure, is_json, write_json
    from saml_models.evaluation.curve import curve_folds, learning_curve
    from saml_models.speakers.pretrained import load_adaptable

    try:
        wanted = [int(count) for count in counts.split(",")]
    except ValueError:
        raise SAMLError(f"--curve {counts}: expected counts such as 5,10,20") from None
    plan = curve_folds(speakers, wanted)
    if json_file is not None:
        check_output(json_file, is_json("model", "curve", "speakers"), overwrite)
        figure = figure or json_file.with_suffix(".png")
    if figure is not None:
        check_output(figure, is_figure, overwrite)
    saml = load_adaptable(name, experts=experts, device=device_named(device))
    total, done = sum(map(len, plan.values())), 0
    with _resumable(json_file) as checkpoint, progress("adapting") as show:

        def on_done(parts: int) -> None:
            nonlocal done
            done += parts
            show(done, total, "")

        found = learning_curve(
            saml, plan,
            guard=guard, beam_size=beam_size, language=language, scoring=scoring,
            checkpoint=checkpoint, on_done=on_done,
        )  # fmt: skip
        result = {
            "model": name,
            "guard": guard,
            "beam_size": beam_size,
            "language": language,
            "scoring": scoring,
            **found.to_dict(),
        }
        if json_file is not None:
            write_json(json_file, result)
    console = Console()
    table = Table(title=f"{name}: WER % by utterances learnt from")
    columns = "utterances", "speakers", "WER %", "95 %", "unadapted", "unused"
    for column in columns:
        table.add_column(column, justify="right")
    for point in result["curve"]:
        table.add_row(
            str(point["utterances"]), str(point["speakers"]), f"{point['wer']:.2f}",
            _span(point["interval_95"]), f"{point['unadapted']:.2f}",
            str(point["unused"]),
        )  # fmt: skip
    console.print(table)
    if json_file is not None:
        console.print(f"JSON: {json_file}")
    if figure is not None:
        from saml_models.evaluation.figures import plot_curve

        _draw(console, plot_curve, result, figure)


@contextmanager
def _resumable(json_file: Path | None) -> Iterator[Path | None]:
    """Where a run whose result goes to a file keeps what it has done, until the result is there."""
    if json_file is None:
        yield None
        return
    checkpoint = checkpoint_of(json_file)
    with resumable(checkpoint):
        yield checkpoint


def _draw(
    console: Console, plot: Callable[[dict[str, Any], Path], None], result: Any, path: Path
) -> None:
    """A figure; the numbers are safe, and a missing drawing library must not lose them."""
    from saml_kernels.errors import SAMLError

    try:
        plot(result, path)
        console.print(f"figure: {path}")
    except SAMLError as error:
        console.print(f"no figure: {error}")


def demo(
    data: Annotated[
        str | None, typer.Option(help="Your own speech; default: a public voice is fetched.")
    ] = None,
    model: Annotated[str, typer.Option(help="A name, an id or a folder.")] = "tiny.en",
    device: Device = None,
) -> None:
    """Watch a quantised Whisper learn one voice and make fewer mistakes."""
    quiet_libraries()
    from saml_models.data.demo_speech import demo_speech
    from saml_models.evaluation.protocol import Fold

    console = Console()
    with console.status("looking for speech"):
        utterances, source = demo_speech(data)
    train = utterances[:DEMO_ADAPT]
    test = utterances[DEMO_ADAPT : DEMO_ADAPT + DEMO_TEST]
    console.print(
        f"speech: {source}, speaker {utterances[0].speaker}: {len(train)} utterances to learn "
        f"from, {len(test)} others to test on"
    )
    plan = [Fold(utterances[0].speaker, train, test)]
    result = _run(model, None, plan, 1, device_named(device))
    console.print(_table(result))
    _sentences(console, result)


def _run(
    name: str,
    experts: Path | None,
    plan: Sequence[Any],
    beam_size: int,
    device: str,
    language: str | None = None,
    scoring: str = "whisper",
    guard: bool = True,
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """The protocol with progress bars."""
    from saml_models.evaluation.systems import evaluate_systems
    from saml_models.speakers.pretrained import load_adaptable

    saml = load_adaptable(name, experts=experts, device=device)
    with _progress() as (stage, done):
        result = evaluate_systems(
            name, saml, plan,
            device=device, guard=guard, beam_size=beam_size, language=language, scoring=scoring,
            checkpoint=checkpoint, on_stage=stage, on_done=done,
        )  # fmt: skip
    return {"model": name, "beam_size": beam_size, "language": language, **result.to_dict()}


@contextmanager
def _progress() -> Iterator[Any]:
    """Two callbacks, (stage, done), that draw bars on standard error."""
    bars = Progress(
        TextColumn("{task.description:>16}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), console=Console(stderr=True),
    )  # fmt: skip
    tasks = []
    with bars:

        def stage(name: str, parts: int) -> None:
            tasks.append(bars.add_task(name, total=parts))

        def done(parts: int) -> None:
            bars.advance(tasks[-1], parts)

        yield stage, done


def _table(result: dict[str, Any]) -> Table:
    from saml_models.evaluation.protocol import SYSTEMS

    size, wer = result["size"], result["wer"]
    found = result["ratios"].get("adapted_to_full_precision")
    title = f"{result['model']}: {size['ratio']:.2f}x smaller"
    if found is not None:
        title += f", adapted WER is {found['ratio']:.2f} of full precision's"
    table = Table(title=title)
    for column in ("system", "WER %", "95 %", "sub", "del", "ins", "MB"):
        table.add_column(column, justify="left" if column == "system" else "right")
    megabytes = {"full_precision": size["full_bytes"], "quantised": size["quantised_bytes"]}
    for system, label in SYSTEMS.items():
        if wer[system] is None:
            continue
        d = result["detail"][system]
        table.add_row(
            label, f"{wer[system]:.2f}", _span(d["interval_95"]), str(d["substitutions"]),
            str(d["deletions"]), str(d["insertions"]),
            f"{megabytes.get(system, size['saml_bytes']) / 1e6:.1f}",
        )  # fmt: skip
    return table


def _span(ends: Sequence[float] | None) -> str:
    return f"{ends[0]:.1f}-{ends[1]:.1f}" if ends else ""


_OF = {
    "adapted_to_experts": "the experts alone",
    "adapted_to_other_speaker": "another's adaptation",
    "adapted_to_full_precision": "full precision",
}


def _comparisons(result: dict[str, Any]) -> list[str]:
    """Adaptation beside what it is to be better than, who lost by it, and loops, in words."""
    lines = []
    speakers = len(result["speakers"])
    count, what = (speakers, "speakers") if speakers > 1 else (len(result["utterances"]), "clips")
    for name, other in _OF.items():
        found = result["ratios"].get(name)
        if found is not None and found["interval_95"] is not None:
            low, high = found["interval_95"]
            lines.append(
                f"WER after adaptation to that of {other}: {found['ratio']:.3f} ({low:.3f} to "
                f"{high:.3f} over {count} {what})"
            )
    if speakers > 1:
        lost = len(result["made_worse"])
        lines.append(f"made worse by adaptation: {lost} of {speakers} speakers")
    if checked := result["guard"]:
        unused = sum(fold["share"] == 0 for fold in checked)
        part = sum(0 < fold["share"] < 1 for fold in checked)
        lines.append(
            f"guard: of {len(checked)} adaptations {unused} were not used and {part} in part"
        )
    looped = {k: n for k, n in result["loops"].items() if n}
    if looped:
        lines.append(f"loops: {', '.join(f'{k} {n}' for k, n in looped.items())}")
    other = "paper" if result["scoring"] == "whisper" else "whisper"
    rates = [f"{rate:.2f}" for rate in result["wer_by_scoring"][other].values() if rate is not None]
    lines.append(f"the same by --scoring {other} (words alone): {', '.join(rates)}")
    return lines


def _by_speaker(result: dict[str, Any]) -> Table:
    from saml_models.evaluation.protocol import SYSTEMS

    table = Table(title="WER % by speaker")
    table.add_column("speaker")
    systems = [s for s in SYSTEMS if result["wer"][s] is not None]
    for system in systems:
        table.add_column(SYSTEMS[system], justify="right")
    shares: dict[str, list[str]] = {}
    for fold in result["guard"]:
        shares.setdefault(fold["speaker"], []).append(f"{fold['share']:.0%}")
    if shares:
        table.add_column("used", justify="right")
    for speaker, row in result["speakers"].items():
        table.add_row(
            escape(speaker),
            *(f"{row[system]:.1f}" for system in systems),
            " ".join(shares.get(speaker, [])),
        )
    return table


def _sentences(console: Console, result: dict[str, Any], count: int = 3) -> None:
    """The test sentences that adaptation helped most: reference, before, after."""
    from saml_models.text.wer import word_errors

    rows = result["utterances"]
    references = [r["reference"] for r in rows]
    before = word_errors(references, [r["quantised"] for r in rows])
    after = word_errors(references, [r["adapted"] for r in rows])
    order = sorted(range(len(rows)), key=lambda i: after[i].errors - before[i].errors)
    for i in order[:count]:
        table = Table.grid(padding=(0, 2))
        table.add_row("said", escape(references[i]))
        table.add_row(f"before ({before[i].errors} wrong)", escape(rows[i]["quantised"]))
        table.add_row(f"after ({after[i].errors} wrong)", escape(rows[i]["adapted"]))
        console.print(table, "")
