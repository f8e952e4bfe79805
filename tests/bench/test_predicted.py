"""The cost model: what it must say whatever its constants are, and how far off it may be."""

import json
from dataclasses import replace
from importlib.resources import files

import pytest

from bench.layers.cases import EXPERTS, RANK
from bench.layers.predicted import BOARDS, SERVERS, SHAPES, TOKENS, rows
from bench.layers.roofline import linear_cost
from saml_kernels.backends.triton import configs, costs
from saml_kernels.backends.triton.configs import Config

DEVICES = {named.name: named for named in (*BOARDS, *SERVERS)}


def test_of_the_layers_that_are_measured():
    assert (costs.EXPERTS, costs.RANK) == (EXPERTS, RANK)


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("m", [1, 16, 100, 1500, 12000])
def test_never_below_the_roofline(name, m):
    named = DEVICES[name]
    for n, k in SHAPES:
        cost = linear_cost(m, n, k, weight_bytes=n * k / 2, item_bytes=2, experts=4, rank=16)
        assert named.choice("forward", m, n, k)[1] > named.roofs.floor(cost)
        assert named.choice("backward", m, n, k)[1] > named.roofs.floor(cost)


def test_the_fastest_of_what_serves_is_chosen():
    device = costs.device_of("sm_90", 132)
    for m in (64, 512, 4096):  # powers of two, which the choice goes by
        for n, k in SHAPES:
            _, time = configs.predicted("forward", m, n, k, "sm_90", 132)
            for config in configs.serving("forward", m, "sm_90"):
                for split in configs.SPLITS:
                    other = configs.bounded(replace(config, split=split), "forward", n, k)
                    assert time <= costs.forward(device, other, m, n, k)


def test_a_few_tokens_are_bound_by_bytes_and_many_by_arithmetic():
    """With the steps of loops, which neither shortens, left aside."""
    slow, fast = costs.Device(1000, 1e11, 1e14), costs.Device(1000, 2e11, 1e14)
    few = Config("single", 16, 32, 256, 16)
    one, other = (costs.forward(d, few, 1, 5120, 5120) for d in (slow, fast))
    fixed = 2 * other - one
    assert fixed < 6 and one - fixed == pytest.approx(2 * (other - fixed))
    strong = costs.Device(1000, 1e11, 2e14)
    assert costs.forward(strong, few, 1, 5120, 5120) == one
    assert costs.dense(slow, 12000, 5120, 5120) > 1.9 * costs.dense(strong, 12000, 5120, 5120)


def test_more_shares_where_few_tiles_would_leave_processors_idle():
    small = configs.predicted("forward", 1, 512, 5120, "sm_90", 132)[0]
    large = configs.predicted("forward", 1, 20480, 5120, "sm_90", 132)[0]
    assert small.split > large.split


@pytest.mark.parametrize(("capability", "processors"), [("sm_87", 16), ("sm_90", 132)])
def test_the_wider_side_is_not_gone_over_twice(capability, processors):
    """Of X [M, K] and Y [M, N]: a copy of X where K is short, a pass over Y where N is."""
    for m in (1500, 12000):
        for n, k, route in ((1280, 5120, "stacked"), (5120, 1280, "scratch")):
            assert configs.choose("forward", m, n, k, capability, processors).route == route


def test_low_bits_win_where_bytes_rule():
    """One token through a large layer: about a quarter of float16's bytes, and the experts'."""
    for named in BOARDS:
        one = named.choice("forward", 1, 5120, 1280)[1]
        assert one < 0.5 * costs.dense(named.device, 1, 5120, 1280)


def test_within_a_factor_of_two_of_what_an_h200_took():
    """The only times there are: of an earlier form of the kernels, which copied x apart."""
    device = costs.Device(132, 4300e9, 989e12)
    path = files("saml_kernels.backends.triton") / "tables" / "sm_90.json"
    table = json.loads(path.read_text())
    for row in (*table["forward"], *table["superseded"]):
        tiles = {name: row[name] for name in ("block_m", "block_o", "block_d") if name in row}
        config = Config(row["route"], split=1, **tiles)
        time = costs.forward(device, config, row["m"], row["n"], row["k"])
        assert 0.5 < time / row["microseconds"] < 1.1, row


def test_the_table_names_a_route_in_each_cell():
    found = rows(BOARDS[:1])
    assert len(found) == len(SHAPES) and "one launch" in found[0][2]
    assert all(len(row) > 2 + len(TOKENS) for row in found)
