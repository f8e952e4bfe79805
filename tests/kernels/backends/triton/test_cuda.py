"""What only a CUDA device can show: graphs, streams, devices, no synchronisation, 2^31 elements."""

import pytest
import routed_cases
import torch
from cases import NAMES, TOLERANCE, assert_close, make_case, truth
from routed_cases import make_router

from saml_kernels import saml_linear, saml_linear_routed
from saml_kernels.backends.triton import backend as backend
from saml_kernels.backends.triton.configs import ROUTES, Config
from saml_kernels.backends.triton.launcher import interpreting

pytestmark = pytest.mark.skipif(interpreting(), reason="needs a CUDA device")
HALF = {"dtype": torch.float16, "device": "cuda"}
NEWER = Config("dense", 128, 64, 64, 1, 8, loads="descriptors")  # elsewhere it goes by pointers
WAYS = {
    **{route: route for route in ROUTES}, "descriptors": NEWER,
    "scale after": Config("decode", 16, 32, 64, 2, scale="after"),
    "dependent": Config("decode", 16, 32, 64, 2, dependent=True),
}  # fmt: skip


def both(case, route, router=None):
    """y and the gradients of x, lora_a, lora_b and the gates (or the router)."""
    given = (case.weight, case.lora_a, case.lora_b, case.gates if router is None else router)
    how = {"speakers": case.speakers, "route": route}
    how["routing"] = None if router is None else (2, 1.0)
    y = backend.forward(case.x, *given, case.bias, case.scaling, **how)
    return y, *backend.backward(case.dy, case.x, *given, case.scaling, (True,) * 4, **how)


@pytest.mark.parametrize("speakers", [None, 3])
@pytest.mark.parametrize("route", WAYS.values(), ids=[*WAYS])
def test_capture_and_replay(route, speakers):
    """Replayed on new input, a captured graph gives the bits that the same call gives eagerly."""
    case = make_case(0, 37, 256, 128, 4, 4, speakers=speakers, **HALF)
    lead = () if speakers is None else (speakers,)
    for router in (None, torch.randn(*lead, 4, 128, **HALF)):
        both(case, route, router)  # compiles and loads outside the capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = both(case, route, router)
        case.x.copy_(torch.randn_like(case.x))
        case.dy.copy_(torch.randn_like(case.dy))
        graph.replay()
        for a, b in zip(found, both(case, route, router), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize(("n", "k"), [(512, 512), (512, 2048), (2048, 512)])
@pytest.mark.parametrize(("experts", "rank"), [(4, 16), (16, 4), (4, 4), (8, 16)])
@pytest.mark.parametrize("m", [1, 24, 300, 1500])
def test_real_layers(m, experts, rank, n, k, dtype):
    """Sizes and alignments that Triton pipelines: every route, stages 2 to 5 at M = 300."""
    case = make_case(m, m, n, k, experts, rank, dtype=dtype, device="cuda")
    router = make_router(case, 1, 2, 1.0)
    given, routed = truth(case), routed_cases.truth(case, router, 2, 1.0)
    sizes = truth(case, True), routed_cases.truth(case, router, 2, 1.0, True)
    ways = [*ROUTES, NEWER, *(Config(r, stages=s) for r in ("fused", "dense") for s in range(2, 6))]
    for way in ways if m == 300 else ROUTES:
        for gates, wanted, size in zip((None, router), (given, routed), sizes, strict=True):
            for name, found, *known in zip(
                NAMES, both(case, way, gates), wanted, size, strict=True
            ):
                assert_close(found, known[0], 2 * TOLERANCE[dtype], f"{way}: {name}", known[1])


@pytest.mark.parametrize("route", ROUTES)
def test_nothing_waits_for_the_device(route):
    case = make_case(1, 20, 128, 128, 4, 4, speakers=2, **HALF)
    both(case, route)
    torch.cuda.set_sync_debug_mode("error")
    try:
        both(case, route)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_streams_side_by_side():
    cases = [make_case(seed, 300, 512, 512, 4, 4, **HALF) for seed in range(4)]
    expected = [both(case, "split") for case in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    found = []
    for case, stream in zip(cases, streams, strict=True):
        with torch.cuda.stream(stream):
            for _ in range(10):
                last = both(case, "split")
            found.append(last)
    torch.cuda.synchronize()
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_device_of_the_tensors_counts():
    case = make_case(2, 20, 128, 128, 4, 4, dtype=torch.float16, device="cuda:1")
    assert torch.cuda.current_device() == 0
    names = ("y", "dx", "da", "db", "dgates")
    for name, tensor, expected in zip(names, both(case, None), truth(case), strict=True):
        assert tensor.device == torch.device("cuda:1")
        assert_close(tensor, expected, 4 * TOLERANCE[torch.float16], name)


def test_past_two_to_the_31():
    """x, y and dY of more than 2^31 elements each: the last rows are as right as the first."""
    if torch.cuda.get_device_properties(0).total_memory < 70 << 30:
        pytest.skip("needs 70 GB of device memory")
    width = 1024
    m = 2**31 // width + 100
    case = make_case(3, 64, width, width, 2, 4, **HALF)
    x, dy, gates = (torch.zeros(m, n, **HALF) for n in (width, width, 2))
    x[-64:], dy[-64:], gates[-64:] = case.x, case.dy, case.gates
    given = (case.weight, case.lora_a, case.lora_b, gates)
    for route in ("fused", "dense", "scratch"):
        y = backend.forward(x, *given, case.bias, case.scaling, route=route)[-64:].clone()
        dx, da, db, dg = backend.backward(dy, x, *given, case.scaling, (True,) * 4, route=route)
        found = (y, dx[-64:].clone(), da, db, dg[-64:])
        del dx
        names = ("y", "dx", "da", "db", "dgates")
        for name, tensor, expected in zip(names, found, truth(case), strict=True):
            assert_close(tensor, expected, 4 * TOLERANCE[torch.float16], f"{route}: {name}")


def test_compiled_by_inductor():
    case = make_case(4, 12, 128, 128, 4, 4, **HALF)
    router = torch.randn(4, 128, **HALF)

    def run(x):
        y = saml_linear(x, case.weight, *case.experts, case.bias, 0.75, "triton")
        given = (case.weight, case.lora_a, case.lora_b, router)
        return torch.relu(y) + saml_linear_routed(x, *given, top_k=2, backend="triton")

    compiled = torch.compile(run, fullgraph=True)
    torch.testing.assert_close(compiled(case.x), run(case.x), rtol=1e-3, atol=1e-3)


def test_float32_follows_the_setting_of_torch():
    case = make_case(5, 64, 128, 128, 2, 4, device="cuda")
    exact = both(case, "fused")[0]
    assert_close(exact, truth(case)[0], 2e-6, "y")
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        rounded = both(case, "fused")[0]
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert_close(rounded, truth(case)[0], 2e-3, "y")
    assert not torch.equal(exact, rounded)
