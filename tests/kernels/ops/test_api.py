"""`saml_linear` as PyTorch sees it: registration, gradients, compile, autocast, and refusals."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, library
from torch.utils._python_dispatch import TorchDispatchMode

from saml_kernels import SAMLError, available_backends, quantize, saml_linear
from saml_kernels.backends import registry
from saml_kernels.backends.reference import saml_linear_reference
from saml_kernels.ops import call
from saml_kernels.ops.registration import parts_of
from saml_kernels.quantization.tensor import FORMATS, QuantizedTensor

N, K, E, R = 24, 128, 3, 2
Inputs = tuple[Tensor, QuantizedTensor, Tensor, Tensor, Tensor, Tensor]


def make(
    *lead: int,
    experts: int = E,
    dtype: torch.dtype = torch.float32,
    columns: int = K,
    format: str = "nf4",
) -> Inputs:
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    weight = quantize(random(N, columns).float(), format)
    a, b = random(experts, R, columns), random(experts, N, R)
    gates = torch.softmax(random(*lead, experts), -1)
    return random(*lead, columns), weight, a, b, gates, random(N)


def equation(inputs: Inputs, scaling: float) -> Tensor:
    """The design's equation expert by expert, in float64, by nothing but matrix products."""
    x, weight, a, b, gates, bias = inputs
    x, a, b, gates, bias = (t.double() for t in (x, a, b, gates, bias))
    y = x @ weight.dequantize(torch.float64).T + bias
    for e in range(len(a)):
        y = y + scaling * gates[..., e : e + 1] * (x @ a[e].T @ b[e].T)
    return y


@pytest.mark.parametrize("backend", [None, *available_backends()])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("lead", [(5,), (2, 7), (1, 1, 1), ()])
def test_forward_is_the_equation(backend: str | None, format: str, lead: tuple[int, ...]) -> None:
    inputs = make(*lead, format=format)
    y = saml_linear(*inputs, scaling=1.5, backend=backend)
    assert y.shape == (*lead, N)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), equation(inputs, 1.5), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("lead", [(5,), (0,), (2, 0), ()])
def test_no_experts_and_no_rows(backend: str, lead: tuple[int, ...]) -> None:
    inputs = make(*lead, experts=0)
    leaves = [inputs[0].requires_grad_(), inputs[5].requires_grad_()]
    y = saml_linear(*inputs, backend=backend)
    torch.testing.assert_close(y.double(), equation(inputs, 1.0), rtol=1e-4, atol=1e-4)
    dx, dbias = torch.autograd.grad(y.sum(), leaves)
    assert dx.shape == (*lead, K)
    assert dbias.shape == (N,)


@pytest.mark.parametrize("backend", available_backends())
def test_zero_rows_give_zero_gradients(backend: str) -> None:
    x, weight, a, b, gates, bias = make(0)
    leaves = [t.requires_grad_() for t in (x, a, b, gates, bias)]
    y = saml_linear(x, weight, a, b, gates, bias, backend=backend)
    assert y.shape == (0, N)
    for leaf, grad in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
        assert grad.shape == leaf.shape
        assert not grad.any()


@pytest.mark.parametrize("columns", [128, 100])
def test_gradcheck_in_float64(columns: int) -> None:
    x, weight, a, b, gates, bias = make(2, 3, dtype=torch.float64, columns=columns)
    leaves = tuple(t.requires_grad_() for t in (x, a, b, gates, bias))

    def run(x: Tensor, a: Tensor, b: Tensor, gates: Tensor, bias: Tensor) -> Tensor:
        return saml_linear(x, weight, a, b, gates, bias, 1.3, "reference")

    assert torch.autograd.gradcheck(run, leaves)


