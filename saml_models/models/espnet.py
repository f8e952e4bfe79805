"""ESPnet's hybrid CTC/attention Conformer, as it is: decoding is ESPnet's own `Speech2Text`.

ESPnet is not installed with this package. What it imports for this, beside what is here already:
`pip install --no-deps espnet` and then typeguard humanfriendly librosa sentencepiece torch_complex
kaldiio configargparse einops opt_einsum hydra-core editdistance, and the torchaudio that belongs to
the installed torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saml_kernels.errors import SAMLError
from saml_models.models.conformer.speech_model import ConformerSpeechModel
from saml_models.models.interface import Clip, Outputs
from saml_models.models.own_words import BONUS, OwnWords

__all__ = ["EspnetSpeechModel", "load_espnet", "with_speech2text"]

# Frames that ESPnet's subsampling keeps of a mask, by its class: (frames dropped, step) in turn.
_SUBSAMPLING = {
    "Conv2dSubsampling": ((2, 2), (2, 2)),
    "Conv2dSubsampling6": ((2, 2), (4, 3)),
    "Conv2dSubsampling8": ((2, 2), (2, 2), (2, 2)),
}


def load_espnet(
    config: str | os.PathLike[str],
    weights: str | os.PathLike[str],
    device: str = "cpu",
    **decoding: Any,
) -> tuple[Any, Any]:
    """An ESPnet recogniser for `apply_saml`, `adapt`, `decode_clips` and `evaluate`.

    Args:
        config: ESPnet's `config.yaml` of the trained model.
        weights: its `.pth` file; read by ESPnet, which unpickles: take it from people you trust.
        device: where the model goes.
        decoding: options of `Speech2Text` (ctc_weight, lm_train_config, ...).

    Returns:
        `(model, speech2text)`, in the place of a model and its processor.

    Raises:
        SAMLError: ESPnet cannot be imported, a file is missing, or the model is of another kind.
    """
    for path in (config, weights):
        if not Path(path).is_file():
            raise SAMLError(f"{path}: no such file; expected ESPnet's config.yaml and a .pth")
    try:
        from espnet2.bin.asr_inference import Speech2Text
    except ImportError as error:
        raise SAMLError(f"ESPnet: not installed ({error}); see saml_models/espnet.py") from error
    return with_speech2text(
        Speech2Text(os.fspath(config), os.fspath(weights), device=device, **decoding)
    )


def with_speech2text(speech2text: Any) -> tuple[Any, Any]:
    """The model inside ESPnet's `Speech2Text`, and that itself as its processor.

    Raises:
        SAMLError: it is no hybrid of CTC and attention without further parts.
    """
    model = speech2text.asr_model
    extra = [p for p in ("preencoder", "postencoder") if getattr(model, p, None) is not None]
    hybrid = getattr(model, "ctc", None) is not None and getattr(model, "decoder", None) is not None
    if extra or not hybrid or getattr(model, "use_transducer_decoder", False):
        raise SAMLError(
            f"{type(model).__name__}: expected ESPnet's hybrid CTC/attention model with a frontend "
            "and an encoder alone"
        )
    return model.eval(), speech2text


class EspnetSpeechModel(ConformerSpeechModel):
    """The processor is a `Speech2Text`; networks are kept as ESPnet's own files."""

    model_type = "espnet"

    def __init__(self, network: Any, processor: Any) -> None:
        """Raise SAMLError where the `Speech2Text` decodes with another network."""
        super().__init__(network, processor)
        if processor.asr_model is not network:
            raise SAMLError("Speech2Text: decodes with another model; give each model its own")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first parameter; ESPnet's models have no `dtype`."""
        return next(self.network.parameters()).dtype

    @torch.no_grad()
    def prepare(self, clip: Clip) -> Tensor:
        """The frontend's features, normalised as the model does: [frames, mel bins]."""
        model = self.network
        speech = torch.from_numpy(clip)[None].to(self.processor.device)
        features, lengths = model._extract_feats(speech, torch.tensor([speech.shape[1]]))
        if model.normalize is not None:
            features, lengths = model.normalize(features, lengths)
        return features[0, : int(lengths)].cpu()

    def token_ids(self, text: str, language: str | None = None) -> tuple[list[int], int]:
        """Start, text in the token list's case, end."""
        model, processor = self.network, self.processor
        letters = "".join(model.token_list[:-1])
        letters = letters.replace("<blank>", "").replace("<unk>", "").replace("<space>", "")
        if letters == letters.upper():
            text = text.upper()
        elif letters == letters.lower():
            text = text.lower()
        ids = processor.converter.tokens2ids(processor.tokenizer.text2tokens(text))
        return [model.sos, *ids, model.eos], 1

    def outputs(self, features: Tensor, mask: Tensor, inputs: Tensor, kept: Tensor) -> Outputs:
        """The decoder's logits and the CTC branch's log-probabilities."""
        model = self.network
        encoded, lengths, _ = model.encoder(features, mask.sum(1))
        encoded = encoded[0] if isinstance(encoded, tuple) else encoded
        wanted = torch.zeros_like(inputs).flatten().index_fill(0, kept, 1).view_as(inputs)
        logits, _ = model.decoder(encoded, lengths, inputs, wanted.sum(1))
        ctc = model.ctc.log_softmax(encoded).float()
        return Outputs(logits.flatten(0, 1)[kept].float(), ctc, lengths, model.blank_id)

    def encoder_mask(self, mask: Tensor) -> Tensor:
        """Subsampled as the encoder does it, where that is one of ESPnet's usual ways."""
        for dropped, step in _SUBSAMPLING.get(type(self.network.encoder.embed).__name__, ()):
            mask = mask[:, :-dropped:step]
        return mask

    def own_words(self, phrases: Sequence[str], bonus: float = BONUS) -> OwnWords:
        """Refused: the search is ESPnet's."""
        raise SAMLError("own words: ESPnet's search has none; use a Whisper or a Canary")

    def decode(
        self,
        clips: Sequence[Clip],
        beam_size: int,
        language: str | None,
        own_words: OwnWords | None = None,
    ) -> list[str]:
        """ESPnet's joint beam search, clip by clip; its beam sizes are the user's own after it."""
        speech2text = self.processor
        search = speech2text.beam_search
        before = search.beam_size, search.pre_beam_size
        search.beam_size, search.pre_beam_size = beam_size, int(1.5 * beam_size)
        try:
            return [(speech2text(clip)[0][0] or "").strip() for clip in clips]
        finally:
            search.beam_size, search.pre_beam_size = before
