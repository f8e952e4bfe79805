"""The one place that takes times, what is checked of them, and the roofline beside them."""

import gc
import statistics
import weakref
from contextlib import nullcontext

import pytest
import torch

from bench.layers.checks import peak_memory, poisoned_error
from bench.layers.roofline import Cost, Roofs, linear_cost, measure_roofs
from saml_kernels import timing
from saml_kernels.timing import Timing, interleaved, sample

CPU = torch.device("cpu")


def test_median_quartiles_and_paired_ratio():
    ours, bar = Timing((4.0, 1.0, 2.0)), Timing((2.0, 1.0, 4.0))
    assert ours.median == 2.0
    assert ours.quartiles == tuple(statistics.quantiles([1, 2, 4], n=4, method="inclusive")[::2])
    assert ours.ratio(bar) == 1.0  # of 2, 1 and 0.5, not of the medians 2 and 2
    assert Timing((3.0,)).to_dict() == {"median_us": 3.0, "low_us": 3.0, "high_us": 3.0}


def test_contenders_run_in_turn_and_warm_up_is_left_out():
    order = []
    taken = {"a": iter([90.0, 80.0, 1.0, 2.0, 3.0]), "b": iter([70.0, 60.0, 8.0, 6.0, 4.0])}

    def sampler(train, device):
        train[0]()
        return next(taken[order[-1]])

    trains = {name: [lambda name=name: order.append(name)] for name in "ab"}
    found = interleaved(trains, CPU, rounds=3, lengths={"b": 2}, sampler=sampler)
    assert order == list("ab") * 5
    assert found["a"].samples == (1.0, 2.0, 3.0)
    assert found["b"].samples == (4.0, 3.0, 2.0)  # two calls behind each entry
    assert (found["a"].median, found["b"].median) == (2.0, 3.0)


def test_a_sample_is_cold_and_a_mean_over_the_train(monkeypatch):
    events, clock = [], iter([10.0, 10.5])
    monkeypatch.setattr(timing, "overwrite_caches", lambda device: events.append("cold"))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    assert sample([lambda: events.append("call")] * 5, CPU) == pytest.approx(1e5)
    assert events == ["cold", *["call"] * 5]


def test_caches_are_overwritten_with_more_than_they_hold():
    written, read = timing._sweep(CPU)
    assert written.nbytes == read.nbytes >= 2 * timing.cache_bytes(CPU) >= 64 << 20
    before = written[0].item()
    timing.overwrite_caches(CPU)
    assert (written[0].item(), read[0].item()) == (before + 1, 1)


@pytest.mark.parametrize("launches", [False, True])
def test_launches_count_once_the_sweep_is_over(launches, monkeypatch):
    """Without a GPU: what is asked of it, in which order, and on which device."""
    events = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            events.append("record")

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return 0.006

    monkeypatch.setattr(timing, "overwrite_caches", lambda device: events.append("cold"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda d: events.append(str(d)) or nullcontext())
    train = [lambda: events.append("call")] * 2
    assert sample(train, torch.device("cuda:1"), launches) == pytest.approx(3.0)
    wait = ["wait"] if launches else []
    assert events == ["cuda:1", "cold", *wait, "record", "call", "call", "record"]


def test_what_a_graph_reads_lives_as_long_as_its_replay(fake_graphs):
    class Call:
        def __call__(self):
            return 7

    train = [Call() for _ in range(3)]
    live = [weakref.ref(call) for call in train]
    replay = timing.captured(train)
    train.clear()
    gc.collect()
    assert [ref() is not None for ref in live] == [True] * 3 and replay() == 7
    del replay
    gc.collect()
    assert [ref() for ref in live] == [None] * 3


def poisoning(step):
    """The error that `poisoned_error` finds in `step`, which should double its input."""
    x = torch.ones(64)
    return poisoned_error(
        lambda: [step(x)], lambda: x.copy_(torch.arange(64.0)), lambda: [2 * x.double()]
    )


def test_right_results_pass():
    assert poisoning(lambda x: 2 * x) == 0.0


def test_a_result_kept_from_before_is_found():
    kept = torch.full((64,), 2.0)
    assert poisoning(lambda x: kept) == float("inf")


def test_a_copy_of_an_earlier_result_is_found():
    first = []

    def step(x):
        first.append(2 * x if not first else first[0])
        return first[0].clone()

    assert poisoning(step) > 0.5


def test_an_unwritten_part_is_found():
    memory = torch.zeros(64)

    def half(x):
        memory[:32] = 2 * x[:32]
        return memory

    assert poisoning(half) == float("inf")


def test_one_call_is_timed_in_a_train(monkeypatch):
    trains = []
    for _ in range(5):  # another program may hold one of them up
        ran = []
        found = timing.timed(lambda ran=ran: ran.append(1), rounds=3, device="cpu")
        assert found["low_us"] <= found["median_us"] <= found["high_us"]
        train, rest = divmod(len(ran) - 2, 3 + timing.WARM_UP)
        assert rest == 0 and train >= 1
        trains.append(train)
    assert max(trains) == timing.LONGEST  # too quick for a short one


def test_peak_memory_counts_what_is_held_at_once():
    def run():
        a = torch.empty(1 << 20)  # 4 MiB
        b = a + 1
        del a
        return b * 2  # two are held at a time

    run()
    assert peak_memory(run, CPU) == pytest.approx(2 * (4 << 20), rel=0.01)


def test_cost_by_hand():
    # 2 tokens, 3 out, 5 in; 7 experts of rank 1 (R = 7); float16; a weight of 15 bytes.
    cost = linear_cost(2, 3, 5, weight_bytes=15, item_bytes=2, experts=7, rank=1)
    assert cost.flop == 2 * 2 * 3 * 5 + 2 * 2 * 7 * (3 + 5)
    x, y, gates, a, b, bias = 10, 6, 14, 35, 21, 3
    assert cost.bytes == 15 + 2 * (x + y + gates + a + b + bias)
    both = linear_cost(2, 3, 5, weight_bytes=15, item_bytes=2, experts=7, rank=1, train=True)
    # dX = dY W; dH = dY B, dX += dP A, dA = dP^T X, dB = dY^T H
    assert both.flop == cost.flop + 2 * 2 * 3 * 5 + 2 * 2 * 7 * (3 + 5 + 5 + 3)
    assert both.bytes == cost.bytes + 15 + 2 * (y + 2 * x + 2 * gates + 2 * (a + b))
    plain = linear_cost(2, 3, 5, weight_bytes=30, item_bytes=2)
    assert plain == Cost(30 + 2 * (x + y + bias), 60)


def test_speakers_are_read_each():
    one, three = (
        linear_cost(4, 8, 8, weight_bytes=0, item_bytes=1, experts=2, rank=2, speakers=s)
        for s in (1, 3)
    )
    assert three.flop == one.flop and three.bytes - one.bytes == 2 * 4 * 16


def test_floor_is_the_nearer_roof():
    roofs = Roofs(bandwidth=1e9, rate=1e12)
    assert roofs.floor(Cost(2000, 1e6)) == pytest.approx(2.0)  # microseconds: bytes rule
    assert roofs.floor(Cost(2000, 5e6)) == pytest.approx(5.0)  # arithmetic rules


def test_measured_roofs(monkeypatch):
    monkeypatch.setattr("bench.layers.roofline.sample", lambda train, device: 1e6)
    roofs = measure_roofs(CPU, torch.float32)
    assert roofs == Roofs(bandwidth=3 * 4 * (32 << 20), rate=2 * 1536**3)
