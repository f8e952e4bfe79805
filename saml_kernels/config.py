"""`SAMLConfig`: what surrounds a frozen layer, as plain data that goes to JSON and back."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from saml_kernels.errors import SAMLError
from saml_kernels.quantization.tensor import BLOCK_SIZES, FORMATS

__all__ = ["SAMLConfig"]

_CHOICES: dict[str, tuple[str | int, ...]] = {
    "format": FORMATS,
    "block_size": BLOCK_SIZES,
    "router": ("token", "utterance", "speaker", "shared"),
    "mix": ("sum", "merged"),
    "targets": ("all", "attention", "encoder", "decoder"),
    "expert_init": ("lora", "loftq"),
    "expert_format": ("float16", "int8"),
}


@dataclass(frozen=True)
class SAMLConfig:
    """A low-bit base with a gated mixture of LoRA experts.

    Attributes:
        num_experts: E; 0 quantises without experts.
        rank: r of one expert; 4 x 4 keeps Whisper tiny.en and base at 7.2x smaller than float32.
        alpha: the experts' output is scaled by alpha / rank.
        top_k: keep only the k largest gates of a token or clip (renormalised); None keeps all.
        router: "token" (softmax of a linear map of the token), "utterance" (of the clip's mean,
            padding left out; the decoder reads the encoder's output), "speaker" (a learnt vector),
            "shared" (the authors' three routers; Whisper only).
        mix: "sum" is sum_e g_e B_e A_e; "merged" is (sum_e g_e B_e)(sum_e g_e A_e), which needs
            one gate vector per clip.
        format, block_size, double_quant: of the frozen weight; see `saml_kernels.quantize`.
        targets: which linear layers get experts, "all", the "attention" projections or those of the
            "encoder" or "decoder" alone; every layer is quantised either way.
        expert_init: "lora" (random A, zero B) or "loftq" (the low-rank part of the quantisation
            error, arXiv 2310.08659).
        dropout: probability, on the experts' input, while training.
        balance: weight of the load-balancing term (arXiv 2101.03961, equation 4); 0 is off.
        expert_format: how experts and routers are stored on disk.
        temperature: of the router's softmax.
    """

    num_experts: int = 4
    rank: int = 4
    alpha: float = 16.0
    top_k: int | None = None
    router: Literal["token", "utterance", "speaker", "shared"] = "token"
    mix: Literal["sum", "merged"] = "sum"
    format: Literal["nf4", "fp4", "int8", "int4"] = "nf4"
    block_size: int = 64
    double_quant: bool = True
    targets: Literal["all", "attention", "encoder", "decoder"] = "all"
    expert_init: Literal["lora", "loftq"] = "loftq"
    dropout: float = 0.0
    balance: float = 0.0
    expert_format: Literal["float16", "int8"] = "int8"
    temperature: float = 1.0

    def __post_init__(self) -> None:  # noqa: D105
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise SAMLError(
                    f"{name}: {value!r}; expected one of {', '.join(map(str, choices))}"
                )
        if self.num_experts < 0 or self.rank < 1:
            raise SAMLError(
                f"num_experts={self.num_experts}, rank={self.rank}; expected at least 0 and 1"
            )
        if self.top_k is not None and not 1 <= self.top_k <= max(1, self.num_experts):
            raise SAMLError(f"top_k: {self.top_k}; expected 1..{self.num_experts} or None")
        if not 0.0 <= self.dropout < 1.0:
            raise SAMLError(f"dropout: {self.dropout}; expected 0 <= dropout < 1")
        for name in ("alpha", "balance"):
            if not math.isfinite(getattr(self, name)):
                raise SAMLError(f"{name}: {getattr(self, name)}; expected a finite number")
        if not 0.0 < self.temperature < math.inf:
            raise SAMLError(f"temperature: {self.temperature}; expected more than 0")
        if self.router == "shared" and self.targets in ("encoder", "decoder"):
            raise SAMLError(
                f"targets={self.targets!r}: router='shared' has routers in both halves; use "
                "targets='all' or 'attention', or another router"
            )
        if self.mix == "merged" and self.router == "token":
            raise SAMLError(
                "mix='merged' needs one gate vector per clip: use router='utterance', 'speaker' "
                "or 'shared'"
            )

    @classmethod
    def paper(cls) -> SAMLConfig:
        """The authors' setting (repository qmgzhao/SAML): attention linears, E = 10, r = 1."""
        return cls(
            num_experts=10,
            rank=1,
            alpha=4.0,
            router="shared",
            mix="merged",
            targets="attention",
            expert_init="lora",
            dropout=0.2,
            expert_format="float16",
        )

    @property
    def scaling(self) -> float:
        """s = alpha / rank."""
        return self.alpha / self.rank

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SAMLConfig:
        """The inverse of `to_dict`; an unknown key or a value of the wrong type is refused."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for name, value in values.items():
            if name not in fields:
                raise SAMLError(f"SAML configuration: unknown key {name!r}")
            kind = type(fields[name].default)
            allowed = {float: (float, int), type(None): (int, type(None))}.get(kind, (kind,))
            if type(value) not in allowed:  # not isinstance: True would pass for an int
                raise SAMLError(f"SAML configuration: {name}={value!r} has the wrong type")
        return cls(**values)
