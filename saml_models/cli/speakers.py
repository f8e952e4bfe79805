"""The commands `saml speakers`: who is enrolled, and profiles in and out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from saml_models.cli.options import Device, Model, Overwrite, Store, device_named
from saml_models.cli.output import print_rows
from saml_models.runtime.quiet import quiet_libraries

__all__ = ["speakers"]

Who = Annotated[str, typer.Argument(metavar="SPEAKER", help="An enrolled speaker, or a file.")]


def list_speakers(store: Store = None) -> None:
    """List the enrolled speakers, one line each."""
    from saml_kernels.errors import SAMLError
    from saml_models.speakers.profile import SpeakerProfile
    from saml_models.speakers.store import ProfileStore

    enrolled = ProfileStore(store)
    names = enrolled.names()
    if not names:
        typer.echo(f"nobody in {enrolled.folder}; `saml adapt` enrols", err=True)
        return
    rows: list[tuple[str, ...]] = [
        ("speaker", "kind", "model", "date", "bytes", "WER before", "after")
    ]
    for name in names:
        path = enrolled.find(name)
        try:
            profile = SpeakerProfile.load(path)
        except SAMLError as error:  # one damaged file does not hide the others
            rows.append((name, f"damaged: {error}", "", "", "", "", ""))
            continue
        rates = [str(profile.about.get(k, "")) for k in ("wer_before", "wer_after")]
        about = (str(profile.about.get("model", "")), str(profile.about.get("date", "")))
        rows.append((name, profile.kind, *about, f"{path.stat().st_size:,}", *rates))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip())


def show(profile: Who, store: Store = None) -> None:
    """Print what a profile's header says."""
    from saml_models.speakers.profile import SpeakerProfile
    from saml_models.speakers.store import ProfileStore

    path = ProfileStore(store).resolve(profile)
    found = SpeakerProfile.load(path)
    experts = [len(left) for left in found.kept.values()]
    rows: dict[str, Any] = {
        **found.about,
        "file": path,
        "kind": found.kind,
        "hash": found.hash,
        "bytes": f"{found.nbytes:,}",
        "base weights": found.weight_hash,
        **({"experts kept": f"{sum(experts)} in {len(experts)} layers"} if experts else {}),
        **{f"config.{key}": value for key, value in found.config.items()},
    }
    print_rows([(key, str(value)) for key, value in rows.items()])


def remove(
    speaker: Annotated[str, typer.Argument(help="An enrolled speaker.")], store: Store = None
) -> None:
    """Delete an enrolled speaker's profile."""
    from saml_models.speakers.store import ProfileStore

    enrolled = ProfileStore(store)
    enrolled.remove(speaker)
    typer.echo(f"removed {speaker} from {enrolled.folder}")


def export(
    profile: Who,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A file, or with --peft a folder.")],
    peft: Annotated[
        bool, typer.Option(help="Write each expert as a PEFT LoRA adapter: OUT/expert-0, ...")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="With --peft; default: the one that the profile names.")
    ] = None,
    store: Store = None,
    overwrite: Overwrite = False,
) -> None:
    """Copy a profile out of the store, or write its experts for PEFT."""
    quiet_libraries()
    from saml_kernels.files import check_new_folder, check_output
    from saml_models.speakers.peft import export_experts
    from saml_models.speakers.pretrained import load_for_speakers
    from saml_models.speakers.profile import SpeakerProfile, is_profile
    from saml_models.speakers.store import ProfileStore

    loaded = SpeakerProfile.load(ProfileStore(store).resolve(profile))
    if not peft:
        check_output(out, is_profile, overwrite)
        loaded.save(out)
        typer.echo(f"written: {out} ({out.stat().st_size:,} bytes)")
        return
    if not overwrite:
        for number in range(int(loaded.config["num_experts"])):
            check_new_folder(out / f"expert-{number}")
    network, _ = load_for_speakers(
        model or str(loaded.about.get("model") or "tiny.en"), {profile: loaded}
    )
    written = export_experts(loaded, network, out)
    typer.echo(f"written: {', '.join(str(path) for path in written)}")
    typer.echo("PEFT has no router: each adapter is one expert at a gate of 1")


