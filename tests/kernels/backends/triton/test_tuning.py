"""Tuning with a clock of the test's own: what is measured is written, found and used."""

import json
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ways import fitting

from bench.layers.cases import EXPERTS, RANK
from saml_kernels import SAMLError
from saml_kernels.backends.triton import configs, costs, tuning
from saml_kernels.backends.triton.configs import Config
from saml_kernels.backends.triton.launcher import triton_errors


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAML_CACHE", str(tmp_path))
    configs.forget_tables()
    yield tmp_path
    configs.forget_tables()


def few(direction, m):
    yield Config("fused", 16, 32, 32, 1)
    yield Config("split", 16, 16, 64, 2)
    yield Config("scratch", 32, 32, 32, 1)


tune = partial(tuning.tune, dtypes=(torch.float16,))


class Clock:
    """The n-th candidate takes times[n] microseconds."""

    def __init__(self, *times):
        self.times, self.asked = times, 0

    def __call__(self, run, rounds, device):
        assert device == run.func.__self__.x.device
        run()
        self.asked += 1
        return {"median_us": self.times[(self.asked - 1) % len(self.times)]}


def test_the_fastest_is_written_and_used(cache, device):
    clock, rows = Clock(5.0, 3.0, 4.0, 9.0), []
    shapes = [(64, 128)]
    path, done = tune(
        shapes, (2, 40), device=device, clock=clock, tried=few, on_row=lambda *row: rows.append(row)
    )
    assert done == 4 and clock.asked == 16 and path.parent == cache
    assert [(n, total) for n, total, _ in rows] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [row["before_microseconds"] / row["microseconds"] for *_, row in rows] == [3.0] * 4
    traits = configs.device_traits(torch.device(device))
    for direction in ("forward", "backward"):
        for m in (2, 3, 40):  # 3 is near 2
            chosen = configs.choose(direction, m, 64, 128, *traits)
            assert (chosen.route, chosen.block_o, chosen.block_d) == ("split", 16, 64)
    # Far from anything measured the default goes on.
    assert configs.choose("forward", 5000, 4096, 4096, *traits).route == "scratch"


def test_a_second_run_replaces_what_it_repeats_and_keeps_the_rest(cache, device):
    tune([(64, 128)], (2, 40), device=device, clock=Clock(5.0, 3.0, 4.0, 9.0), tried=few)
    path, _ = tune([(64, 128)], (2,), device=device, clock=Clock(1.0, 3.0, 4.0, 9.0), tried=few)
    found = {r["m"]: r["route"] for r in json.loads(path.read_text())["forward"]}
    assert found == {2: "fused", 40: "split"}


def test_both_types_count_by_their_geometric_mean(cache, device):
    """Fused takes 4 and 4, split 1 and 9, scratch 2 and 32."""
    clock = Clock(4.0, 4.0, 1.0, 9.0, 2.0, 32.0, 50.0, 50.0)
    path, _ = tuning.tune([(64, 128)], (40,), device=device, clock=clock, tried=few)
    row = json.loads(path.read_text())["forward"][0]
    assert row["route"] == "split"
    assert [row["microseconds"], row["before_microseconds"]] == pytest.approx([3.0, 50.0])


@pytest.mark.parametrize("m", [1, 64, 1500])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_few_are_measured_and_the_best_of_each_route_among_them(direction, m):
    device = costs.device_of("sm_90", 132)
    all_of_them = tuning._distinct(tuning.candidates(direction, m), direction, 512, 512)
    cost = costs.forward if direction == "forward" else costs.backward
    found = tuning.likely(all_of_them, direction, m, 512, 512, device)
    assert len(found) == len(set(found)) == tuning.TRIALS < len(all_of_them)
    assert {c.route for c in found} == {c.route for c in all_of_them}
    times = [cost(device, c, m, 512, 512) for c in all_of_them]
    assert min(times) == cost(device, found[0], m, 512, 512)


def test_no_time_left_measures_nothing(cache, device):
    _, done = tune([(64, 128)], (2,), device=device, minutes=-1.0, clock=Clock(1.0))
    assert done == 0


def test_rows_not_yet_measured_come_first_and_shapes_within_them(cache, device):
    tune([(64, 128)], (2,), device=device, clock=Clock(1.0), tried=few)
    order = []
    tune(
        [(64, 128), (128, 64)], (2, 5), device=device, clock=Clock(1.0), tried=few,
        on_row=lambda done, total, r: order.append((r["m"], r["direction"], r["n"])),
    )  # fmt: skip
    both = ("forward", "backward")
    fresh = [(2, d, 128) for d in both] + [(5, d, n) for d in both for n in (64, 128)]
    assert order == [*fresh, *((2, d, 64) for d in both)]


