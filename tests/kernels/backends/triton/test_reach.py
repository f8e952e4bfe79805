"""Offsets past 2^31, what is kept for backward, strides and sizes at the edges."""

import gc

import numpy as np
import pytest
import torch
from cases import assert_close, make_case, truth
from torch import Tensor

from saml_kernels import quantize, saml_linear
from saml_kernels.backends.triton import backend as backend
from saml_kernels.backends.triton import launcher as dispatch
from saml_kernels.backends.triton.configs import Config


def vast(*shape: int, dtype: str = "float16") -> Tensor:
    """Uninitialised memory that the system hands out only where it is touched."""
    return torch.from_numpy(np.empty(shape, dtype))


@pytest.mark.skipif(not dispatch.interpreting(), reason="test_cuda.py has it")
@pytest.mark.parametrize("route", ["decode", "split"])
def test_experts_past_two_to_the_31(route):
    """The last of so many speakers that their experts take more than 2^31 elements."""
    case = make_case(0, 3, 64, 128, 2, 4, dtype=torch.float16)
    speakers = 2**31 // case.lora_b.numel() + 2**31 // case.lora_a.numel() + 3
    a, b = (vast(speakers, *t.shape) for t in (case.lora_a, case.lora_b))
    a[-1], b[-1] = case.lora_a, case.lora_b
    index = torch.full((3,), speakers - 1, dtype=torch.int32)
    given = (case.x, case.weight, a, b, case.gates, case.bias, case.scaling, index)
    y = backend.forward(*given, route=route)
    assert a.numel() > 2**31 and b.numel() > 2**31
    assert_close(y, truth(case)[0], 1e-3, "y")


@pytest.mark.skipif(not dispatch.interpreting(), reason="test_cuda.py has it")
def test_rows_past_two_to_the_31(monkeypatch):
    """The last tile of each kernel's grid, on x and dY of more than 2^31 elements."""
    torch.use_deterministic_algorithms(False)  # which would fill all of it
    from triton.runtime import interpreter

    case = make_case(1, 16, 1024, 1024, 2, 4, dtype=torch.float16)
    m = 2**21 + 16
    x, dy, gates = vast(m, 1024), vast(m, 1024), vast(m, 2)
    x[-16:], dy[-16:], gates[-16:] = case.x, case.dy, case.gates
    given = (x, case.weight, case.lora_a, case.lora_b, gates)
    builder, launched = interpreter.interpreter_builder, []

    def last_tile(launcher, *arguments):
        """Runs the programs that the last rows need, and no others."""
        name, grid, constants = launcher.name, launcher.grid, launcher.constants
        tiles_m = -(-m // constants["BLOCK_M"])
        if name.startswith("project"):
            mine, first = (1, *grid[1:]), tiles_m - 1
        else:
            mine = (grid[0] // tiles_m, 1)
            first = grid[0] - mine[0]

        tickets = arguments[3] if name == "backward" else None
        if tickets is not None:  # taken in place of the program's number
            tickets[0] = first

        def place(a, b, c):
            builder.grid_idx = (first + a, b, c)

        monkeypatch.setattr(builder, "set_grid_idx", place)
        plain = [int(a) if isinstance(a, int) else a for a in arguments]
        dispatch.kernel(name)[mine](*plain, **constants)
        launched.append(name)
        if tickets is not None:
            tickets.zero_()

    monkeypatch.setattr(dispatch.Launcher, "__call__", last_tile)
    config = Config("fused", 16, 64, 64, 1, group=1)
    y = backend.forward(*given, case.bias, case.scaling, route=config)
    needs = (True, False, False, True)
    dx, _, _, dg = backend.backward(dy, *given, case.scaling, needs, route=config)
    assert launched == ["project", "product", "project", "backward"]
    expected = truth(case)
    for name, found, wanted in zip(
        ("y", "dx", "dgates"), (y, dx, dg), (*expected[:2], expected[4]), strict=True
    ):
        assert_close(found[-16:], wanted, 2e-3, name)


def test_little_is_kept_for_backward(device):
    """P in float32 beside the arguments: no dequantised weight, nothing as wide as x."""
    case = make_case(2, 24, 256, 128, 4, 4, device=device)
    leaves = [t.clone().requires_grad_() for t in (case.x, *case.experts)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        saml_linear(leaves[0], case.weight, *leaves[1:], case.bias, 0.75, "triton")
    known = {t.data_ptr() for t in (*leaves, *case.weight.buffers())}
    new = [t for t in kept if t.data_ptr() not in known]
    assert len(kept) > len(new) and [tuple(t.shape) for t in new] == [(24, 16)]


def test_the_scratch_is_given_back(device):
    """After a call through scratch nothing new is alive that is as large as the weight."""
    case = make_case(3, 5, 192, 320, 2, 4, device=device)
    given = (case.weight, *case.experts)

    def large() -> set[int]:
        gc.collect()
        return {id(t) for t in gc.get_objects() if type(t) is Tensor and t.numel() >= 192 * 320}

    before = large()
    backend.forward(case.x, *given, case.bias, 1.0, route="scratch")
    backend.backward(case.dy, case.x, *given, 1.0, (True,) * 4, route="scratch")
    assert large() <= before


def test_rank_zero_is_the_base_alone(device):
    case = make_case(4, 5, 64, 128, 2, 4, device=device)
    a, b = case.lora_a[:, :0], case.lora_b[:, :, :0]
    y = saml_linear(case.x, case.weight, a, b, case.gates, case.bias, 1.0, "triton")
    expected = case.x.double() @ case.weight.dequantize(torch.float64).T + case.bias.double()
    assert_close(y, expected.cpu(), 2e-6, "y")


def test_strided_and_misplaced_inputs(device):
    """Views with gaps, expanded gates, storage that begins at an odd place."""
    case = make_case(5, 6, 64, 128, 2, 4, device=device)
    room = torch.randn(6, 2 * 128 + 3, device=device)
    room[:, 3::2] = case.x
    shifted = torch.empty(case.lora_b.numel() + 1, device=device)[1:].view_as(case.lora_b)
    shifted.copy_(case.lora_b)
    a = case.lora_a.transpose(1, 2).contiguous().transpose(1, 2)
    gates = case.gates[:1].expand(6, 2)
    found = saml_linear(room[:, 3::2], case.weight, a, shifted, gates, case.bias, 0.75, "triton")
    case.gates = gates.contiguous()
    assert_close(found, truth(case)[0], 2e-6, "y")


def test_float32_asks_torch_for_tf32():
    """Both spellings of PyTorch's setting, without the error that mixing them raises."""
    from saml_kernels.backends.triton.launcher import precision

    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    try:
        for value, expected in (("tf32", "tf32"), ("ieee", "ieee")):
            settings.fp32_precision = value
            assert precision(torch.float32) == expected
            assert precision(torch.float16) == "ieee"
        torch.set_float32_matmul_precision("high")
        assert precision(torch.float32) == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
        settings.fp32_precision = before


def test_a_format_it_does_not_know(device):
    weight = quantize(torch.randn(8, 64)).to(device)
    weight.format = "fp8"
    assert "fp8" in backend.unsupported(torch.randn(1, 64, device=device), weight)
