"""Linear layers beside their peers: `pytest bench --benchmark-only` (short; `--full` for all).

pytest-benchmark groups, compares and stores; the times are those of the one clock of this project,
`saml_kernels.timing`, which it replays: all contenders of a case take their samples in turn, on a
GPU between device events, from cold caches. No test here passes or fails by a time.
"""

from __future__ import annotations

import pytest


class Replay:
    """A clock that stands still but for the samples it is given, in seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-9  # pytest-benchmark waits for a clock to tick before it trusts it
        return self.now

    def pass_by(self, microseconds: float) -> None:
        self.now += microseconds * 1e-6


CLOCK = Replay()


@pytest.mark.benchmark(timer=CLOCK)
def test_layer(case, name, measured, benchmark):
    samples = iter(measured(case, name))
    benchmark.group = case.label
    benchmark.name = name
    rounds = measured.setting.rounds
    benchmark.pedantic(lambda: CLOCK.pass_by(next(samples)), rounds=rounds, iterations=1)
