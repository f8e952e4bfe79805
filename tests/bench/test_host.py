"""What a call costs before the device starts: how much it launches, on tensors of the CPU."""

import pytest

pytest.importorskip("triton")

from bench.layers import host
from saml_kernels.backends.triton.launcher import KERNELS, interpreting

pytestmark = pytest.mark.skipif(interpreting(), reason="launches are replaced, not interpreted")


@pytest.mark.parametrize("rows", host.TOKENS)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("gating", ["router", "gates"])
def test_a_call_launches_little(gating, many, autocast, rows):
    forward, backward = host.operations(gating, many, autocast, rows)
    assert 0 < len(forward) <= 4, forward
    launched = [name for name in backward if name in KERNELS or name == "mm"]
    assert 0 < len(launched) <= 4 and len(backward) <= 6, backward


@pytest.mark.parametrize("path", host.PATHS)
def test_calls_start_kernels(path, monkeypatch):
    """Every launch of forward and backward reaches what stands for the device."""
    started = []
    bind = host.PATHS[path]

    def noting(launch):
        started.append(launch.name)
        return bind(launch)

    with host.dispatch.starting_with(noting):
        case = host.layer("router", False)
        host.both(case.run, host.torch.ones(1, host.ROWS, host.WIDTH))
    assert {"single", "backward", "gradients"} <= set(started)
    assert all(leaf.grad is not None for leaf in case.leaves)
