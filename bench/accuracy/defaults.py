"""Recipes of both stages on many voices, compared over speakers.

    python -m bench defaults --data DATA --json bench/results/defaults-tiny.en.json --work DIR
    python -m bench defaults ... --only default,"one LoRA" --sets choosing --seeds 0,1,2
    python -m bench defaults ... --variant 'hot:{"adaptation": {"learning_rate": 4e-4}}'

Stage 1 of a variant is `pretrain` on the training speech (or `"experts": FILE`, or with
`"experts": true` what ships, with `"experts": false` nothing), stage 2 `adapt` on each fold of each
set of voices (`VOICES`), the experts alone, adapted with each seed, and another speaker's
adaptation are then heard on the fold's other utterances, greedily. Defaults are chosen on the set
"choosing", forty voices.

Keys of a variant: `experts`, `config` (of `SAMLConfig`), `pretraining` (of `TrainingOptions`),
`per_speaker`, `encoder_share`, `runs` for stage 1; `adaptation` (of `TrainingOptions`),
`kind`, `guard` (off unless it says so) and `known` (of a fold's utterances, the first that are
given with their texts, the others without; all unless it is there) for stage 2.

Each variant runs in a process of its own. Errors are written after each fold, without what was
said, and what is in the file is not done again; `--work` keeps stage 1's checkpoint, experts and
profiles. The table gives pooled word error rates, ratios with 95 % intervals over speakers, how
many speakers adaptation made worse, and how many of what was heard ran into loops.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from bench.accuracy.defaults_rows import HEADS, rows
from bench.accuracy.kept import check_speech, resumed, speech_of
from bench.accuracy.over_speakers import table
from bench.accuracy.speech import VOICES, check_sets, training_speech
from bench.named import named, some_of
from bench.report.environment import about
from saml_kernels import SAMLConfig
from saml_kernels.errors import SAMLError
from saml_kernels.files import write_json
from saml_models.compress.loading import load_model
from saml_models.compress.shipped_rounding import compress
from saml_models.evaluation.protocol import Fold, in_loop, other_fold
from saml_models.models.registry import bind
from saml_models.runtime.quiet import quiet_libraries
from saml_models.speakers.pretrained import load_adaptable
from saml_models.speakers.profile import SpeakerProfile
from saml_models.text.wer import word_errors
from saml_models.training.adapt import adapt, options_for
from saml_models.training.options import TrainingOptions
from saml_models.training.pretrain import PRETRAINING, pretrain
from saml_models.training.pseudo_labels import adapt_unsupervised
from saml_models.training.samples import PER_SPEAKER
from saml_models.transcription.clips import decode_clips

# What differs from the defaults. Ranks are chosen so that the bytes come out alike.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {"experts": True},
    "one LoRA": {"config": {"num_experts": 1, "rank": 17, "router": "speaker"}},
    "2 x rank 8": {"config": {"num_experts": 2, "rank": 8}},
    "8 x rank 2": {"config": {"num_experts": 8, "rank": 2}},
    "encoder alone": {"config": {"targets": "encoder", "rank": 10}},
    "decoder alone": {"config": {"targets": "decoder", "rank": 7}},
    "router of the utterance": {"config": {"router": "utterance"}},
    "the paper's": {"config": SAMLConfig.paper().to_dict()},
}


class Variant:
    """One recipe, and what of it is in the results."""

    def __init__(
        self, name: str, changes: dict[str, Any], model: str, data: Path, work: Path
    ) -> None:
        self.name, self.changes, self.model, self.data = name, changes, model, data
        self.work = work / name.replace(" ", "-")
        self.work.mkdir(parents=True, exist_ok=True)

    def adaptable(self, show: Console) -> tuple[Any, Any]:
        """The model with the experts of this variant's stage 1."""
        given = self.changes.get("experts")
        config = replace(SAMLConfig(), **self.changes.get("config", {}))
        if given is True:
            return load_adaptable(self.model)
        if given is False:
            return load_adaptable(self.model, config)
        experts = Path(given) if given else self.work / "experts.safetensors"
        if given and not experts.exists():
            raise SAMLError(f"{self.name}: {experts}: no such file of experts")
        if not experts.exists():
            self.pretrain(experts, show)
        network, processor = load_adaptable(self.model, config, experts)
        return network, processor

    def pretrain(self, out: Path, show: Console) -> None:
        """Stage 1, from its checkpoint if there is one."""
        network, processor = load_model(self.model)
        compress(network, replace(SAMLConfig(), **self.changes.get("config", {})))
        show.print(f"{self.name}: stage 1")
        profile = pretrain(
            network,
            processor,
            training_speech(self.data),
            options(PRETRAINING, self.changes.get("pretraining", {})),
            per_speaker=self.changes.get("per_speaker", PER_SPEAKER),
            encoder_share=self.changes.get("encoder_share"),
            runs=self.changes.get("runs", 1),
            checkpoint=out.with_suffix(".checkpoint"),
            original=load_model(self.model)[0],
        )
        profile.save(out)

    def adapted(
        self, loaded: tuple[Any, Any], folds: Sequence[Fold], number: int, place: Path, seed: int
    ) -> SpeakerProfile:
        """The profile of a fold, made once."""
        path = place / f"{number}.safetensors"
        if not path.exists():
            kind = self.changes.get("kind", "experts")
            usual = options_for(kind, loaded[0])
            recipe = replace(options(usual, self.changes.get("adaptation", {})), seed=seed)
            guard = bool(self.changes.get("guard", False))
            train, known = folds[number].train, self.changes.get("known")
            if known is None:
                made = adapt(*loaded, train, recipe, kind=kind, skip_long=True, guard=guard)
            else:
                made = adapt_unsupervised(
                    *loaded, train[known:], recipe, known=train[:known], kind=kind, guard=guard
                )
            made.save(path)
        return SpeakerProfile.load(path)