def import_(
    source: Annotated[
        list[Path],
        typer.Argument(metavar="SOURCE...", help="A profile, or PEFT LoRA folders: one an expert."),
    ],
    name: Annotated[
        str | None, typer.Option(help="Of the speaker; default: the profile's.")
    ] = None,
    model: Model = "tiny.en",
    store: Store = None,
    overwrite: Overwrite = False,
) -> None:
    """Enrol a profile from elsewhere, or PEFT LoRA adapters as a speaker's experts."""
    quiet_libraries()
    from saml_kernels.errors import SAMLError
    from saml_kernels.files import check_output
    from saml_models.speakers.peft import import_adapters
    from saml_models.speakers.pretrained import load_adaptable
    from saml_models.speakers.profile import SpeakerProfile, is_profile
    from saml_models.speakers.store import ProfileStore, check_name

    enrolled = ProfileStore(store)
    if not source[0].is_dir():
        if len(source) > 1:
            raise SAMLError(f"{source[1]}: one profile at a time")
        profile = SpeakerProfile.load(source[0])
    else:
        if name is None:
            raise SAMLError("--name: adapters do not say whose they are; give a name")
        check_name(name)
        network, _ = load_adaptable(model)
        profile = import_adapters(source, network, name)
    if name is not None:  # what `show` and `auto` call the speaker
        profile = replace(profile, about=profile.about | {"speaker": name})
    path = enrolled.path(profile.name if name is None else name)
    check_output(path, lambda there: is_profile(there, profile.hash), overwrite)
    enrolled.save(profile, name)
    typer.echo(f"enrolled: {path} ({path.stat().st_size:,} bytes)")


def prune(
    profile: Who,
    data: Annotated[Path, typer.Option(help="The speaker's speech with its text.")],
    out: Annotated[Path, typer.Option(help="The smaller profile to write.")],
    max_loss: Annotated[
        float, typer.Option(min=0.0, help="WER that may be lost, in per cent absolute.")
    ] = 0.5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Curve and gates.")] = None,
    figure: Annotated[Path | None, typer.Option(help="PNG of both; default beside --json.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Default: the one that the profile names.")
    ] = None,
    store: Store = None,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Drop the experts that a speaker does not use."""
    quiet_libraries()
    from saml_kernels.errors import SAMLError
    from saml_kernels.files import check_output, is_figure, is_json, write_json
    from saml_models.data.corpora import by_speaker, load_corpus
    from saml_models.evaluation.figures import plot_pruning
    from saml_models.speakers.pretrained import load_for_speakers
    from saml_models.speakers.profile import SpeakerProfile, is_profile
    from saml_models.speakers.store import ProfileStore
    from saml_models.training.pruning import prune_curve

    check_output(out, is_profile, overwrite)
    if json_file is not None:
        check_output(json_file, is_json("speaker", "max_loss", "curve"), overwrite)
        figure = figure or json_file.with_suffix(".png")
    if figure is not None:
        check_output(figure, is_figure, overwrite)
    loaded = SpeakerProfile.load(ProfileStore(store).resolve(profile))
    utterances = load_corpus(data)
    voices = by_speaker(utterances)
    if len(voices) > 1:
        if loaded.name not in voices:
            raise SAMLError(f"{data}: has {len(voices)} speakers, and none is {loaded.name}")
        utterances = voices[loaded.name]
    named = model or str(loaded.about.get("model") or "tiny.en")
    network, processor = load_for_speakers(named, {profile: loaded}, device_named(device))
    smaller, usage, curve = prune_curve(network, processor, utterances, loaded, max_loss)
    smaller.save(out)
    for point in curve:
        typer.echo(f"{point.experts:>5} experts  {point.bytes:>9,} bytes  WER {point.wer:.2f} %")
    typer.echo(f"written: {out} ({loaded.nbytes:,} -> {smaller.nbytes:,} bytes of tensors)")
    result = {
        "speaker": loaded.name,
        "max_loss": max_loss,
        "curve": [vars(point) for point in curve],
        "layers": usage.layers,
        "gates": [[round(g, 4) for g in row] for row in usage.gates.tolist()],
        "shares": [[round(g, 5) for g in row] for row in usage.shares.tolist()],
    }
    if json_file is not None:
        write_json(json_file, result)
        typer.echo(f"JSON: {json_file}")
    if figure is not None:
        plot_pruning(result, figure)
        typer.echo(f"figure: {figure}")


speakers = typer.Typer(no_args_is_help=True, help="Speakers' profiles: enrolled, in, and out.")
speakers.command("list")(list_speakers)
speakers.command()(show)
speakers.command()(remove)
speakers.command()(export)
speakers.command("import")(import_)
speakers.command()(prune)
