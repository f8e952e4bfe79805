"""Whisper as a `SpeechModel`: log-mel windows, prompt tokens, greedy and beam decoding."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    StoppingCriteriaList,
    WhisperConfig,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

from saml_kernels.errors import SAMLError
from saml_models.data.audio import SAMPLE_RATE
from saml_models.models.interface import (
    Clip,
    DecodingOptions,
    Outputs,
    Piece,
    Pieces,
    SpeechModel,
    causal_mask,
    context_of,
)
from saml_models.models.loops import is_loop, said_again
from saml_models.models.own_words import OwnWords, processors
from saml_models.models.targets import plain_tokens
from saml_models.models.token_limits import OwnLimits, token_limit
from saml_models.models.whisper.conformer import ConformerWhisper, ConformerWhisperConfig
from saml_models.models.whisper.greedy import can_decode, greedy
from saml_models.models.whisper.languages import (
    detect_language,
    is_multilingual,
    language_code,
    no_speech_probability,
)
from saml_models.models.whisper.loading import load_processor
from saml_models.models.whisper.longform import generate_segments, read_segments
from saml_models.models.whisper.recording import windows_of
from saml_models.models.whisper.timed import can_time, hear_windows, heard_at_once
from saml_models.models.whisper.windows import (
    FRAMES_PER_SECOND,
    FULL_WINDOW,
    audio_mask,
    audio_window,
    clip_window,
    log_mel,
    own_windows,
    window_frames,
)
from saml_models.runtime.prefetch import ahead

__all__ = ["ConformerWhisperSpeechModel", "WhisperSpeechModel"]

DETECTED = 5  # clips that say which language a speaker's are in
TOGETHER = 9000  # mel frames decoded together, padding included: memory goes by them


class WhisperSpeechModel(SpeechModel):
    """Clips of up to 30 s are heard in windows of their own: `clip_window`."""

    model_type = "whisper"
    network_class: ClassVar[Any] = WhisperForConditionalGeneration
    config_class: ClassVar[Any] = WhisperConfig

    def prepare(self, clip: Clip) -> Tensor:
        """The samples themselves: log-mel values depend on the window."""
        return torch.from_numpy(clip)

    def frames(self, prepared: Tensor) -> int:
        """Mel frames, 100 a second, at least one."""
        return max(1, len(prepared) * FRAMES_PER_SECOND // SAMPLE_RATE)

    def collate(
        self, prepared: Sequence[Tensor], margin: float | None, step: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Log-mel features [B, mel, T] and the mask of encoder frames [B, T / 2]."""
        lengths = [len(clip) for clip in prepared]
        frames = FULL_WINDOW if margin is None else window_frames(max(lengths), margin, step)
        features = log_mel(self.processor, [clip.numpy() for clip in prepared], frames)
        return features, audio_mask(lengths, frames)

    def mel(self, features: Tensor) -> Tensor:
        """The features themselves: they are [B, mel, T]."""
        return features

    def prompt_language(self, clips: Sequence[Clip]) -> str | None:
        """The language of most of a few clips; English-only models have no such token."""
        if not is_multilingual(self.network):
            return None
        few = clips[:: max(1, len(clips) // DETECTED)][:DETECTED]
        return Counter(map(self.detect_language, few)).most_common(1)[0][0]

    def token_ids(self, text: str, language: str | None = None) -> tuple[list[int], int]:
        """The prompt that decoding gives the decoder, text and <|endoftext|>."""
        tokenizer = self.processor.tokenizer
        prompt = list(tokenizer.prefix_tokens)
        if language is not None:
            named = [f"<|{language}|>", "<|transcribe|>", "<|notimestamps|>"]
            prompt = [prompt[0], *tokenizer.convert_tokens_to_ids(named)]
        words = plain_tokens(tokenizer, " " + text.strip())
        return [*prompt, *words, tokenizer.eos_token_id], len(prompt)

    def outputs(self, features: Tensor, mask: Tensor, inputs: Tensor, kept: Tensor) -> Outputs:
        """Logits at the kept positions only: the head is half of a small model."""
        with audio_window(self.network, features.shape[-1]):
            hidden = self.network.model(
                input_features=features,
                decoder_input_ids=inputs,
                decoder_attention_mask=causal_mask(inputs, features.dtype),
                use_cache=False,
            ).last_hidden_state
        return Outputs(self.network.proj_out(hidden.flatten(0, 1)[kept]).float())

    def encoder_mask(self, mask: Tensor) -> Tensor:
        """The mask itself: it is of encoder frames already."""
        return mask

    def decode(
        self,
        clips: Sequence[Clip],
        beam_size: int,
        language: str | None,
        own_words: OwnWords | None = None,
    ) -> list[str]:
        """Clips of up to 30 s, without timestamps, each with a window of its own."""
        model, context = self.network, self.context
        frames = [clip_window(model, len(clip)) for clip in clips]
        decode = _greedy if beam_size == 1 and can_decode(model) else partial(_beams, beam_size)
        texts: list[str] = []
        for part in _parts(frames):
            with context.narrowed(part):
                tokens = decode(
                    model, self.processor, clips[part], frames[part], language, own_words
                )
            texts += self.processor.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def no_speech(self, clip: Clip) -> float | None:
        """Of <|nospeech|> in the place of the first token."""
        return no_speech_probability(self.network, self.processor, clip)

    def language_code(self, language: str | None, task: str) -> str | None:
        """Of a code or a name; English-only models know one."""
        return language_code(self.network, language, task)

    def detect_language(self, clip: Clip) -> str:
        """The likeliest language token after the start."""
        return detect_language(self.network, self.processor, clip)

    def pieces(
        self,
        clip: Clip,
        language: str,
        options: DecodingOptions,
        on_progress: Callable[[float, float], None],
        on_text: Callable[[str], None],
    ) -> Pieces:
        """Windows with openai-whisper's fallbacks; with beams the whole recording at once."""
        if options.beam_size == 1 and can_time(self.network):
            return windows_of(
                self.network, self.processor, clip, language, options, on_progress, on_text
            )
        return self._alone(clip, language, options, on_progress)

    def hear(self, pieces: Sequence[Piece]) -> list[Any]:
        """Windows are decoded together."""
        if pieces[0].kind == "window":
            return hear_windows(self.network, self.processor, [piece.given for piece in pieces])
        return super().hear(pieces)

    def heard_at_once(self, pieces: Sequence[Piece]) -> int:
        """Windows by their length."""
        if pieces[0].kind == "window":
            return heard_at_once(self.network, [piece.given for piece in pieces])
        return super().heard_at_once(pieces)

    def _alone(
        self,
        clip: Clip,
        language: str,
        options: DecodingOptions,
        on_progress: Callable[[float, float], None],
    ) -> Pieces:
        if options.prompt or options.temperature:
            raise SAMLError("prompt, temperature: need greedy decoding; leave beam_size at 1")
        task, beams, words = options.task, options.beam_size, options.words

        def generate() -> list[dict[str, Any]]:
            return generate_segments(
                self.network, self.processor, clip, language, task, beams, words, on_progress,
                options.own_words,
            )  # fmt: skip

        parts = yield Piece("alone", clip, language, generate)
        return read_segments(parts, self.processor.tokenizer, len(clip) / SAMPLE_RATE, language)

    @classmethod
    def computed(cls, name: str) -> Callable[[torch.Size], Tensor] | None:
        """The encoder's positions are sinusoids."""
        return _sinusoids if name.endswith("encoder.embed_positions.weight") else None

    @classmethod
    def extent(cls, config: WhisperConfig) -> tuple[int, int]:
        """Layers of both sides, and the encoder's positions."""
        return config.encoder_layers + config.decoder_layers, config.max_source_positions

    @classmethod
    def load_processor(cls, folder: Path) -> WhisperProcessor:
        """Whisper's feature extractor and tokeniser."""
        return load_processor(folder)


class ConformerWhisperSpeechModel(WhisperSpeechModel):
    """A Whisper in all but the blocks of its encoder."""

    model_type = "conformer_whisper"
    network_class = ConformerWhisper
    config_class = ConformerWhisperConfig


def _sinusoids(shape: torch.Size) -> Tensor:
    """The encoder's positions, bit for bit: computed in float64, released as float16."""
    length, channels = shape
    rates = torch.exp(-math.log(10000) / (channels // 2 - 1) * torch.arange(channels // 2).double())
    angles = torch.arange(length).double().unsqueeze(1) * rates
    return torch.cat((angles.sin(), angles.cos()), dim=1).to(torch.float16).float()


def _parts(frames: Sequence[int]) -> Iterator[slice]:
    """Clips whose windows, the longest for each, make `TOGETHER` at most; or one clip."""
    start, longest = 0, 0
    for end, own in enumerate(frames):
        longest = max(longest, own)
        if end > start and longest * (end - start + 1) > TOGETHER:
            yield slice(start, end)
            start, longest = end, own
    yield slice(start, len(frames))


def _greedy(
    model: Any,
    processor: WhisperProcessor,
    clips: Sequence[Clip],
    frames: Sequence[int],
    language: str | None,
    own_words: OwnWords | None,
) -> list[list[int]]:
    # On a CPU clip by clip: what one leaves in the processor's caches the next finds there.
    most = 1 if model.device.type == "cpu" else len(clips)
    runs: list[list[int]] = []
    for i, own in enumerate(frames):
        if not runs or frames[runs[-1][0]] != own or len(runs[-1]) == most:
            runs.append([])
        runs[-1].append(i)

    def window(run: list[int]) -> tuple[Tensor, Tensor]:
        own = frames[run[0]]
        features = log_mel(processor, [clips[i] for i in run], own)
        return features, audio_mask([len(clips[i]) for i in run], own)

    limits = [token_limit(len(c)) for c in clips]
    return greedy(model, ahead(window, runs), limits, language, own_words)


def _beams(
    beam_size: int,
    model: Any,
    processor: WhisperProcessor,
    clips: Sequence[Clip],
    frames: Sequence[int],
    language: str | None,
    own_words: OwnWords | None,
) -> list[list[int]]:
    """Through transformers' `generate`, in one batch; a loop is said again without beams."""
    limits = [token_limit(len(c)) for c in clips]
    end = model.generation_config.eos_token_id
    generated = _generate(
        model, processor, clips, frames, language,
        num_beams=beam_size,
        max_new_tokens=max(limits),
        stopping_criteria=StoppingCriteriaList([OwnLimits(limits)]),
        **processors(own_words, beam_size),
    )  # fmt: skip
    texts = [[t for t in row if t < end] for row in generated.tolist()]
    context = context_of(model)
    for i, limit in enumerate(limits):
        if not is_loop(texts[i], limit):
            continue
        alone = slice(i, i + 1)
        one = (model, processor, clips[alone], frames[alone], language)
        with context.narrowed(alone):
            if can_decode(model):
                texts[i] = _greedy(*one, own_words)[0]
            else:
                generate = partial(_generate, *one, max_new_tokens=limit)
                texts[i] = said_again(generate, texts[i], limit, end, model.device)
    return texts


def _generate(
    model: Any,
    processor: WhisperProcessor,
    clips: Sequence[Clip],
    frames: Sequence[int],
    language: str | None,
    **options: Any,
) -> Any:
    """transformers' `generate`, each clip in a window of its own."""
    if is_multilingual(model):
        options |= {"language": language, "task": "transcribe"}
    longest = max(frames)
    features = log_mel(processor, list(clips), longest).to(model.device, model.dtype)
    mask = audio_mask([len(c) for c in clips], longest, model.device)
    with (
        context_of(model).batch(mask),
        audio_window(model, longest),
        own_windows(model, features, frames),
    ):
        return model.generate(features, **options)
