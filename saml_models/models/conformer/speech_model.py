"""The Conformer as a `SpeechModel`: normalised log-mel, masks, joint CTC and attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import soxr
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CanaryConfig, CanaryProcessor, StoppingCriteriaList
from transformers.models.canary.processing_canary import LANGUAGE_CODE_TO_NAME

from saml_kernels.errors import SAMLError
from saml_models.data.audio import MAX_SAMPLES, SAMPLE_RATE
from saml_models.models.conformer.joint import best_of, ctc_greedy
from saml_models.models.conformer.model import Conformer
from saml_models.models.interface import (
    Clip,
    DecodingOptions,
    Outputs,
    Piece,
    Pieces,
    SpeechModel,
    additive_mask,
    causal_mask,
)
from saml_models.models.loops import is_loop, once, said_again
from saml_models.models.own_words import OwnWords, processors
from saml_models.models.targets import plain_tokens
from saml_models.models.token_limits import OwnLimits
from saml_models.text.transcript import Segment

__all__ = ["ConformerSpeechModel"]

QUIET = SAMPLE_RATE // 5


class ConformerSpeechModel(SpeechModel):
    """Padding is masked, so a clip's features and text do not depend on its batch."""

    model_type = "canary"
    network_class: ClassVar[Any] = Conformer
    config_class: ClassVar[Any] = CanaryConfig

    def prepare(self, clip: Clip) -> Tensor:
        """Log-mel [frames, mel bins], normalised over the clip."""
        extractor = self.processor.feature_extractor
        rate = extractor.sampling_rate
        if rate != SAMPLE_RATE:
            clip = soxr.resample(clip, SAMPLE_RATE, rate)
        features = extractor([clip], sampling_rate=rate, return_tensors="pt")
        frames = int(features.attention_mask.sum())
        return features.input_features[0, : max(1, frames)].nan_to_num()

    def frames(self, prepared: Tensor) -> int:
        """Every frame of a prepared clip holds audio."""
        return len(prepared)

    def collate(
        self,
        prepared: Sequence[Tensor],
        margin: float | None,
        step: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """Features [B, T, mel bins] with zeros for padding, and the mask [B, T]."""
        features = torch.nn.utils.rnn.pad_sequence(list(prepared), batch_first=True).float()
        features = F.pad(features, (0, 0, 0, -features.shape[1] % step))
        lengths = torch.tensor([len(clip) for clip in prepared])
        return features, torch.arange(features.shape[1]) < lengths[:, None]

    def mel(self, features: Tensor) -> Tensor:
        """The features are [B, T, mel bins]."""
        return features.transpose(1, 2)

    def prompt(self, language: str | None) -> list[int]:
        """Canary's own prompt for transcription, or the token that begins every text."""
        processor = self.processor
        if not processor.chat_template:
            return [processor.tokenizer.bos_token_id]
        silence = np.zeros(SAMPLE_RATE, np.float32)
        ask: Any = processor.apply_transcription_request
        rate = processor.feature_extractor.sampling_rate  # transformers 5.17 checks that it is told
        asked = ask(silence, source_language=language or "en", sampling_rate=rate)
        return asked["decoder_input_ids"][0].tolist()

    def prompt_language(self, clips: Sequence[Clip]) -> str | None:
        """None has to be named: Canary's prompt has its own, ESPnet's model has no prompt."""
        return None

    def token_ids(self, text: str, language: str | None = None) -> tuple[list[int], int]:
        """Canary's prompt, the text and the end token."""
        tokenizer, prompt = self.processor.tokenizer, self.prompt(language)
        words = plain_tokens(tokenizer, text.strip())
        return [*prompt, *words, tokenizer.eos_token_id], len(prompt)

    def outputs(self, features: Tensor, mask: Tensor, inputs: Tensor, kept: Tensor) -> Outputs:
        """The decoder's logits and, where there is a CTC head, its log-probabilities."""
        model = self.network
        encoded = model.get_encoder()(features, attention_mask=mask)
        audio = encoded.attention_mask[:, None, None].bool().expand(-1, -1, inputs.shape[1], -1)
        hidden = model.get_decoder()(
            input_ids=inputs,
            attention_mask=causal_mask(inputs, features.dtype),
            encoder_hidden_states=encoded.last_hidden_state,
            encoder_attention_mask=additive_mask(audio, features.dtype),
            use_cache=False,
        ).last_hidden_state
        logits = model.proj_out(hidden.flatten(0, 1)[kept]).float()
        if not hasattr(model, "ctc_head"):
            return Outputs(logits)
        ctc = model.ctc_head(encoded.last_hidden_state).float().log_softmax(-1)
        return Outputs(logits, ctc, encoded.attention_mask.sum(-1), model.config.pad_token_id)

    def encoder_mask(self, mask: Tensor) -> Tensor:
        """Subsampled as the encoder does it."""
        config = self.network.config.encoder_config
        lengths, longest = mask.sum(-1), mask.shape[1]
        kernel, stride = config.subsampling_conv_kernel_size, config.subsampling_conv_stride
        for _ in range(config.subsampling_factor.bit_length() - 1):
            odd = (kernel - 1) // 2 * 2 - kernel
            lengths, longest = (lengths + odd) // stride + 1, (longest + odd) // stride + 1
        return torch.arange(longest, device=mask.device) < lengths[:, None]

    def decode(
        self,
        clips: Sequence[Clip],
        beam_size: int,
        language: str | None,
        own_words: OwnWords | None = None,
    ) -> list[str]:
        """The best of the decoder's texts and, where there is a CTC head, of its own.

        A CTC head cannot run into a loop: its text, and the loop said once, stand in for it.
        """
        model, context = self.network, self.context
        features, mask = self.inputs(clips, None)
        prompt = self.prompt(language)
        with context.batch(self.encoder_mask(mask)):
            encoded = model.get_encoder()(features, attention_mask=mask)
            frames = encoded.attention_mask.sum(-1)
            limits = (frames + 1).tolist()
            tokens = model.generate(
                encoder_outputs=copy(encoded),  # it repeats them for its beams, in place
                decoder_input_ids=torch.tensor([prompt] * len(clips), device=model.device),
                num_beams=beam_size,
                num_return_sequences=beam_size,
                max_new_tokens=int(frames.max()) + 1,
                stopping_criteria=StoppingCriteriaList([OwnLimits(limits)]),
                **processors(own_words, beam_size),
            )
            special = {model.config.pad_token_id, model.config.eos_token_id}
            texts = [
                [t for t in row if t not in special] for row in tokens[:, len(prompt) :].tolist()
            ]
            looped = [is_loop(text, limits[i // beam_size]) for i, text in enumerate(texts)]
            whole = [once(t) if loop else t for t, loop in zip(texts, looped, strict=True)]
            candidates = [whole[i : i + beam_size] for i in range(0, len(whole), beam_size)]
            if hasattr(model, "ctc_head"):
                ctc = model.ctc_head(encoded.last_hidden_state).float().log_softmax(-1)
                for row, alone in enumerate(ctc_greedy(ctc, frames, model.config.pad_token_id)):
                    candidates[row].append(alone)
                chosen = best_of(candidates, model, encoded, ctc, frames, prompt, own_words)
            else:
                chosen = [row[0] for row in candidates]
                for i in range(len(chosen)):
                    if looped[i * beam_size]:
                        generate = partial(
                            model.generate,
                            encoder_outputs=_row(encoded, i),
                            decoder_input_ids=torch.tensor([prompt], device=model.device),
                            max_new_tokens=limits[i],
                        )
                        loop, end = texts[i * beam_size], model.config.eos_token_id
                        with context.narrowed(slice(i, i + 1)):
                            chosen[i] = said_again(generate, loop, limits[i], end, model.device)
        found = self.processor.batch_decode(chosen, skip_special_tokens=True)
        return [text.strip() for text in found]

    def no_speech(self, clip: Clip) -> float | None:
        """None: a Canary has no token for silence."""
        return None

    def language_code(self, language: str | None, task: str) -> str:
        """English unless asked otherwise; only Canary's own checkpoints know others."""
        if task != "transcribe":
            raise SAMLError(f"task: {task!r}; a Conformer knows 'transcribe' only")
        if language is None:
            return "en"
        names = {name.lower(): code for code, name in LANGUAGE_CODE_TO_NAME.items()}
        asked = language.strip().lower()
        code = asked if asked in LANGUAGE_CODE_TO_NAME else names.get(asked)
        if code is None or (code != "en" and hasattr(self.network, "ctc_head")):
            raise SAMLError(f"language: this model does not know {language!r}; expected en")
        return code

    def detect_language(self, clip: Clip) -> str:
        """Never asked: `language_code` always knows."""
        return "en"

    def pieces(
        self,
        clip: Clip,
        language: str,
        options: DecodingOptions,
        on_progress: Callable[[float, float], None],
        on_text: Callable[[str], None],
    ) -> Pieces:
        """One segment for each stretch of up to 30 s between quiet places."""
        for name, asked in (
            ("word times", options.words),
            ("prompt", options.prompt),
            ("temperature", options.temperature),
        ):
            if asked:
                raise SAMLError(f"{name}: a Conformer has none; use a Whisper")
        parts: list[Segment] = []
        for start, end in _stretches(clip):
            text = yield Piece("plain", clip[start:end], language)
            if text:
                times = start / SAMPLE_RATE, end / SAMPLE_RATE
                parts.append(Segment(len(parts), *times, text))
                on_text(" ".join(s.text for s in parts))
            on_progress(end / SAMPLE_RATE, len(clip) / SAMPLE_RATE)
        return " ".join(s.text for s in parts), parts

    @classmethod
    def computed(cls, name: str) -> None:
        """Nothing: positions are no parameters."""

    @classmethod
    def extent(cls, config: CanaryConfig) -> tuple[int, int]:
        """Layers of both sides, and the decoder's positions."""
        encoder: Any = config.encoder_config
        decoder: Any = config.decoder_config
        layers = encoder.num_hidden_layers + decoder.num_hidden_layers
        return layers, decoder.max_position_embeddings

    @classmethod
    def load_processor(cls, folder: Path) -> CanaryProcessor:
        """Canary's feature extractor and tokeniser."""
        return CanaryProcessor.from_pretrained(folder, local_files_only=True)


def _row(encoded: Any, row: int) -> Any:
    """The encoder's output for one clip of a batch."""
    one = copy(encoded)
    for name in ("last_hidden_state", "attention_mask"):
        one[name] = encoded[name][row : row + 1]
    return one


def _stretches(clip: Clip) -> list[tuple[int, int]]:
    """Cuts of at most 30 s, each at the quietest fifth of a second of the window's second half."""
    cuts, start = [], 0
    while len(clip) - start > MAX_SAMPLES:
        middle = start + MAX_SAMPLES // 2
        part = clip[middle : start + MAX_SAMPLES]
        blocks = part[: len(part) // QUIET * QUIET].reshape(-1, QUIET)
        end = middle + int(np.square(blocks).mean(1).argmin()) * QUIET + QUIET // 2
        cuts.append((start, end))
        start = end
    return [*cuts, (start, len(clip))]
