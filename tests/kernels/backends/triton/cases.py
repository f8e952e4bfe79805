"""Random calls of the operator and the float64 truth for them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import Tensor

from saml_kernels.backends import reference
from saml_kernels.backends.triton.launcher import interpreting
from saml_kernels.quantization.tensor import QuantizedTensor, quantize

EXAMPLES = int(os.environ.get("FUZZ", "20"))  # `make fuzz N=...` runs more
many = settings(
    max_examples=EXAMPLES, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
NAMES = ("y", "dx", "da", "db", "dgates")
GATINGS = ("softmax", "fixed", "signed")
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass
class Case:
    """Arguments of one call; see `saml_linear`."""

    x: Tensor
    dy: Tensor
    weight: QuantizedTensor
    lora_a: Tensor
    lora_b: Tensor
    gates: Tensor
    bias: Tensor | None
    speakers: Tensor | None
    scaling: float

    @property
    def experts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.lora_a, self.lora_b, self.gates


def make_case(
    seed: int, m: int, n: int, k: int, experts: int, rank: int, *,
    format: str = "nf4", dtype: torch.dtype = torch.float32, block_size: int = 64,
    double_quant: bool = True, top_k: int | None = None, speakers: int | None = None,
    bias: bool = True, gating: str = "softmax", device: str = "cpu",
) -> Case:  # fmt: skip
    """Random arguments; `gating` is one of `GATINGS`, and `top_k` leaves so many gates of a row."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(dtype).to(device)

    weight = quantize(torch.randn(n, k, generator=g), format, block_size, double_quant).to(device)
    gates = torch.randn(m, experts, generator=g)  # "signed"
    if gating == "fixed":
        gates = gates[:1].expand(m, experts).contiguous()
    if gating != "signed":
        gates = torch.softmax(gates, -1)
    if top_k is not None and experts:
        kept = gates.abs().topk(min(top_k, experts), -1).indices
        gates = torch.zeros_like(gates).scatter(-1, kept, gates.gather(-1, kept))
    lead = () if speakers is None else (speakers,)
    index = None
    if speakers is not None:
        index = torch.randint(0, speakers, (m,), generator=g, dtype=torch.int32).to(device)
    return Case(
        normal(m, k), normal(m, n), weight,
        normal(*lead, experts, rank, k, scale=k**-0.5),
        normal(*lead, experts, n, rank, scale=max(1, rank) ** -0.5),
        gates.to(dtype).to(device), normal(n) if bias else None, index, 0.75,
    )  # fmt: skip


def truth(case: Case, absolute: bool = False) -> tuple[Tensor, ...]:
    """y, dx, da, db, dgates in float64 by autograd, speaker by speaker.

    With `absolute`, of the same call with every number made positive: the size of what is summed,
    which rounding errors go by where the sum itself cancels.
    """

    def wide(tensor: Tensor) -> Tensor:
        value = tensor.detach().double().cpu()
        return value.abs() if absolute else value

    dense = wide(case.weight.dequantize())
    leaves = [wide(t).requires_grad_() for t in (case.x, *case.experts)]
    x, a, b, g = leaves
    bias = None if case.bias is None else wide(case.bias)
    if case.speakers is None:
        y = reference.saml_linear_reference(x, dense, a, b, g, bias, case.scaling)
    else:
        parts = torch.zeros(len(x), len(dense), dtype=torch.float64)
        index = case.speakers.cpu().long()
        y = parts + 0 * x.sum()
        for s in range(len(a)):
            own = reference.saml_linear_reference(x, dense, a[s], b[s], g, bias, case.scaling)
            y = torch.where((index == s).unsqueeze(1), own, y)
    y.backward(wide(case.dy))
    return y.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves)


def assert_close(
    found: Tensor, expected: Tensor, tolerance: float, name: str, size: Tensor | None = None
) -> None:
    """Root mean square of the error against that of `size`, or of what is expected."""
    assert found.shape == expected.shape, name
    found = found.double().cpu()
    assert torch.isfinite(found).all(), f"{name}: not finite"
    scale = (expected if size is None else size).norm().clamp(min=1e-9)
    error = (found - expected).norm() / scale
    assert error < tolerance, f"{name}: relative error {error:.2e}, allowed {tolerance:.0e}"


