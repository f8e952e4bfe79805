"""`Recogniser`: a speech model that learns voices, with everything around it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from saml_kernels import SAMLConfig
from saml_kernels.errors import SAMLError
from saml_kernels.files import atomic_folder, check_new_folder
from saml_models.compress.apply import CompressionReport
from saml_models.compress.calibrate import calibrate_on
from saml_models.compress.calibration import Calibration
from saml_models.compress.calibration_speech import CLIPS
from saml_models.compress.checkpoint import save_saml
from saml_models.compress.layers import cast
from saml_models.compress.loading import load_model
from saml_models.data.audio import SAMPLE_RATE, Audio, samples_of
from saml_models.data.corpora import Utterance, only_speaker, utterances_of
from saml_models.evaluation.protocol import Evaluation, make_folds
from saml_models.evaluation.systems import evaluate_systems
from saml_models.models.registry import bind
from saml_models.runtime.devices import on_device
from saml_models.speakers.pretrained import (
    load_adaptable,
    load_for_speakers,
    make_adaptable,
)
from saml_models.speakers.profile import SpeakerProfile
from saml_models.speakers.store import ProfileStore
from saml_models.text.phrases import Phrases
from saml_models.text.transcript import Transcript
from saml_models.training.adapt import adapt
from saml_models.training.options import TrainingOptions
from saml_models.training.pseudo_labels import adapt_unsupervised
from saml_models.transcription.recordings import transcribe, transcribe_many

__all__ = ["Recogniser", "load"]

Speech = str | os.PathLike[str] | Sequence[Utterance] | Sequence[tuple[Audio, str]]
"""A corpus, a manifest, a folder of clips with their texts, or pairs of (audio, text)."""

Speaker = SpeakerProfile | str | os.PathLike[str] | None
"""A profile, its file, the name of an enrolled speaker, or nobody."""


class Recogniser:
    """A speech model with its processor and the speakers enrolled for it.

    Not to be shared between threads: a batch's speakers are set on the model while it runs.

    Attributes:
        model: transformers' network, with SAML layers unless it was loaded with `compress=False`.
        processor: features and tokens of that network.
        speakers: the enrolled speakers; see `ProfileStore`.
    """

    def __init__(self, model: Any, processor: Any, speakers: ProfileStore | None = None) -> None:
        """Take a model as it is; `load` finds one by its name.

        Raises:
            SAMLError: the model is of no kind known here.
        """
        bind(model, processor)
        self.model, self.processor = model, processor
        self.speakers = speakers or ProfileStore()

    @classmethod
    def load(
        cls,
        name_or_path: str | os.PathLike[str],
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        experts: str | os.PathLike[str] | None = None,
        *,
        compress: bool = True,
    ) -> Recogniser:
        """A model by its name, with low-bit weights and pretrained experts.

        Args:
            name_or_path: openai-whisper's name ("tiny.en"), a Hugging Face id, or a folder in
                Hugging Face's, CTranslate2's or `Recogniser.save`'s layout.
            device: None is the CPU.
            dtype: of what stays in floating point but experts and routers; None is float32.
            experts: a file that `saml pretrain` wrote, or the name of experts in this package
                ("english" for base); None takes those that ship for this model, if there are any.
            compress: False leaves the model at full precision; it cannot be adapted then.

        Raises:
            SAMLError: the model or the experts cannot be found, are damaged or do not fit, or the
                device is not there.
        """
        if compress:
            pair = load_adaptable(name_or_path, experts=experts, device=device)
        elif experts is not None:
            raise SAMLError("experts: a model at full precision has none; leave compress=True")
        else:
            pair = load_model(name_or_path, device)
        if dtype is not None:
            cast(pair[0], dtype)
        return cls(*pair)

    @classmethod
    def for_speakers(
        cls,
        name_or_path: str | os.PathLike[str],
        profiles: Mapping[str, SpeakerProfile],
        device: str | torch.device | None = None,
        *,
        candidates: Sequence[SpeakerProfile] = (),
        experts: str | os.PathLike[str] | None = None,
        speakers: ProfileStore | None = None,
    ) -> Recogniser:
        """A model whose layers fit these profiles; at full precision where there are none.

        Args:
            name_or_path, device, experts: as for `load`.
            profiles: by what they are called in errors.
            candidates: others, which need not fit.
            speakers: the enrolled; None is the default folder.

        Raises:
            SAMLError: as `load`, or a profile was made for another model.
        """
        pair = load_for_speakers(
            name_or_path, profiles, device, candidates=candidates, experts=experts
        )
        return cls(*pair, speakers)

    @property
    def name(self) -> str:
        """What the model was loaded by."""
        return bind(self.model, self.processor).name

    def to(self, device: str | torch.device) -> Recogniser:
        """Move the model to a device.

        Raises:
            SAMLError: the device is not there.
        """
        self.model = on_device(self.model, device)
        return self

    def adapt(
        self,
        data: Speech,
        *,
        speaker: str | None = None,
        kind: str = "experts",
        unsupervised: bool = False,
        unlabelled: Speech | None = None,
        options: TrainingOptions | None = None,
        guard: bool = True,
        rate: int = SAMPLE_RATE,
        checkpoint: str | os.PathLike[str] | None = None,
        on_step: Callable[[int, int, float], None] | None = None,
    ) -> SpeakerProfile:
        """Learn one speaker; the model itself is left as it was.

        Args:
            data: the speaker's clips with their texts, each of at most 30 s.
            speaker: who of a corpus of several; else the name for the profile.
            kind: "experts" learns experts and routers, "gates" an offset to each router's logits.
            unsupervised: learn from the model's own text where it is sure of it.
            unlabelled: more of the speaker's speech, of any length and without text; learnt from
                as if `unsupervised`, beside `data`.
            options: of training; the released defaults unless given.
            guard: use what was learnt only if it helps with clips that are held back.
            rate: samples a second of audio that is given as samples.
            checkpoint: a file to resume from if the run is killed.
            on_step: called with (steps done, steps in all, loss).

        Returns:
            The profile, for `transcribe(..., speaker=...)`, `.save(path)` and
            `speakers.save(profile)`, which enrols it.

        Raises:
            SAMLError: nothing to learn from, several speakers, bad audio, or a model at full
                precision.
        """
        utterances = utterances_of(data, rate, need_text=not unsupervised)
        source = data if isinstance(data, str | os.PathLike) else "speech"
        utterances = only_speaker(utterances, speaker, source)
        how: dict[str, Any] = {
            "speaker": speaker, "kind": kind, "guard": guard, "on_step": on_step,
            "checkpoint": None if checkpoint is None else Path(checkpoint),
        }  # fmt: skip
        own = self.model, self.processor
        if unlabelled is not None:
            if unsupervised:
                raise SAMLError("unlabelled: is beside clips with text; leave unsupervised out")
            more = utterances_of(unlabelled, rate, need_text=False)
            return adapt_unsupervised(*own, more, options, known=utterances, **how)
        learn = adapt_unsupervised if unsupervised else adapt
        return learn(*own, utterances, options, **how)

    def transcribe(
        self,
        audio: Audio | Sequence[Audio],
        speaker: Speaker | Sequence[Speaker] = None,
        *,
        rate: int = SAMPLE_RATE,
        language: str | None = None,
        task: str = "transcribe",
        beam_size: int = 1,
        timestamps: bool = False,
        word_timestamps: bool = False,
        own_words: Phrases | None = None,
        on_progress: Callable[[float, float], None] | None = None,
    ) -> Any:
        """Text of a recording of any length, or of several that are decoded together.

        Args:
            audio: a file, samples (an array, a tensor or a list of floats), or a list of these.
            speaker: one for all recordings, or a list with one for each.
            rate: samples a second of audio that is given as samples.
            language: code ("de") or name ("german"); None detects it, where the model knows
                several.
            task: "transcribe", or "translate" into English with a multilingual model.
            beam_size: 1 is greedy.
            timestamps: divide the text of each recording into segments with times; one of more
                than 30 s has them always.
            word_timestamps: also find when each word was said.
            own_words: names and terms that are likelier than the model thinks: a file with one a
                line, or a list of them.
            on_progress: called with (seconds done, seconds in all); of a list, recordings.

        Returns:
            A `Transcript` with `.text`, `.segments` and `.language`; of a list, a list of them.

        Raises:
            SAMLError: audio that cannot be read, a language or task that the model does not know,
                a speaker who is not enrolled or fits another model.
        """
        many = isinstance(audio, list | tuple) and not _is_samples(audio)
        listed: Any = audio if many else [audio]
        given: Any = [samples_of(one, rate) for one in listed]
        asked: Any = speaker
        who: Any = (
            [self._profile(one) for one in asked]
            if isinstance(asked, list | tuple)
            else self._profile(asked)
        )
        return transcribe(
            self.model,
            self.processor,
            given if many else given[0],
            who,
            language=language,
            task=task,
            beam_size=beam_size,
            timestamps=timestamps or word_timestamps,
            word_timestamps=word_timestamps,
            own_words=own_words,
            on_progress=on_progress,
        )

    def transcribe_each(
        self,
        recordings: Iterable[Any],
        speaker: Speaker | Sequence[Speaker] = None,
        **options: Any,
    ) -> Iterator[Transcript]:
        """Transcripts one after the other, as they are ready; see `recordings.transcribe_many`."""
        return transcribe_many(self.model, self.processor, recordings, speaker, **options)

    def evaluate(
        self,
        data: Speech,
        *,
        speakers: Sequence[str] | None = None,
        adapt_utterances: int | None = None,
        folds: int = 2,
        options: TrainingOptions | None = None,
        guard: bool = True,
        beam_size: int = 1,
        language: str | None = None,
        scoring: str = "whisper",
        on_stage: Callable[[str, int], None] | None = None,
        on_done: Callable[[int], None] | None = None,
    ) -> Evaluation:
        """Word error rates of full precision, quantised, experts, adapted and another's profile.

        Args:
            data: speech of one or several speakers with its text.
            speakers: some of those in the data.
            adapt_utterances: adapt on each speaker's first so many, and test on the rest.
            folds: of cross-validation, where `adapt_utterances` is None.
            options: of the adaptation.
            guard: as for `adapt`.
            beam_size: of every system.
            language: that is spoken in the test clips; None lets a multilingual model detect it.
            scoring: "whisper" or "paper", as `saml evaluate --scoring`.
            on_stage, on_done: progress, as for `protocol.evaluate`.

        Raises:
            SAMLError: too few utterances of a speaker, or a model that was loaded from a quantised
                folder and has no full-precision original.
        """
        by_name: dict[str, list[Utterance]] = {}
        for utterance in utterances_of(data, SAMPLE_RATE):
            if speakers is None or utterance.speaker in speakers:
                by_name.setdefault(utterance.speaker, []).append(utterance)
        return evaluate_systems(
            self.name,
            (self.model, self.processor),
            make_folds(by_name, adapt_utterances, folds, choosing=scoring == "paper"),
            options,
            device=bind(self.model, self.processor).device,
            guard=guard,
            beam_size=beam_size,
            language=language,
            scoring=scoring,
            on_stage=on_stage,
            on_done=on_done,
        )

    def quantize(
        self,
        experts: str | os.PathLike[str] | None = None,
        *,
        calibration: Speech | Calibration | None = None,
        clips: int = CLIPS,
        seed: int = 0,
        work: str | os.PathLike[str] | None = None,
        on_progress: Callable[[int, int, str], None] | None = None,
    ) -> CompressionReport:
        """Give a model that was loaded at full precision low-bit weights and experts, in place.

        Args:
            experts: as for `load`; with `calibration`, None takes new ones, since those that ship
                were trained beside the rounding that ships.
            calibration: speech that a Whisper's rounding is chosen on, at the same bytes; its text
                need not be there. Or what `compress.calibrate` found.
            clips: how many of the speech are heard, each also in noise.
            seed: of their choice and of the noise.
            work: a folder for finished layers, from which an interrupted calibration goes on.
            on_progress: called with steps of the calibration done, their number and a name.

        Raises:
            SAMLError: the model is quantised already, is no Whisper (`calibration`), there is no
                clip of 1 to 30 s, or the experts do not fit it.
        """
        if calibration is None:
            return make_adaptable(self.model, self.name, experts=experts)

        def rounding(config: SAMLConfig) -> Calibration:
            if isinstance(calibration, Calibration):
                return calibration
            return calibrate_on(
                bind(self.model, self.processor),
                utterances_of(calibration, need_text=False),
                config,
                seed=seed,
                count=clips,
                folder=None if work is None else Path(work),
                on_progress=on_progress,
            )

        return make_adaptable(self.model, self.name, experts=experts, rounding=rounding)

    def save(self, folder: str | os.PathLike[str]) -> int:
        """Write the quantised model as a new folder, which `load` and `saml --model` take.

        Returns:
            Bytes of the weights and their description.

        Raises:
            SAMLError: the model is at full precision, or the folder is there or cannot be written.
        """
        target = Path(folder)
        check_new_folder(target)
        with atomic_folder(target) as temporary:
            return save_saml(self.model, self.processor, temporary)

    def _profile(self, speaker: Speaker) -> SpeakerProfile | None:
        if speaker is None or isinstance(speaker, SpeakerProfile):
            return speaker
        return SpeakerProfile.load(self.speakers.resolve(speaker))


def load(
    name_or_path: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    experts: str | os.PathLike[str] | None = None,
    *,
    compress: bool = True,
) -> Recogniser:
    """`Recogniser.load`.

    Example:
        >>> model = load("tiny.en")
        >>> model.transcribe([0.0] * 16000).text
        ''
    """
    return Recogniser.load(name_or_path, device, dtype, experts, compress=compress)


def _is_samples(audio: Any) -> bool:
    """Whether a list holds numbers, and not recordings."""
    return len(audio) > 0 and isinstance(audio[0], int | float)
