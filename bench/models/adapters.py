"""Ways to make a Whisper trainable, for training_step.py and adaptation.py; each in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bench.layers.peers import GatedPeftLinear, bitsandbytes_linear
from saml_kernels import SAMLConfig
from saml_models.compress.apply import apply_saml

TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
EXPERTS, RANK = 4, 16


def replaced(model: Any, make: Callable[[nn.Linear], nn.Module]) -> Any:
    """Every linear layer of the encoder and decoder blocks, by `make`."""
    for parent in list(model.model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name in TARGETS:
                setattr(parent, name, make(child))
    return model


def saml(model: Any, dtype: torch.dtype, rank: int = RANK) -> Any:
    """Everything in NF4, E gated experts on every linear layer."""
    apply_saml(model, SAMLConfig(num_experts=EXPERTS, rank=rank, expert_init="lora"))
    return model


def peft_lora(model: Any, dtype: torch.dtype, rank: int = RANK) -> Any:
    """One LoRA of rank E r on a model that is not quantised."""
    from peft import LoraConfig, get_peft_model

    together = EXPERTS * rank
    config = LoraConfig(r=together, lora_alpha=together, target_modules=TARGETS)
    return get_peft_model(model, config)


def qlora(model: Any, dtype: torch.dtype, rank: int = RANK) -> Any:
    """The same on bitsandbytes NF4 layers."""
    base = replaced(model, lambda linear: bitsandbytes_linear(linear, dtype))
    return peft_lora(base, dtype, rank)


def gated_peft(model: Any, dtype: torch.dtype, rank: int = RANK) -> Any:
    """E LoRAs under a token router on bitsandbytes NF4 layers, as a user would write it."""
    model.requires_grad_(False)

    def make(linear: nn.Linear) -> nn.Module:
        return GatedPeftLinear(linear, EXPERTS, rank, dtype, routed=True)

    return replaced(model, make)


def all_parameters(model: Any, dtype: torch.dtype, rank: int = RANK) -> Any:
    """No adapter: everything is trained."""
    return model.requires_grad_(True)


ADAPTERS: dict[str, Callable[..., Any]] = {
    "saml": saml,
    "bitsandbytes + gated PEFT": gated_peft,
    "bitsandbytes + PEFT LoRA": qlora,
    "PEFT LoRA": peft_lora,
    "all parameters": all_parameters,
}


class Trainer:
    """A step in PyTorch's own words: forward, backward, AdamW; bfloat16 autocast on a GPU."""

    def __init__(self, model: Any, device: torch.device, learning_rate: float = 5e-4) -> None:
        self.model, self.device = model, device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.parameters, learning_rate)

    def step(self, features: torch.Tensor, labels: torch.Tensor) -> float:
        """Features [B, mel bins, 3000], labels [B, L] with -100 for none; the loss."""
        with torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda"):
            loss = self.model(input_features=features, labels=labels).loss
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return float(loss.detach())