def bands() -> list[tuple[int, int]]:
    """The first and the last M of each band of the default table; the last one is cut."""
    table = json.loads(
        (files("saml_kernels.backends.triton") / "tables" / "default.json").read_text()
    )
    rules = [row for way in ("forward", "backward") for row in table[way]]
    ends = {row["max_m"] for row in rules if "max_m" in row}
    ends |= {row["min_m"] - 1 for row in rules if "min_m" in row}
    starts = [0, *sorted(ends)]
    return [(a + 1, b) for a, b in zip(starts, [*sorted(ends), max(ends) + 40], strict=True)]


# N and K of a real layer where kernels are compiled, and pipelined; the interpreter takes long.
REAL_WIDTH = 128 if interpreting() else 512
LAYOUTS = ("whole", "whole", "offset", "strided")


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers one element past an aligned address ("offset"), or every other one."""
    *lead, last = tensor.shape
    if layout == "offset":
        return tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)
    if layout == "strided":
        return tensor.new_empty(*lead, 2 * last)[..., ::2].copy_(tensor)
    return tensor


def draw_case(draw: Any, device: str = "cpu") -> Case:
    """A case of any format and dtype; `draw` is that of hypothesis.

    Half of them have sizes that real layers have (multiples of 64, aligned addresses), with M in
    one of the bands of the default table; the others have any size at all, and any layout.
    """
    real = draw(st.booleans(), "real sizes")
    if real:
        first, last = draw(st.sampled_from(bands()), "band")
        m = draw(st.integers(first, min(last, first + 40)), "M")
        # The interpreter takes long over many tiles.
        widths = [w for w in (64, 128, 256, 512) if m * w <= 1 << 14] or [64]
        n, k = (draw(st.sampled_from(widths), name) for name in "NK")
        sizes = [(1, 16), (4, 16), (16, 4), (2, 32), (1, 64), (8, 16)]
        experts, rank = draw(st.sampled_from(sizes if m <= 300 else sizes[:5]), "E, r")
        block_size = 64
    else:
        experts = draw(st.integers(1, 16), "E")
        rank = draw(st.integers(1, 64), "r")
        # Nor are many columns quick.
        m = draw(st.integers(0, 200 if experts * rank <= 256 else 40), "M")
        block_size = draw(st.sampled_from((32, 64, 128, 256)), "block")
        k = draw(st.one_of(st.sampled_from((block_size, 2 * block_size)), st.integers(1, 150)), "K")
        n = draw(st.integers(1, 130), "N")
    case = make_case(
        draw(st.integers(0, 2**32), "seed"), m, n, k, experts, rank,
        format=draw(st.sampled_from(("nf4", "fp4", "int8", "int4")), "format"),
        dtype=draw(st.sampled_from(tuple(TOLERANCE)), "dtype"),
        block_size=block_size, double_quant=draw(st.booleans(), "double_quant"),
        top_k=draw(st.sampled_from((None, 1, 2, 5)), "top_k"),
        gating=draw(st.sampled_from(GATINGS), "gating"),
        speakers=draw(st.sampled_from((None, None, 1, 3, 7)), "speakers"),
        bias=draw(st.booleans(), "bias"), device=device,
    )  # fmt: skip
    if not real:
        for name in ("x", "dy", "lora_a", "lora_b", "gates"):
            layout = draw(st.sampled_from(LAYOUTS), f"layout of {name}")
            setattr(case, name, laid_out(getattr(case, name), layout))
    return case


def check_answers(case: Case, found: Sequence[Tensor | None]) -> None:
    """y, dx, da, db, dgates against the truth."""
    answers = zip(NAMES, found, truth(case), truth(case, absolute=True), strict=True)
    for name, tensor, expected, size in answers:
        assert tensor is not None and tensor.dtype == case.x.dtype
        assert_close(tensor, expected, TOLERANCE[case.x.dtype], name, size)
