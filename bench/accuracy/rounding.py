"""Plain and calibrated rounding beside full precision: WER and KL.

    python -m bench rounding --data DATA --json bench/results/rounding-tiny.en.json
    python -m bench rounding ... --draws 0,1 --kl-only
    python -m bench rounding ... --recipe 'all rows alike:{"finer_rows": 0}'

Variants: full precision, plain rounding, and calibrated rounding with several draws of the
calibration clips, which come from the training sets and from nobody who is measured; the same of
each `--recipe`, which says what differs from the default one. KL is the mean over text tokens of
KL(full precision || variant), the decoder given the reference in the model's own style; WER is
greedy. Results are written after each set, and what is in the file is not measured again; with
--work a calibration that was interrupted goes on where it was. With --keep the rounding of each
draw is written as it ships (saml_models/shipped/rounding).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.accuracy.kept import check_speech, resumed, speech_of
from bench.accuracy.rounding_rows import FULL, HEADS, rows
from bench.accuracy.speech import training_speech
from bench.models.clips import spread
from bench.named import named
from bench.report.environment import about
from saml_kernels import SAMLConfig
from saml_kernels.files import read_json, write_json
from saml_models.compress.apply import apply_saml
from saml_models.compress.calibrate import Recipe, calibrate_on
from saml_models.compress.calibration import Calibration
from saml_models.compress.calibration_speech import CLIPS, choose_utterances
from saml_models.compress.layers import compression_of
from saml_models.compress.loading import load_model
from saml_models.compress.rounding_file import write_rounding
from saml_models.data.corpora import Utterance, load_corpus
from saml_models.data.demo_speech import asterisk_prompts
from saml_models.evaluation.divergence import Divergence, divergences
from saml_models.models.interface import SpeechModel
from saml_models.models.registry import bind
from saml_models.models.whisper.languages import is_multilingual
from saml_models.runtime.folders import cache_folder
from saml_models.runtime.quiet import quiet_libraries
from saml_models.text.style import in_model_style
from saml_models.text.wer import word_errors
from saml_models.transcription.clips import decode_clips

PLAIN, CALIBRATED = "plain", "calibrated"


@dataclass(frozen=True)
class Set:
    """What is measured.

    Attributes:
        manifest: below the data; None: Asterisk's prompts in the language, every fourth.
        margin: seconds of silence after a clip; None: 30 s in all.
        language: of the speech; words are counted in English alone, whose normaliser is here.
    """

    manifest: str | None
    margin: float | None = None
    language: str = "en"

    def speech(self, data: Path) -> list[Utterance]:
        """In the manifest's order."""
        if self.manifest is None:
            return prompts(self.language)[::4]
        return load_corpus(data / self.manifest)


ENGLISH = {
    "vctk": Set("vctk/dev.jsonl"),
    "voicebank-noisy": Set("voicebank-noisy/dev.jsonl"),
    "speechocean762": Set("speechocean762/test.jsonl", 10.0),
    "librispeech-readers": Set("librispeech-readers/dev.jsonl"),
}
OTHERS = {"French": "fr", "Spanish": "es", "Italian": "it", "Russian": "ru"}
SETS = ENGLISH | {f"{name} prompts": Set(None, language=code) for name, code in OTHERS.items()}
FOREIGN = 10  # clips of each other language, for a multilingual model, in place of English ones


def prompts(language: str) -> list[Utterance]:
    """Asterisk's, from Debian's packages."""
    return load_corpus(asterisk_prompts(cache_folder(), language))


def calibration_speech(data: Path, multilingual: bool, seed: int) -> list[Utterance]:
    """What `CLIPS` utterances are drawn from; for a multilingual model those, in all languages."""
    found = training_speech(data)
    if not multilingual:
        return found
    chosen = choose_utterances(found, CLIPS - FOREIGN * len(OTHERS), seed)
    for language in OTHERS.values():
        heard = prompts(language)[::4]
        chosen += choose_utterances([u for u in prompts(language) if u not in heard], FOREIGN, seed)
    return chosen