def test_gradcheck_without_experts() -> None:
    x, weight, a, b, gates, _ = make(3, experts=0, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: saml_linear(x, weight, a, b, gates), x.requires_grad_()
    )


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (4,), (0, 3), (1, 2), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("backend", available_backends())
def test_gradients_are_those_of_autograd(backend: str, needed: tuple[int, ...]) -> None:
    x, weight, a, b, gates, bias = make(4, 5)
    parts = [x, a, b, gates, bias]
    for i in needed:
        parts[i].requires_grad_()
    leaves = [parts[i] for i in needed]
    y = saml_linear(parts[0], weight, *parts[1:], 1.3, backend)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(y, leaves, dy)
    flat = saml_linear_reference(
        parts[0].reshape(-1, K), weight.dequantize(), parts[1], parts[2],
        parts[3].reshape(-1, E), parts[4], 1.3,
    )  # fmt: skip
    wanted = torch.autograd.grad(flat, leaves, dy.reshape(-1, N))
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", available_backends())
def test_gates_are_broadcast_and_their_gradient_summed(backend: str) -> None:
    x, weight, a, b, _, bias = make(4, 5)
    for shape in [(E,), (5, E), (1, E), (4, 1, E), (1, 1, E)]:
        gates = torch.rand(shape, requires_grad=True)
        y = saml_linear(x, weight, a, b, gates, bias, backend=backend)
        whole = gates.expand(4, 5, E).contiguous()
        torch.testing.assert_close(y, saml_linear(x, weight, a, b, whole, bias, backend=backend))
        (grad,) = torch.autograd.grad(y.sum(), gates)
        (want,) = torch.autograd.grad(
            saml_linear(
                x, weight, a, b, gates.expand(4, 5, E) * 1.0, bias, backend="reference"
            ).sum(),
            gates,
        )
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", available_backends())
def test_non_contiguous_inputs(backend: str) -> None:
    x, weight, a, b, gates, bias = make(6, 4)
    strided = (
        x.transpose(0, 1),
        weight,
        a.transpose(1, 2).contiguous().transpose(1, 2),
        b.transpose(0, 1).contiguous().transpose(0, 1),
        gates.transpose(0, 1),
        torch.stack((bias, bias), 1)[:, 0],
    )
    leaves = [t.detach().requires_grad_() for t in (strided[0], *strided[2:])]
    y = saml_linear(leaves[0], weight, *leaves[1:], backend=backend)
    want = saml_linear(x, weight, a, b, gates, bias, backend=backend).transpose(0, 1)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    for leaf, grad in zip(leaves, torch.autograd.grad(y.square().sum(), leaves), strict=True):
        assert grad.shape == leaf.shape


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("case", ["dense", "strided", "no experts", "no bias"])
def test_opcheck(backend: str, case: str) -> None:
    x, weight, a, b, gates, bias = make(5, experts=0 if case == "no experts" else E)
    if case == "strided":
        x = torch.randn(K, 5).T
        gates = gates[:1].expand(5, E)
    for t in (x, a, b, gates, bias):
        t.requires_grad_()
    args: list[Any] = [x, *parts_of(weight), a, b, gates, None if case == "no bias" else bias]
    library.opcheck(torch.ops.saml_kernels.linear.default, (*args, 1.3, backend, None))
    plain = [t.detach() if isinstance(t, Tensor) else t for t in args]
    backward = (torch.randn(5, N), *plain[:-1], 1.3, backend, [True, True, False, True], None)
    library.opcheck(
        torch.ops.saml_kernels.linear_backward.default,
        backward,
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compile_fullgraph_with_gradients() -> None:
    x, weight, a, b, gates, bias = make(3, 4)
    leaves = [t.requires_grad_() for t in (x, a, b, gates, bias)]

    def run(*t: Tensor) -> Tensor:
        return saml_linear(t[0], weight, *t[1:], 1.3).relu()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    eager, traced = run(*leaves), compiled(*leaves)
    torch.testing.assert_close(traced, eager)
    grads = [torch.autograd.grad(y.sum(), leaves) for y in (eager, traced)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", available_backends())
def test_half_precision(dtype: torch.dtype, backend: str) -> None:
    inputs = make(20, dtype=dtype)
    y = saml_linear(*inputs, scaling=1.5, backend=backend)
    assert y.dtype == dtype
    want = equation(inputs, 1.5)
    assert (y.double() - want).norm() / want.norm() < 0.02


def test_autocast_computes_in_its_dtype_and_gives_float32_gradients() -> None:
    x, weight, a, b, gates, bias = make(4)
    leaves = [t.requires_grad_() for t in (x, a, b, gates, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        y = saml_linear(x, weight, a, b, gates, bias)
        wide = saml_linear(*make(4, dtype=torch.float64))
    assert y.dtype == torch.bfloat16
    assert wide.dtype == torch.float64
    for grad in torch.autograd.grad(y.float().sum(), leaves):
        assert grad.dtype == torch.float32


def test_vmap_and_second_derivatives_are_refused() -> None:
    x, weight, a, b, gates, bias = make(4)
    with pytest.raises(SAMLError, match="vmap"):
        torch.func.vmap(lambda row: saml_linear(row, weight, a, b, gates[0], bias))(x)
    x.requires_grad_()
    y = saml_linear(x, weight, a, b, gates, bias)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(SAMLError, match="second derivatives"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.randn(5, K + 1), "x: shape"),
        (0, torch.randn(()), "x: shape"),
        (0, torch.ones(5, K, dtype=torch.int64), "x: dtype"),
        (0, torch.randn(5, K, dtype=torch.float64), "lora_a: dtype"),
        (2, torch.randn(E, R, K - 1), "lora_a: shape"),
        (2, torch.randn(R, K), "lora_a: shape"),
        (3, torch.randn(E, N, R + 1), "lora_b: shape"),
        (3, torch.randn(E, R, N), "lora_b: shape"),
        (3, torch.randn(E, N, R).half(), "lora_b: dtype"),
        (4, torch.randn(5, E + 1), "gates: shape"),
        (4, torch.randn(4, E), "gates: shape"),
        (4, torch.randn(2, 5, E), "gates: shape"),
        (4, torch.randn(()), "gates: shape"),
        (5, torch.randn(N + 1), "bias: shape"),
        (5, torch.randn(1, N), "bias: shape"),
        (5, torch.randn(N, device="meta"), "bias: on meta"),
        (0, torch.randn(5, K, device="meta"), "lora_a: on cpu"),
    ],
)
def test_what_does_not_fit_is_named(position: int, value: Tensor, message: str) -> None:
    inputs: list[Any] = list(make(5))
    inputs[position] = value
    with pytest.raises(SAMLError, match=message) as caught:
        saml_linear(*inputs)
    assert "\n" not in str(caught.value)


def test_integers_are_refused_under_autocast_too() -> None:
    x, weight, a, b, gates, bias = make(5)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(SAMLError, match="x: dtype"):
        saml_linear(x.long(), weight, a, b, gates, bias)


def test_weight_of_three_dimensions_is_refused() -> None:
    x, _, a, b, gates, bias = make(5)
    with pytest.raises(SAMLError, match="two dimensions"):
        saml_linear(x, quantize(torch.randn(N, K, 3)), a, b, gates, bias)


def test_choice_of_backend() -> None:
    x, weight, *_ = make(2)
    assert available_backends()[0] == "reference"
    assert "triton" not in available_backends() or torch.cuda.is_available()
    assert registry.choose_backend(x, weight) == "cpu"
    assert registry.choose_backend(x.double(), weight) == "reference"
    with pytest.raises(SAMLError, match="unknown"):
        registry.choose_backend(x, weight, "cuda")
    with pytest.raises(SAMLError, match="cannot run this call"):
        registry.choose_backend(x.double(), weight, "cpu")


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_the_dispatcher_is_asked_where_somebody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, a, b, gates, bias = make(4)
    through_torch = []
    real = torch.ops.saml_kernels.linear

    class Watched:
        def linear(self, *args: Any) -> Tensor:
            through_torch.append(True)
            return real(*args)

    expected = saml_linear(x, weight, a, b, gates, bias)
    monkeypatch.setattr(torch.ops, "saml_kernels", Watched())
    assert torch.equal(saml_linear(x, weight, a, b, gates, bias), expected)
    assert not through_torch
    a.requires_grad_()
    assert torch.equal(saml_linear(x, weight, a, b, gates, bias), expected)
    assert not through_torch
    with Watching():
        assert torch.equal(saml_linear(x, weight, a, b, gates, bias), expected)
    assert through_torch


def test_fake_tensors_go_through_the_fake_implementation() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, weight, a, b, gates, bias = make(4)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = saml_linear(
            *(t if t is weight else mode.from_tensor(t) for t in (x, weight, a, b, gates, bias))
        )
    assert y.shape == (4, N)
    assert type(y) is not Tensor


@pytest.mark.parametrize("backend", available_backends())
def test_eight_bit_experts(backend: str) -> None:
    x, weight, a, b, gates, bias = make(5)
    qa, qb = (quantize(t, "int8", 128, double_quant=False) for t in (a, b))
    y = saml_linear(x, weight, qa, qb, gates, bias, backend=backend)
    dense = [q.dequantize(torch.float32) for q in (qa, qb)]
    torch.testing.assert_close(y, saml_linear(x, weight, *dense, gates, bias, backend=backend))


def test_experts_of_other_formats_are_refused() -> None:
    x, weight, a, b, gates, bias = make(5)
    with pytest.raises(SAMLError, match="lora_a: nf4; expected int8"):
        saml_linear(x, weight, quantize(a), quantize(b), gates, bias)
    nested = [quantize(t, "int8") for t in (a, b)]
    with pytest.raises(SAMLError, match="lora_a: int8; expected int8, double_quant=False"):
        saml_linear(x, weight, *nested, gates, bias)


def test_layers_that_read_the_same_x_share_its_cast(monkeypatch):
    """Under autocast q, k and v read one copy of x, which goes when its graph goes."""
    weight = quantize(torch.randn(32, 64))
    a, b = (torch.randn(s, requires_grad=True) for s in ((2, 4, 64), (2, 32, 4)))
    x, seen = torch.randn(9, 64, requires_grad=True) * 1, []
    cast = call._cast
    monkeypatch.setattr(call, "_cast", lambda *given: seen.append(cast(*given)) or seen[-1])

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return saml_linear(x, weight, a, b, torch.ones(2))

    first, second = run(), run()
    assert seen[0] is seen[1] and torch.equal(first, second)
    with torch.no_grad():
        x.add_(1)
    third = run()
    assert seen[2] is not seen[1] and not torch.equal(third, first)
    copy = weakref.ref(seen[2])
    seen.clear()
    del first, second, third
    assert copy() is None
