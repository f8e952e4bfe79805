"""The command `saml adapt`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from saml_models.cli.options import (
    Device,
    Epochs,
    Experts,
    Guarded,
    LearningRate,
    Model,
    Overwrite,
    Seed,
    Store,
    checkpoint_of,
    device_named,
    given,
)
from saml_models.cli.output import print_result, progress, resumable
from saml_models.runtime.quiet import quiet_libraries

__all__ = ["adapt"]


def adapt(
    data: Annotated[
        Path | None, typer.Option(help="Speech with its text: a corpus, manifest or folder.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The profile to write; default: enrol the speaker.")
    ] = None,
    model: Model = "tiny.en",
    speaker: Annotated[
        str | None,
        typer.Option(help="Whose voice, of several; a folder of clips is enrolled under it."),
    ] = None,
    kind: Annotated[
        str, typer.Option(help="experts: the speaker's own; gates: router offsets, a few KB.")
    ] = "experts",
    adapt_utterances: Annotated[
        int | None, typer.Option(min=1, help="Use the speaker's first K utterances; default: all.")
    ] = None,
    test_utterances: Annotated[
        int, typer.Option(min=0, help="Keep the last K out, and note their WER before and after.")
    ] = 0,
    unsupervised: Annotated[
        bool, typer.Option(help="Without transcripts: learn from what the model is sure of.")
    ] = False,
    unlabelled: Annotated[
        Path | None,
        typer.Option(help="More of the speaker's speech, without text: a folder, or a recording."),
    ] = None,
    guard: Guarded = True,
    manifest: Annotated[
        Path | None,
        typer.Option(help="Instead of --data: speech of many speakers, each of whom is enrolled."),
    ] = None,
    ray: Annotated[bool, typer.Option(help="With --manifest: in parallel, with Ray.")] = False,
    experts: Experts = None,
    store: Store = None,
    epochs: Epochs = None,
    learning_rate: LearningRate = None,
    seed: Seed = None,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Learn one speaker's voice, or many's; a killed run resumes when it is started again."""
    quiet_libraries()
    from saml_kernels.errors import SAMLError
    from saml_kernels.files import check_output
    from saml_models.data.corpora import load_corpus, only_speaker, short_clips
    from saml_models.evaluation.protocol import with_word_errors
    from saml_models.speakers.pretrained import load_adaptable
    from saml_models.speakers.profile import is_profile
    from saml_models.speakers.store import ProfileStore
    from saml_models.training.adapt import adapt as learn
    from saml_models.training.adapt import options_for
    from saml_models.training.guard import Verdict
    from saml_models.training.pseudo_labels import adapt_unsupervised

    if (data is None) == (manifest is None):
        raise SAMLError("adapt: give --data for one speaker or --manifest for many")
    options_for(kind)  # an unknown one is said at once
    if manifest is not None:
        if out is not None or speaker is not None or test_utterances or unlabelled is not None:
            raise SAMLError(
                "--manifest: takes no --out, --speaker, --test-utterances or --unlabelled"
            )
        _adapt_many(
            manifest, ProfileStore(store), ray, adapt_utterances, overwrite, model=model, kind=kind,
            changes=given(epochs, learning_rate, seed), experts=experts and str(experts),
            device=device_named(device), unsupervised=unsupervised, guard=guard,
        )  # fmt: skip
        return
    if unlabelled is not None and unsupervised:
        raise SAMLError("--unlabelled: is beside clips with text; leave --unsupervised out")
    if ray:
        raise SAMLError("--ray: is for many speakers; give --manifest")
    assert data is not None
    utterances = load_corpus(data, need_text=not unsupervised or test_utterances > 0)
    utterances = only_speaker(utterances, speaker, data)
    if out is None:  # who speaks again is learnt anew
        out = ProfileStore(store).path(speaker or utterances[0].speaker)
        overwrite = True
    check_output(out, is_profile, overwrite)
    more = [] if unlabelled is None else load_corpus(unlabelled, need_text=False)
    more = more and only_speaker(more, speaker, unlabelled)
    if test_utterances >= len(utterances):
        raise SAMLError(
            f"--test-utterances {test_utterances}: there are {len(utterances)}, none is left"
        )
    kept = len(utterances) - test_utterances
    utterances, held = utterances[:kept][:adapt_utterances], utterances[kept:]
    short_clips(held)  # what is wrong with them is said before the learning
    network, processor = load_adaptable(model, experts=experts, device=device_named(device))
    options = replace(options_for(kind, network), **given(epochs, learning_rate, seed))
    checkpoint = checkpoint_of(out)
    with resumable(checkpoint), progress("adapting") as show:

        def on_step(done: int, steps: int, loss: float) -> None:
            show(done, steps, f"loss {loss:.3f}")

        how: dict[str, Any] = {
            "speaker": speaker, "kind": kind, "guard": guard, "checkpoint": checkpoint,
            "on_step": on_step,
        }  # fmt: skip
        if more:
            profile = adapt_unsupervised(network, processor, more, options, known=utterances, **how)
        else:
            do = adapt_unsupervised if unsupervised else learn
            profile = do(network, processor, utterances, options, **how)
        profile.save(out)
    if held:
        profile = with_word_errors(profile, network, processor, held)
        profile.save(out)
    about = profile.about
    typer.echo(
        f"learnt {about['speaker']} from {about['utterances']} utterances "
        f"({about['seconds']:g} s of speech)"
    )
    if "guard" in about and not unsupervised:
        typer.echo(Verdict.line(about["guard"]))
    elif not about.get("adapted", True):
        typer.echo(
            "the held-back clips do not say that it helps: the profile is the unadapted one "
            f"({about['guard']})"
        )
    if held:
        typer.echo(
            f"WER on {len(held)} others: {about['wer_before']:.2f} % before, "
            f"{about['wer_after']:.2f} % after"
        )
    print_result(network, profile, out)
    start = f" --experts {experts}" if experts and kind == "gates" else ""
    typer.echo(f"try it: saml transcribe --model {model}{start} --speaker {out} FILE")