class Bench:
    """The full model and its variants on the same speech."""

    def __init__(
        self,
        name: str,
        data: Path,
        work: Path | None,
        show: Progress,
        keep: Path | None = None,
        recipes: dict[str, Recipe] | None = None,
    ) -> None:
        self.name, self.data, self.work, self.show, self.keep = name, data, work, show, keep
        self.recipes = {"": Recipe()} | (recipes or {})
        self.full = self.load()
        self.multilingual = is_multilingual(self.full.network)
        self.sets = SETS if self.multilingual else ENGLISH
        self.heard: dict[str, list[str]] = {}  # by the full model; no text goes to the results
        self.texts = None if work is None else work / f"{name}-heard.json"
        if self.texts is not None and self.texts.is_file():
            self.heard = read_json(self.texts)

    def load(self) -> SpeechModel:
        """The model as released."""
        return bind(*load_model(self.name))

    def bar(self, title: str, total: int | None = None) -> Callable[[int], None]:
        """Advances by what it is called with; gone when it is full."""
        task = self.show.add_task(title, total=total)

        def advance(count: int) -> None:
            self.show.advance(task, count)
            if self.show.tasks[self.show.task_ids.index(task)].finished:
                self.show.remove_task(task)

        return advance

    def make(self, variant: str) -> tuple[SpeechModel, dict[str, Any]]:
        """The model of a variant, and what making it took."""
        speech, config = self.load(), SAMLConfig(num_experts=0)
        started, cpu = time.monotonic(), time.process_time()
        calibration: Calibration | None = None
        if variant != PLAIN:
            draw, recipe = _parts(variant)
            calibration = calibrate_on(
                speech,
                calibration_speech(self.data, self.multilingual, int(draw)),
                config,
                self.recipes[recipe],
                seed=int(draw),
                folder=None if self.work is None else self.work / self.place(variant),
                on_progress=self.stages(variant),
            )
        if calibration is not None and self.keep is not None:
            write_rounding(self.kept(variant, self.keep), calibration, speech.network)
        report = apply_saml(speech.network, config, calibration=calibration)
        return speech, {
            "memory_bytes": report.memory_bytes,
            "weight_hash": compression_of(speech.network).weight_hash(),
            "seconds": round(time.monotonic() - started, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "threads": torch.get_num_threads(),
            "calibration": None if calibration is None else calibration.about,
        }

    def place(self, variant: str) -> str:
        """A calibration's name among files."""
        draw, recipe = _parts(variant)
        return "-".join([self.name, draw, *recipe.split()])

    def kept(self, variant: str, folder: Path) -> Path:
        """Where its rounding is written."""
        return folder / f"{self.place(variant)}.safetensors"

    def stages(self, variant: str) -> Callable[[int, int, str], None]:
        """A bar for a calibration."""
        task = self.show.add_task(f"{variant}: calibrating")

        def advance(done: int, total: int, title: str) -> None:
            self.show.update(task, completed=done, total=total)
            if done == total:
                self.show.remove_task(task)

        return advance

    def errors(self, speech: SpeechModel, key: str, title: str, said: list[Utterance]) -> list[int]:
        """Of greedy transcripts; the full model always hears 30 s."""
        if speech is not self.full:
            compression_of(speech.network).margin = self.sets[key].margin
        heard = decode_clips(
            speech,
            [u.load() for u in said],
            language=self.sets[key].language,
            batch_size=6,
            on_done=self.bar(f"{title}: {key}, WER", len(said)),
        )
        if speech is self.full:
            self.heard[key] = heard
            if self.texts is not None:
                self.texts.parent.mkdir(parents=True, exist_ok=True)
                write_json(self.texts, self.heard)
        return [one.errors for one in word_errors([u.text for u in said], heard)]

    def style(self, key: str, said: list[Utterance]) -> list[str]:
        """The texts as the full model writes them: what it hears, and other languages' own."""
        if self.sets[key].language != "en":
            return [u.text for u in said]
        if len(self.heard.get(key, ())) != len(said):
            self.errors(self.full, key, FULL, said)
        return self.heard[key]

    def compare(
        self, models: list[SpeechModel], key: str, said: list[Utterance]
    ) -> list[Divergence]:
        """KL of each model on one set."""
        return divergences(
            self.full,
            models,
            [u.load() for u in said],
            [in_model_style(u.text, s) for u, s in zip(said, self.style(key, said), strict=True)],
            margin=self.sets[key].margin,
            language=self.sets[key].language if self.multilingual else None,
            on_done=self.bar(f"{key}, KL of {len(models)}", len(said)),
        )


def measure(
    bench: Bench,
    results: dict[str, Any],
    save: Callable[[], None],
    variants: list[str],
    clips: int,
    kl_only: bool,
) -> None:
    """Whatever of these variants is not in the results yet, set by set."""
    made: dict[str, SpeechModel] = {}

    def model(variant: str) -> SpeechModel:
        if variant not in made:
            made[variant], results["variants"][variant]["made"] = bench.make(variant)
            save()
        return made[variant]

    for variant in (FULL, *variants):
        results["variants"].setdefault(variant, {"sets": {}})
    everyone = {key: spread(one.speech(bench.data), clips) for key, one in bench.sets.items()}
    own = {name: one["sets"] for name, one in results["variants"].items()}
    for key, said in everyone.items():
        english = bench.sets[key].language == "en"
        check_speech(results, key, speech_of(said) | ({} if english else {"words": []}))
        if key not in own[FULL]:
            own[FULL][key] = {}
            if english:
                own[FULL][key]["errors"] = bench.errors(bench.full, key, FULL, said)
            save()
    for key, said in everyone.items():
        missing = [variant for variant in variants if "kl" not in own[variant].get(key, {})]
        if missing:
            models = [model(variant) for variant in missing]
            for variant, found in zip(missing, bench.compare(models, key, said), strict=True):
                own[variant].setdefault(key, {}).update(found.to_dict())
            save()
    for key, said in everyone.items():
        for variant in variants:
            counted = results["speech"][key]["words"] and not kl_only
            if counted and "errors" not in own[variant].get(key, {}):
                own[variant][key]["errors"] = bench.errors(model(variant), key, variant, said)
                save()
    for variant in variants:  # results that were there needed no model
        if bench.keep and variant != PLAIN and not bench.kept(variant, bench.keep).exists():
            model(variant)


def _parts(variant: str) -> tuple[str, str]:
    """Of a calibrated one: the draw and the recipe's name, which the default one has not."""
    draw, _, recipe = variant.removeprefix(f"{CALIBRATED} ").partition(" ")
    return draw, recipe


def _recipe(given: str) -> tuple[str, Recipe]:
    """Its name and the recipe."""
    return named("--recipe", given, Recipe, " of Recipe's fields")


def main(
    data: Annotated[Path, typer.Option(help="Holds vctk/, LibriSpeech/ and so on.")],
    json_file: Annotated[Path, typer.Option("--json", help="Results, added to.")],
    model: Annotated[str, typer.Option()] = "tiny.en",
    draws: Annotated[str, typer.Option(help="Seeds of the clips' choice, by commas.")] = "0,1,2",
    clips: Annotated[int, typer.Option(min=1, help="Of a set at most.")] = 1000,
    kl_only: Annotated[bool, typer.Option("--kl-only", help="Leave WER for later.")] = False,
    work: Annotated[Path | None, typer.Option(help="Keeps unfinished calibrations.")] = None,
    keep: Annotated[
        Path | None, typer.Option(help="Write the rounding of each draw there, as it ships.")
    ] = None,
    recipe: Annotated[
        list[str] | None, typer.Option(help="NAME:{JSON} of Recipe's fields; may be repeated.")
    ] = None,
) -> None:
    quiet_libraries()
    recipes = dict(map(_recipe, recipe or []))
    results = resumed(json_file, model, ("speech", "variants"))
    results["about"] = about(torch.device("cpu")) | {"model": model}
    console = Console()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as show:
        bench = Bench(model, data, work, show, keep, recipes)
        drawn = [f"{CALIBRATED} {int(seed)}" for seed in draws.split(",")]
        variants = [PLAIN, *drawn, *(f"{one} {name}" for name in recipes for one in drawn)]
        measure(bench, results, lambda: write_json(json_file, results), variants, clips, kl_only)
    table = Table(title=f"{model}: WER %, KL in nats a token")
    for name in (HEADS[0], *results["speech"], HEADS[1]):
        table.add_column(name, justify="right")
    for row in rows(results):
        table.add_row(*row)
    console.print(table)
