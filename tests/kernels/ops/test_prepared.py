"""What a prepared call keeps for later ones."""

import pytest
import torch

pytest.importorskip("triton")

from saml_kernels.ops import prepared
from saml_kernels.ops.prepared import Kind


def test_a_layer_casts_its_bias_once_and_graphs_keep_it(monkeypatch):
    kept = []
    monkeypatch.setattr(prepared, "keep", kept.append)
    bias, casts, kinds = torch.arange(3.0), {}, []
    for _ in range(2):  # inputs of two shapes
        kind = object.__new__(Kind)
        kind.biases, kind.dtype = casts, torch.bfloat16
        kinds.append(kind)
    one, other = kinds
    cast = one._cast(bias)
    assert cast.dtype == torch.bfloat16 and torch.equal(cast.float(), bias)
    assert other._cast(bias) is cast and kept == [cast]
    bias += 1
    assert torch.equal(other._cast(bias).float(), bias)


@pytest.mark.parametrize("name", ["linear", "linear_kept", "linear_backward"])
def test_graphs_of_torch_compile_leave_it_out(name):
    """They would have what calls share in their memory, and PyTorch says so at the first call."""
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.saml_kernels, name).default.tags
