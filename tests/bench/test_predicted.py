"""The cost model: what it must say whatever its constants are."""

import pytest

from bench.layers import predicted
from bench.layers.predicted import BOARDS, SHAPES, Board, dense, operator
from bench.layers.roofline import linear_cost


@pytest.mark.parametrize("board", BOARDS, ids=lambda b: b.name)
@pytest.mark.parametrize("m", [1, 16, 1500])
def test_never_below_the_roofline(board, m):
    for n, k in SHAPES:
        cost = linear_cost(m, n, k, weight_bytes=n * k / 2, item_bytes=2, experts=4, rank=16)
        assert operator(board, m, n, k) > board.roofs.floor(cost)


def test_a_few_tokens_are_bound_by_bytes_and_many_by_arithmetic():
    slow, fast = Board("", 100, 100), Board("", 200, 100)
    launch = predicted.LAUNCH_US
    one, other = (operator(b, 1, 1280, 5120) - launch for b in (slow, fast))
    assert one == pytest.approx(2 * other)
    strong = Board("", 100, 200)
    assert operator(slow, 1, 1280, 5120) == operator(strong, 1, 1280, 5120)
    assert dense(slow, 12000, 5120, 5120) > 1.9 * dense(strong, 12000, 5120, 5120)


def test_low_bits_win_where_bytes_rule():
    """One token through a large layer: about a quarter of float16's bytes, and the experts'."""
    for board in BOARDS:
        assert operator(board, 1, 5120, 1280) < 0.5 * dense(board, 1, 5120, 1280)
        assert operator(board, 1500, 5120, 1280) > dense(board, 1500, 5120, 1280)
