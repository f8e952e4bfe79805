"""Stage 0: a small Conformer from scratch, tokeniser and all, by the loop that adapts it later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import (
    CanaryConfig,
    CanaryProcessor,
    ParakeetFeatureExtractor,
    PreTrainedTokenizerFast,
)

from saml_kernels.errors import SAMLError
from saml_models.adaptation import MAX_SECONDS
from saml_models.audio import SAMPLE_RATE
from saml_models.batches import Sample
from saml_models.conformer import Conformer
from saml_models.corpora import Utterance
from saml_models.devices import on_device
from saml_models.families import family_of
from saml_models.targets import check_target
from saml_models.training import TrainingOptions, TrainingReport, fit

__all__ = ["BASE", "Shape", "train_base", "train_tokenizer"]

# What made the model that ships with the package; see README, "The Conformer".
BASE = TrainingOptions(
    learning_rate=1.5e-3,
    epochs=36,
    batch_seconds=45.0,
    max_batch=12,
    weight_decay=0.05,
    clip_norm=5.0,
    warmup=0.03,
    flat_start=4,
    freq_masks=2,
    freq_width=16,
    time_masks=5,
    time_share=0.05,
    average=0.2,
    ctc=0.5,
    smoothing=0.1,
    corrupt=0.1,
    keep_prepared=True,
    checkpoint_every=200,
)

PAD, BEGIN, END, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
# 12 kHz: nothing above 6 kHz, where low-bitrate recordings hold nothing. 15 ms a frame.
FEATURES = {"feature_size": 64, "sampling_rate": 12000, "hop_length": 180, "win_length": 360}


@dataclass(frozen=True)
class Shape:
    """Sizes of a Conformer: width, layers and feed-forward width of both sides, tokens."""

    width: int = 192
    heads: int = 4
    encoder_layers: int = 5
    decoder_layers: int = 1
    feed_forward: int = 384
    kernel: int = 15
    vocabulary: int = 128
    dropout: float = 0.1

    def config(self) -> CanaryConfig:
        """transformers' configuration of this shape, with a CTC head."""
        special: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        return CanaryConfig(  # type: ignore[call-arg]
            vocab_size=self.vocabulary,
            decoder_start_token_id=1,
            ctc_head=True,
            encoder_config={
                "model_type": "parakeet_encoder",
                "hidden_size": self.width,
                "num_hidden_layers": self.encoder_layers,
                "num_attention_heads": self.heads,
                "intermediate_size": self.feed_forward,
                "conv_kernel_size": self.kernel,
                "subsampling_factor": 4,
                "subsampling_conv_channels": 32,
                "num_mel_bins": FEATURES["feature_size"],
                "scale_input": False,
                "dropout": self.dropout,
                "activation_dropout": self.dropout,
                "attention_dropout": self.dropout,
                "layerdrop": 0.0,
            },
            decoder_config={
                "vocab_size": self.vocabulary,
                "hidden_size": self.width,
                "intermediate_size": self.feed_forward,
                "num_hidden_layers": self.decoder_layers,
                "num_attention_heads": self.heads,
                "num_key_value_heads": self.heads,
                "head_dim": self.width // self.heads,
                "attention_dropout": self.dropout,
                **special,
            },
            **special,
        )


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-pair encoding (arXiv 1508.07909) of lower-case words; other marks are dropped."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex("[^a-z' ]+"), " "),
            normalizers.Replace(Regex(" +"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[PAD, BEGIN, END, UNKNOWN], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocabulary:
        raise SAMLError(
            f"vocabulary: the text gives {tokenizer.get_vocab_size()} tokens, fewer than "
            f"{vocabulary}; give more text, or a smaller vocabulary (`Shape`)"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        unk_token=UNKNOWN,
    )


def train_base(
    utterances: Sequence[Utterance],
    options: TrainingOptions | None = None,
    shape: Shape | None = None,
    *,
    device: str | torch.device = "cpu",
    checkpoint: Path | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
) -> tuple[Conformer, CanaryProcessor, TrainingReport]:
    """Train a Conformer from scratch on joint CTC and attention.

    Args:
        utterances: each with text; what is longer than 30 s is left out.
        options: `BASE` unless given.
        shape: of the model; `Shape()` unless given.
        device: where it is trained.
        checkpoint: as for `training.fit`.
        on_step: called with (steps done, steps in all, loss).

    Raises:
        SAMLError: nothing to learn from, too little text for the vocabulary, or bad audio.
    """
    options, shape = options or BASE, shape or Shape()
    samples, names = [], []
    for utterance in utterances:
        if not utterance.text.strip():
            raise SAMLError(f"{utterance.id}: has no text to learn from; give its transcript")
        seconds = len(utterance.load()) / SAMPLE_RATE
        if seconds <= MAX_SECONDS:
            samples.append(Sample(utterance.load, seconds, utterance.text))
            names.append(utterance.id)
    tokenizer = train_tokenizer([s.text for s in samples], shape.vocabulary)
    processor = CanaryProcessor(ParakeetFeatureExtractor(**FEATURES), tokenizer)
    torch.manual_seed(options.seed)
    model = Conformer(shape.config())
    for name, sample in zip(names, samples, strict=True):
        check_target(model, name, family_of(model).token_ids(processor, sample.text)[0])
    _initialise(model)
    on_device(model, device)
    report = fit(model, processor, samples, options, checkpoint, on_step)
    return model.eval(), processor, report


def _initialise(model: Conformer) -> None:
    """PyTorch's own initial weights, by each layer's width.

    transformers draws all with deviation 0.02: four narrow layers later nothing is left of the
    spectrogram, and the first norm's epsilon drowns it.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) and module is not model.proj_out:
            module.reset_parameters()