def _adapt_many(
    manifest: Path, store: Any, ray: bool, most: int | None, overwrite: bool, **how: Any
) -> None:
    """Every speaker of a manifest; ends with exit code 1 where some failed."""
    from dataclasses import asdict

    from saml_kernels.files import check_output, is_json, write_json
    from saml_models.data.corpora import by_speaker, load_corpus
    from saml_models.training.fleet import Outcome, adapt_fleet, make_jobs

    report = store.folder / "fleet.json"
    check_output(report, is_json("speaker", "status"), overwrite)
    # What is wrong with one speaker's rows is that speaker's failure, not everybody's.
    faults: dict[str, str] = {}
    rows = load_corpus(manifest, need_text=False, need_audio=False, faults=faults)
    utterances = [u for found in by_speaker(rows).values() for u in found[:most]]
    jobs = make_jobs(utterances, how.pop("model"), store, **how)
    with progress("adapting") as show:
        outcomes = []

        def on_done(outcome: Any) -> None:
            outcomes.append(outcome)
            show(len(outcomes), len(faults) + len(jobs), outcome.speaker)
            said = f": {outcome.reason}" if outcome.reason else f" in {outcome.seconds:g} s"
            typer.echo(f"{outcome.speaker}: {outcome.status}{said}")

        for speaker, reason in faults.items():
            on_done(Outcome(speaker, "failed", reason))
        adapt_fleet(jobs, ray, on_done)
    write_json(report, [asdict(outcome) for outcome in outcomes])
    failed = sum(outcome.status == "failed" for outcome in outcomes)
    typer.echo(f"{len(outcomes) - failed} of {len(outcomes)} speakers in {store.folder}; {report}")
    if failed:
        raise typer.Exit(1)
