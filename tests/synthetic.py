"""Small models with random weights, for tests that need the shape of a model but not its ears."""

from __future__ import annotations

import math
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CanaryConfig,
    CanaryProcessor,
    ParakeetFeatureExtractor,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from saml_models.models.conformer.model import Conformer
from saml_models.models.whisper.conformer import ConformerWhisper, new_branches
from saml_models.models.whisper.windows import audio_window, log_mel, window_frames

__all__ = ["END", "divergence", "small_conformer", "small_conformer_whisper", "small_whisper"]

PAD, BEGIN, END, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
VOCABULARY = 40


def small_whisper(seed: int = 0, layers: int = 1, vocabulary: int = 300) -> torch.nn.Module:
    """d = 64, one layer a side, weights large enough that experts and errors show in the logits."""
    torch.manual_seed(seed)
    config = WhisperConfig(
        vocab_size=vocabulary,
        num_mel_bins=80,
        d_model=64,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_source_positions=1500,
        max_target_positions=448,
        decoder_start_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=2,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        init_std=0.1,
    )
    return WhisperForConditionalGeneration(config).eval()


def small_conformer_whisper(seed: int = 0, layers: int = 1, vocabulary: int = 300) -> Any:
    """`small_whisper` with Conformer blocks whose new branches say something."""
    model = ConformerWhisper.grown_from(
        small_whisper(seed, layers, vocabulary), conv_kernel_size=7, half_step_ffn_dim=96
    )
    with torch.no_grad():
        for parameter in new_branches(model).values():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.5 / math.sqrt(parameter[0].numel()))
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def small_conformer(seed: int = 0) -> tuple[Any, Any]:
    """A random Conformer with a CTC head, and its processor (12 kHz): d = 64, two layers and one.

    Weights are large enough that errors show in the logits.
    """
    torch.manual_seed(seed)
    model = Conformer(_conformer_config()).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5 / math.sqrt(parameter[0].numel()))
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    features = ParakeetFeatureExtractor(
        feature_size=64, sampling_rate=12000, hop_length=180, win_length=360
    )
    return model, CanaryProcessor(features, _tokenizer())


def _conformer_config() -> CanaryConfig:
    special: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return CanaryConfig(  # type: ignore[call-arg]
        vocab_size=VOCABULARY,
        decoder_start_token_id=1,
        ctc_head=True,
        encoder_config={
            "model_type": "parakeet_encoder",
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 128,
            "conv_kernel_size": 15,
            "subsampling_factor": 4,
            "subsampling_conv_channels": 32,
            "num_mel_bins": 64,
            "scale_input": False,
            "layerdrop": 0.0,
        },
        decoder_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            **special,
        },
        **special,
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    """Byte-pair encoding of lower-case words; marks other than letters are dropped."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex("[^a-z' ]+"), " "),
            normalizers.Replace(Regex(" +"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[PAD, BEGIN, END, UNKNOWN], show_progress=False
    )
    text = ["the quick brown fox jumps over the lazy dog", "she sells sea shells"]
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        unk_token=UNKNOWN,
    )


@torch.no_grad()
def divergence(model: Any, other: Any, processor: Any, clips: Any) -> float:
    """Mean KL(model || other) over the text's tokens."""
    total: list[torch.Tensor] = []
    for clip in clips:
        frames = window_frames(len(clip.samples), 10.0)
        found = []
        for network in (model, other):
            with audio_window(network, frames):
                logits = network(
                    input_features=log_mel(processor, [clip.samples], frames),
                    decoder_input_ids=torch.tensor([clip.tokens[:-1]]),
                    use_cache=False,
                ).logits[0, clip.prompt - 1 :]
            found.append(logits.log_softmax(dim=-1))
        total.append((found[0].exp() * (found[0] - found[1])).sum(dim=-1))
    return float(torch.cat(total).mean())
