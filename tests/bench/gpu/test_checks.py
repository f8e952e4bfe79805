"""Shapes, the suite and sanitizers of `bench gpu`, without a GPU."""

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

from bench.gpu import checks
from saml_kernels.backends import reference

pytest.importorskip("triton")


def test_the_kernels_tests_are_found():
    names, said = checks.collected()
    assert len(names) >= 100, said
    assert any("random_shapes" in n for n in names) and any("test_lookup" in n for n in names)


NOTHING = "small case: done\n========= ERROR SUMMARY: 0 errors\n"
RACES = "small case: done\n========= RACECHECK SUMMARY: {} hazards displayed ({})\n"


@pytest.mark.parametrize(
    ("tool", "code", "output", "expected"),
    [
        ("memcheck", 0, NOTHING, "passed"),
        ("memcheck", 9, "========= Invalid read\n========= ERROR SUMMARY: 2 errors", "failed: ==="),
        ("memcheck", 0, "========= ERROR SUMMARY: 0 errors", "not run: exit code 0"),
        ("memcheck", 1, "no GPU\n========= ERROR SUMMARY: 0 errors", "not run: no GPU"),
        (
            "memcheck", 1,
            "========= Error: Device not supported.\n=========\n========= ERROR SUMMARY: 1 error",
            "not run: Error: Device not supported.",
        ),
        ("memcheck", 127, "", "not run: exit code 127"),
        ("racecheck", 0, RACES.format(0, "0 errors, 0 warnings"), "passed"),
        ("racecheck", 9, RACES.format(1, "0 errors, 1 warning"), "passed"),
        ("racecheck", 9, RACES.format(2, "1 error, 1 warning"), "failed: small case"),
    ],
)  # fmt: skip
def test_verdict(tool, code, output, expected):
    assert checks.verdict(tool, code, output).startswith(expected)


def test_sanitizers_that_take_too_long_have_not_run(monkeypatch):
    def run(command, timeout, **how):
        if "compute-sanitizer" in command[0]:
            raise subprocess.TimeoutExpired(command, timeout)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(checks.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(checks.subprocess, "run", run)
    found = checks.sanitize()
    assert found["small case"] == "passed"
    assert found["memcheck"] == found["racecheck"] == "not run: unfinished after 75 s"

    def late(command, timeout, **how):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(checks.subprocess, "run", late)
    assert checks.sanitize() == {"small case": "unfinished after 180 s"}


def specification(off=lambda *grads: grads):
    """Stands for the kernels: forward and backward by the specification, the gradients `off`."""

    def forward(x, weight, a, b, gates, bias, scaling, route, routing):
        given = gates if routing is None else reference.route(x, gates)
        return reference.forward(x, weight, a, b, given, bias, scaling)

    def backward(dy, x, weight, a, b, gates, scaling, needs, route, routing):
        leaves = [t.detach().clone().requires_grad_() for t in (x, a, b, gates)]
        forward(leaves[0], weight, *leaves[1:], None, scaling, route, routing).backward(dy)
        return off(*(t.grad for t in leaves))

    return forward, backward


@pytest.mark.parametrize("gates", ["given", "sparse", "token"])
def test_what_is_wrong_at_a_real_shape_is_found(gates, monkeypatch):
    shape = checks.Shape(48, 64, 64, 4, 16, "float32", gates)

    def judge(forward, backward):
        monkeypatch.setattr(checks, "forward", forward)
        monkeypatch.setattr(checks, "backward", backward)
        return checks.check_shape(shape, "split", "cpu")

    right = judge(*specification())
    assert "failed" not in right and max(right["errors"].values()) < 1e-4
    for i, name in enumerate(("dx", "da", "db", "dgates")):
        halved = judge(
            *specification(lambda *g, i=i: [t / (1 + (j == i)) for j, t in enumerate(g)])
        )
        assert halved["failed"] == f"{name} is off by 5.0e-01"

    def one_row(dx, *others):
        dx[7] = 0
        return dx, *others

    found = judge(*specification(one_row))
    assert found["worst_rows"]["dx"] > 0.5 > found["errors"]["dx"]
    kept = []

    def stale(*grads):
        kept.append(grads)
        return kept[0]

    assert judge(*specification(stale))["errors"]["dx"] == float("inf")

    def broken(*arguments, **how):
        raise RuntimeError("out of resources\nmuch more")

    assert judge(broken, broken)["failed"] == "RuntimeError: out of resources"


def test_real_shapes_begin_with_what_went_wrong():
    first = checks.REAL_SHAPES[:4]
    assert {(s.m, s.n, s.k, s.experts, s.rank) for s in first} == {(300, 512, 512, 4, 16)}
    assert {(s.dtype, s.gates) for s in first} == {
        (d, g) for d in ("float16", "bfloat16") for g in ("given", "token")
    }


def test_a_wrong_row_is_told_from_noise():
    expected = torch.randn(300, 64, dtype=torch.float64)
    noisy = expected + 1e-3 * torch.randn_like(expected)
    assert checks.worst_row(noisy, expected) < 2e-3
    noisy[17, :16] = 0  # the columns of a tile, of one row
    assert checks.worst_row(noisy, expected) > 0.2 > float((noisy - expected).norm() / 138)
    noisy[3] = float("nan")
    assert checks.worst_row(noisy, expected) == float("inf")


PYTEST = """
tests/a.py::test_one[scale after-None] PASSED                              [ 25%]
tests/a.py::test_two SKIPPED (no device)                                   [ 50%]
tests/a.py::test_three FAILED                                              [ 75%]
tests/a.py::test_four Fatal Python error: Segmentation fault
"""


def test_what_pytest_printed_so_far():
    counts, wrong, ended = checks.read_tests(PYTEST)
    assert counts == {"passed": 1, "skipped": 1, "failed": 1}
    assert wrong == ["tests/a.py::test_three"] and "tests/a.py::test_four" not in ended
    assert "tests/a.py::test_one[scale after-None]" in ended


TESTS = """
import os, time
def test_right(): pass
def test_wrong(): assert False, "so wrong"
def test_after(): pass
def test_dies(): os._exit(7)
def test_last(): pass
def test_slow(): time.sleep(60)
"""


def test_tests_after_one_that_fails_or_dies_run_too(tmp_path, monkeypatch):
    file = tmp_path / "test_some.py"
    file.write_text(TESTS)
    monkeypatch.setattr(checks, "REPOSITORY", tmp_path)
    monkeypatch.setattr(checks, "workers", lambda: 1)
    names, told = [line.split("(")[0].split()[1] for line in TESTS.splitlines()[2:]], []
    only = [f"test_some.py::{name}" for name in names]
    said = checks.check_kernels(20.0, only[:-1], lambda found: told.append(json.dumps(found)))
    assert said == (
        "failed: 1 died, 1 failed, 3 passed; test_some.py::test_wrong; test_some.py::test_dies"
    )
    found = json.loads(told[-1])
    assert "so wrong" in found["wrong"]["test_some.py::test_wrong"] and found["passed"] == 3
    said = checks.check_kernels(6.0, [only[0], only[-1]])
    assert said == "unfinished: 1 of 1 shares of 2 tests; 1 passed"
