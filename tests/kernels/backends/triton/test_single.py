"""The one-launch kernels with their programs side by side, in any order and with little room."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from cases import TOLERANCE, assert_close, make_case, truth
from routed_cases import make_router

from saml_kernels.backends.triton import backend as backend
from saml_kernels.backends.triton.backward_steps import OneLaunch
from saml_kernels.backends.triton.configs import Config
from saml_kernels.backends.triton.counters import counters
from saml_kernels.backends.triton.facts import weight_parts
from saml_kernels.backends.triton.kernels.tickets import work_of
from saml_kernels.backends.triton.launcher import interpreting
from saml_kernels.backends.triton.single import together_plan

if interpreting():
    from interleaved import interleaved

WAY = Config("single", 16, 32, 32, 2, stages=2)


@triton.jit
def _tickets_kernel(found, rows, pieces, others, GROUP: tl.constexpr):
    """found [tickets, 3]: row of tiles, whether it is one of its pieces, which one."""
    ticket = tl.program_id(0)
    row, of_piece, number = work_of(ticket, rows, pieces, others, GROUP)
    tl.store(found + 3 * ticket, row)
    tl.store(found + 3 * ticket + 1, of_piece.to(tl.int32))
    tl.store(found + 3 * ticket + 2, number)


@pytest.mark.parametrize(("rows", "pieces", "others", "group"), [(5, 3, 4, 2), (3, 0, 2, 8)])
def test_a_row_s_pieces_come_before_what_waits_for_them(rows, pieces, others, group, device):
    count = rows * (pieces + others)
    found = torch.full((count, 3), -1, dtype=torch.int32, device=device)
    _tickets_kernel[(count,)](found, rows, pieces, others, group)
    tickets = {tuple(work): ticket for ticket, work in enumerate(found.tolist())}
    every = {(r, 1, n) for r in range(rows) for n in range(pieces)}
    every |= {(r, 0, n) for r in range(rows) for n in range(others)}
    assert set(tickets) == every
    for (row, of_piece, _), ticket in tickets.items():
        before = [tickets[row, 1, n] for n in range(pieces)]
        assert of_piece or all(b < ticket for b in before)


def call(case, router=None, top_k=None):
    gates = case.gates if router is None else router
    routing = None if router is None else (top_k, 1.0)
    return backend.forward(
        case.x, case.weight, case.lora_a, case.lora_b, gates, case.bias, case.scaling,
        case.speakers, routing=routing, route=WAY,
    )  # fmt: skip


@pytest.mark.skipif(not interpreting(), reason="a device orders its programs itself")
@pytest.mark.parametrize("residents", [1, 2, 3, 40])
@pytest.mark.parametrize("gating", ["given", "top 2 of many speakers"])
def test_any_order_gives_the_same_bits(gating, residents, device):
    """Twice in a row: the counters are zero again after the first."""
    speakers = None if gating == "given" else 2
    case = make_case(1, 18, 64, 64, 3, 4, speakers=speakers, device=device)
    router = None if gating == "given" else make_router(case, 2, 2, 1.0)
    expected = call(case, router, 2)
    for seed in range(3):
        with interleaved(seed, residents) as launches:
            for _ in range(2):
                assert torch.equal(call(case, router, 2), expected)
        assert launches[0] == launches[1] > 8
    if router is None:
        assert_close(expected, truth(case)[0], TOLERANCE[case.x.dtype], "y", truth(case, True)[0])
    assert not any(t.any() for t in counters(case.x.device).streams.values())


@pytest.mark.skipif(not interpreting(), reason="a device orders its programs itself")
@pytest.mark.parametrize("residents", [1, 3, 40])
@pytest.mark.parametrize("dx", [True, False], ids=["dX", "no dX"])
def test_backward_in_any_order_gives_the_same_bits(dx, residents, device):
    """Shares of dY B and of dY W, two rows of tiles at a time."""
    case = make_case(4, 40, 32, 64, 3, 4, speakers=2, device=device)
    router = make_router(case, 5, 2, 1.0)
    gates = torch.rand(40, 3, device=device)
    plain = torch.randn(40, 12, device=device)
    way = Config("split", 16, 32, 16, 2, stages=2, group=2)
    facts = backend.facts_of(
        case.x, case.weight, case.lora_a, case.lora_b, router, None, case.speakers, (2, 1.0),
        dy=case.dy, route=way,
    )  # fmt: skip
    plan = OneLaunch(facts, way, dx=dx, through=True)

    def run():
        return plan(
            case.dy, weight_parts(case.weight), case.lora_b, case.lora_a, router, gates, plain,
            case.speakers, case.scaling, None,
        )  # fmt: skip

    expected = run()
    for seed in range(2):
        with interleaved(seed, residents) as launches:
            found = run()
        assert len(launches) == 1 and launches[0] > 5
        for one, other in zip(found, expected, strict=True):
            assert (one is None) == (other is None) and (one is None or torch.equal(one, other))
    assert not any(t.any() for t in counters(case.x.device).streams.values())


@pytest.mark.skipif(not interpreting(), reason="a device orders its programs itself")
def test_without_tickets_programs_would_wait_for_ever(device, monkeypatch):
    """The check itself: where work is handed out backwards, one resident waits for the others."""
    case = make_case(2, 3, 32, 64, 2, 4, device=device)
    with interleaved(0, 40, backwards=True):
        call(case)  # room for all: nobody waits in vain
    try:
        with pytest.raises(Exception, match="Stuck"), interleaved(0, 1, backwards=True):
            call(case)
    finally:
        counters(case.x.device).streams.clear()


@pytest.mark.parametrize("m", [1, 5, 33])
def test_no_experts(m, device):
    """The tied head's call is one launch too."""
    case = make_case(3, m, 70, 128, 0, 4, device=device)
    y = backend.forward(
        case.x, case.weight, *case.experts, case.bias, case.scaling, route=WAY
    )  # fmt: skip
    assert_close(y, truth(case)[0], TOLERANCE[case.x.dtype], "y")


@pytest.mark.skipif(not interpreting(), reason="a device orders its programs itself")
@pytest.mark.parametrize("members", [2, 3])
def test_members_have_the_bits_they_have_alone(members, device):
    cases = [make_case(10 + i, 5, 70, 64, 2, 4, device=device) for i in range(members)]
    for case in cases:
        case.x = cases[0].x
    routers = [torch.randn(2, 64, device=device) for _ in cases]
    alone = [call(case, router) for case, router in zip(cases, routers, strict=True)]
    first = cases[0]
    facts = backend.facts_of(
        first.x, first.weight, first.lora_a, first.lora_b, routers[0], first.bias, None,
        (None, 1.0), route=WAY,
    )  # fmt: skip
    plan, given = together_plan(facts, members), []
    for case, router in zip(cases, routers, strict=True):
        codes, scales, table = weight_parts(case.weight)
        given.append((codes, scales, case.lora_a, router, case.lora_b, case.bias))
    for residents in (1, 3):
        with interleaved(0, residents):
            found = plan.together(first.x, table, given, first.scaling)
        assert all(torch.equal(y, one) for y, one in zip(found, alone, strict=True))
