"""Calls shared out among processes, and layers compiled ahead in them."""

import os
import time

from bench.gpu import ahead, processes


def task(what):
    """Of `shared_out`, in a process of its own."""
    if what == "dies":
        os._exit(3)
    if what == "raises":
        raise ValueError("no such layer\nat all")
    if what == "hangs":
        time.sleep(60)
    return {"said": what}


def test_a_task_that_dies_or_raises_spoils_its_own_alone():
    tasks = [(what,) for what in ("dies", "one", "raises", "two")]
    rows = {row.pop("task"): row for row in processes.shared_out(task, tasks, 100.0, 2)}
    assert rows[0] == {"failed": "the process died"} and rows[1] == {"said": "one"}
    assert rows[2]["failed"] == "ValueError: no such layer" and rows[3] == {"said": "two"}
    assert not list(processes.shared_out(task, [("one",)], 0.0))


def test_layers_are_compiled_ahead_once():
    cases = ahead.distinct("cuda", False)
    assert len(set(cases)) == len(cases) and {c.mode for c in cases} == {"eager", "train"}
    assert {c.k for c in cases} >= {384, 512, 1280} and {c.m for c in cases} >= {1, 5, 12000}
    assert all(c.autocast for c in cases if c.work == "P10")
    case = ahead.Case("P9", "eager", 3, 64, 64, router="token")
    row = ahead.compile_case(case, "saml base", "cpu")
    assert row["contender"] == "saml base"