def options(base: TrainingOptions, changes: dict[str, Any]) -> TrainingOptions:
    """`base` with some fields changed; JSON's lists are tuples there."""
    tuples: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
    return replace(base, **tuples)


def measure(
    variant: Variant,
    sets: Sequence[str],
    seeds: Sequence[int],
    results: dict[str, Any],
    save: Any,
    show: Console,
) -> None:
    """Whatever of these sets and seeds is not in the results yet, fold by fold."""
    own = results["variants"].setdefault(variant.name, {"variant": variant.changes, "heard": {}})
    if own["variant"] != variant.changes:
        raise SAMLError(
            f"{variant.name}: in the results it is {json.dumps(own['variant'])}; give this one "
            "another name"
        )
    loaded: list[tuple[Any, Any]] = []
    for key in sets:
        folds = VOICES[key].folds(variant.data)
        check_speech(results, key, speech_of([u for fold in folds for u in fold.test]))
        heard = own["heard"].setdefault(key, {})
        # Of one speaker alone there is no other one's adaptation.
        kinds = ("adapted", "other") if len({f.speaker for f in folds}) > 1 else ("adapted",)
        for system in ("experts", *(f"{kind} {s}" for s in seeds for kind in kinds)):
            done = heard.setdefault(system, [])
            for number in range(len(done), len(folds)):
                if not loaded:
                    loaded.append(variant.adaptable(show))
                    _check_hash(own, variant.name, loaded[0][0].saml.experts_hash())
                kind, _, seed = system.partition(" ")
                chosen = other_fold(folds, number) if kind == "other" else number
                profile = None
                if kind != "experts":
                    place = variant.work / f"{key}-{seed}"
                    profile = variant.adapted(loaded[0], folds, chosen, place, int(seed))
                clips = [u.load() for u in folds[number].test]
                speech = bind(*loaded[0])
                texts = decode_clips(speech, clips, speakers=[profile] * len(clips))
                found = word_errors([u.text for u in folds[number].test], texts)
                errors = [one.errors for one in found]
                done.append({"errors": errors, "loops": sum(in_loop(speech, t) for t in texts)})
                save()
            show.print(f"{variant.name}: {key}, {system}")


def _check_hash(own: dict[str, Any], name: str, found: str) -> None:
    """Results are of the same experts throughout."""
    if own.setdefault("hash", found) != found:
        raise SAMLError(
            f"{name}: the results are of other experts; give this variant another name, or --json "
            "another file"
        )


def main(
    data: Annotated[Path, typer.Option(help="Holds LibriSpeech/, speechocean762/ and so on.")],
    json_file: Annotated[Path, typer.Option("--json", help="Results, added to.")],
    work: Annotated[Path, typer.Option(help="Keeps experts, profiles and checkpoints.")],
    model: Annotated[str, typer.Option()] = "tiny.en",
    only: Annotated[str | None, typer.Option(help="Names in VARIANTS, by commas.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help="NAME:{JSON} of one's own.")] = None,
    sets: Annotated[str, typer.Option(help="Of VOICES, by commas.")] = "choosing",
    seeds: Annotated[str, typer.Option(help="Of the adaptation, by commas.")] = "0,1,2",
    here: Annotated[
        bool, typer.Option("--here", help="In this process; with a single variant.")
    ] = False,
) -> None:
    quiet_libraries()
    plan: dict[str, dict[str, Any]] = dict(
        named("--variant", one, dict, ", as in VARIANTS") for one in variant or []
    )
    if only or not plan:
        plan |= {name: VARIANTS[name] for name in some_of("--only", only, VARIANTS)}
    check_sets(sets.split(","))
    console = Console()
    results = resumed(json_file, model, ("speech", "variants"))
    if here:
        ((name, changes),) = plan.items()
        results["about"] = about(torch.device("cpu")) | {"model": model}
        measure(
            Variant(name, changes, model, data, work),
            sets.split(","),
            [int(seed) for seed in seeds.split(",")],
            results,
            lambda: write_json(json_file, results),
            console,
        )
        return
    for name, changes in plan.items():
        common = ["--data", data, "--json", json_file, "--work", work, "--model", model]
        each = ["--sets", sets, "--seeds", seeds, "--variant", f"{name}:{json.dumps(changes)}"]
        command = [sys.executable, "-m", "bench", "defaults", "--here", *map(str, common), *each]
        if subprocess.run(command, check=False).returncode:
            raise SAMLError(f"{name}: ended with an error; what was done is in {json_file}")
    results = json.loads(json_file.read_text())
    title = f"{model}: WER %, ratios with 95 % intervals over speakers"
    console.print(table(title, HEADS, rows(results)))
