"""What properties.py asks with: distances, graphs, poisoned memory, small models."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu.checks import worst_row
from saml_kernels import SAMLConfig, SAMLLinear
from saml_kernels.cuda import capture

__all__ = [
    "features_of", "gates_profiles", "graph_of", "layer_of", "near", "off", "overwrite_free_memory",
    "small_model", "unwritten_is_nan",
]  # fmt: skip


def off(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, infinite where it is not finite."""
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    return error if error == error else float("inf")


def near(name: str, found: Tensor, expected: Tensor, tolerance: float) -> float:
    """The relative error of all, and of the worst row at most five times the tolerance."""
    error = off(found, expected)
    if not error < tolerance:
        raise AssertionError(f"{name} is off by {error:.1e}")
    if found.dim() > 1:
        worst = worst_row(found, expected.double())
        if not worst < 5 * tolerance:
            raise AssertionError(f"{name} is off by {worst:.1e} in a row")
    return error


@contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """Within the block what a kernel forgets to write is NaN, not what happened to lie there."""
    deterministic: Any = torch.utils.deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def graph_of(
    run: Callable[[], list[Tensor]], device: torch.device, pool: Any = None
) -> tuple[list[Tensor], Callable[[], None]]:
    """What `run` gives, captured after it ran twice, and what replays it."""
    for _ in range(2):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return capture(run, device, pool)
    found = run()

    def again() -> None:
        for old, new in zip(found, run(), strict=True):
            old.copy_(new)

    return found, again


def overwrite_free_memory(device: torch.device) -> None:
    """What is read after it was freed is not what it was."""
    held = [torch.full((1 << 18,), 7, dtype=torch.int32, device=device) for _ in range(32)]
    held += [torch.full((1 << 10,), 7, dtype=torch.int32, device=device) for _ in range(256)]
    del held


def layer_of(
    width: int, device: torch.device, config: SAMLConfig | None = None, dtype: Any = None
) -> SAMLLinear:
    """A layer whose experts and router say something."""
    linear = nn.Linear(width, width, device=device)
    layer = SAMLLinear.from_linear(linear, config or SAMLConfig(expert_init="lora"))
    speak(layer)
    return layer.to(dtype) if dtype else layer


@torch.no_grad()
def speak(module: nn.Module, size: float = 1.0) -> None:
    """Random routers and second factors, which begin at zero."""
    for name, parameter in module.named_parameters():
        if name.endswith(("lora_b", "router.weight")):
            parameter.normal_(std=size * parameter.shape[-1] ** -0.5)


def small_model(device: torch.device, compress: bool = True) -> Any:
    """A Whisper with random weights: d = 128, two layers a side, windows of two seconds."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    from saml_models.compress.apply import apply_saml

    config = WhisperConfig(
        vocab_size=512, num_mel_bins=80, d_model=128, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=512,
        decoder_ffn_dim=512, max_source_positions=100, max_target_positions=64,
        decoder_start_token_id=1, bos_token_id=2, eos_token_id=2, pad_token_id=2,
        suppress_tokens=None, begin_suppress_tokens=None, init_std=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = WhisperForConditionalGeneration(config)
    model.to(device).eval()
    if compress:
        apply_saml(model, SAMLConfig(expert_init="lora"))
        speak(model, 0.1)  # with more, rounding to bfloat16 grows from layer to layer
    return model


def features_of(model: Any, batch: int) -> Tensor:
    """Random log-mel features in the dtype of the model."""
    return torch.randn(batch, 80, 200, device=model.device).to(model.dtype)


def gates_profiles(model: Any, count: int = 2) -> list[Any]:
    """Profiles whose gates differ much; the model is left without any."""
    from saml_models.speakers.profile import SpeakerProfile

    routers, made = model.saml.routers.values(), []
    for number in range(count):
        for router in routers:
            router.offset = torch.randn(4, device=model.device) * 3
        made.append(SpeakerProfile.of_gates(model, speaker=str(number)))
    for router in routers:
        router.offset = None
    return made