def test_what_is_timed_is_what_will_run(cache, device):
    """Nobody gets more shares than there are steps, nor the same work twice."""

    def shared(direction, m):
        yield Config("fused", 16, 32, 32, 1)
        yield from (Config("split", 16, 32, 32, split) for split in (1, 2, 4, 8))

    timed = []

    def clock(run, rounds, device):
        timed.append(run.args[0])
        return {"median_us": 1.0 if timed[-1].split == 2 else 2.0}

    path, _ = tune([(64, 96)], (2,), device=device, clock=clock, tried=shared)
    table = json.loads(path.read_text())
    assert [table[d][0]["split"] for d in ("forward", "backward")] == [2, 2]  # of 3 and 2 steps
    # Fused, two shares and what was chosen before, in each direction.
    assert [c.route for c in timed] == ["fused", "split", "single", "fused", "split", "split"]
    traits = configs.device_traits(torch.device(device))
    assert configs.choose("forward", 2, 64, 96, *traits) == Config("split", 16, 32, 32, 2)


def test_tuned_as_it_is_timed():
    assert tuning.Problem(2, 64, 128, device="cpu").a.shape[:2] == (EXPERTS, RANK)


def test_the_device_without_a_number_is_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(configs, "_cuda_traits", lambda index: ("sm_90", index, "name"))
    found = [configs.device_traits(torch.device(d))[1] for d in ("cuda", "cuda:0", "cuda:2")]
    assert found == [3, 0, 2]


def test_triton_may_be_absent(monkeypatch):
    assert all(issubclass(e, Exception) for e in triton_errors(*tuning.TOO_LARGE))
    monkeypatch.setattr("saml_kernels.backends.triton.launcher.find_spec", lambda name: None)
    assert triton_errors(*tuning.TOO_LARGE) == ()


def too_large():
    resources, ptxas = triton_errors("OutOfResources", "PTXASError")
    return [resources(300000, 232448, "shared memory"), ptxas("too much shared data"),
            torch.OutOfMemoryError("CUDA out of memory")]  # fmt: skip


def test_a_random_shape_passes_over_drawn_tiles_that_do_not_fit():
    error, other, _ = too_large()
    reached = []

    @given(st.integers(0, 3))
    def drawn(size):
        with fitting(Config()):
            if size > 1:
                raise error
        reached.append(size)

    drawn()
    assert set(reached) == {0, 1}
    for raised, way in ((error, "fused"), (error, None), (other, Config())):
        with pytest.raises(type(raised)), fitting(way):
            raise raised


@pytest.mark.parametrize("which", range(3))
def test_what_does_not_fit_the_device_is_left_out(which, cache, device, monkeypatch):
    real = tuning.Problem.forward

    def forward(self, route=None):
        if isinstance(route, Config) and route.route == "fused":
            raise too_large()[which]
        return real(self, route)

    monkeypatch.setattr(tuning.Problem, "forward", forward)
    path, _ = tune([(64, 128)], (2,), device=device, clock=Clock(1.0, 2.0), tried=few)
    assert json.loads(path.read_text())["forward"][0]["route"] == "split"


def test_a_wrong_result_is_not_timed(cache, device, monkeypatch):
    real = tuning.Problem.forward
    monkeypatch.setattr(tuning.Problem, "forward", lambda self, route=None: real(self, route) * 1.1)
    with pytest.raises(SAMLError, match=r"forward of 2 tokens: .* is off by"):
        tune([(64, 128)], (2,), device=device, clock=Clock(1.0), tried=few)


@pytest.mark.parametrize("m", [1, 16, 64, 1500])
def test_candidates_are_legal_and_many(m):
    for direction in ("forward", "backward"):
        found = list(tuning.candidates(direction, m))
        assert 10 < len(found) < 200 and len(set(found)) == len(found)
        assert found[-1].route == "scratch"


def test_a_table_of_other_kernels_is_not_found(cache, monkeypatch):
    before = configs.user_table("sm_90", "a")
    assert before != configs.user_table("sm_90", "b")
    monkeypatch.setattr(torch, "__version__", "0.0.0")
    configs._fingerprint.cache_clear()
    assert before != configs.user_table("sm_90", "a")
    configs._fingerprint.cache_clear()
