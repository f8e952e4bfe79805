"""`saml_linear_routed`: gates by the operator itself, on every backend that this machine has."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from saml_kernels import SAMLError, available_backends, quantize, saml_linear_routed
from saml_kernels.backends.reference import saml_linear_reference

N, K, E, R = 24, 128, 3, 2


def make(m: int, speakers: int | None = None) -> dict[str, Any]:
    g = torch.Generator().manual_seed(11)
    lead = () if speakers is None else (speakers,)
    people = None if speakers is None else torch.arange(m, dtype=torch.int32) % speakers
    return {
        "x": torch.randn(m, K, generator=g),
        "weight": quantize(torch.randn(N, K, generator=g)),
        "lora_a": torch.randn(*lead, E, R, K, generator=g),
        "lora_b": torch.randn(*lead, E, N, R, generator=g),
        "router": torch.randn(*lead, E, K, generator=g) / K**0.5,
        "bias": torch.randn(N, generator=g),
        "speakers": people,
    }


def equation(call: dict[str, Any], top_k: int | None, temperature: float) -> torch.Tensor:
    """Row by row in float64."""
    rows = []
    for i, x in enumerate(call["x"].double()):
        own = call["speakers"]
        a, b, v = (
            (call[n] if own is None else call[n][own[i]]).double()
            for n in ("lora_a", "lora_b", "router")
        )
        logits = v @ x / temperature
        if top_k is not None:
            smallest = logits.sort(descending=True).values[top_k - 1]
            logits = logits.masked_fill(logits < smallest, float("-inf"))
        dense = call["weight"].dequantize(torch.float64)
        gates = logits.exp() / logits.exp().sum()
        bias = call["bias"].double()
        rows.append(saml_linear_reference(x[None], dense, a, b, gates[None], bias, 0.5)[0])
    return torch.stack(rows)


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("speakers", [None, 2])
@pytest.mark.parametrize(("top_k", "temperature"), [(None, 1.0), (2, 0.7), (1, 1.0)])
def test_is_its_equation(backend, speakers, top_k, temperature):
    call = make(7, speakers)
    leaves = {n: call[n].requires_grad_() for n in ("x", "lora_a", "lora_b", "router")}
    y = saml_linear_routed(
        **call, scaling=0.5, top_k=top_k, temperature=temperature, backend=backend
    )
    expected = equation(call, top_k, temperature)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    dy = torch.randn(7, N, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(y, list(leaves.values()), dy)
    wanted = torch.autograd.grad(expected, list(leaves.values()), dy.double())
    for grad, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", available_backends())
def test_compiles_in_one_graph(backend):
    call = make(4)
    call.pop("speakers")

    def run(x):
        return saml_linear_routed(**{**call, "x": x}, top_k=2, backend=backend) + 1

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(call["x"]), run(call["x"]))


def test_leading_dimensions_and_autocast():
    call = make(6)
    call.pop("speakers")
    flat = saml_linear_routed(**call)
    folded = saml_linear_routed(**{**call, "x": call["x"].view(2, 3, K)})
    torch.testing.assert_close(folded.view(6, N), flat)
    with torch.autocast("cpu", torch.bfloat16):
        assert saml_linear_routed(**call).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"router": torch.zeros(E + 1, K)}, "router: shape"),
        ({"router": torch.zeros(E, K, dtype=torch.float64)}, "router: dtype torch.float64"),
        ({"top_k": 0}, "top_k: 0; expected 1..3"),
        ({"top_k": 4}, "top_k: 4; expected 1..3"),
        ({"temperature": 0.0}, "temperature: 0.0"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(SAMLError, match=message):
        saml_linear_routed(**{**make(2), **change})
