"""Nsight Compute's counters, without it."""

from types import SimpleNamespace

import pytest

from bench.gpu import counters

pytest.importorskip("triton")


NCU = """==PROF== Connected to process 7
small talk
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","partial_kernel","gpu__time_duration.sum","ns","12,480"
"0","7","partial_kernel","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","61.25"
"1","7","finish_kernel","gpu__time_duration.sum","ns","n/a"
==PROF== Disconnected
"""


def test_counters(monkeypatch):
    monkeypatch.setattr(counters.shutil, "which", lambda name: None)
    assert counters.counters() == {"P1": "not run: no ncu", "P2": "not run: no ncu"}
    answers = iter([(0, NCU, ""), (1, "==ERROR== ERR_NVGPUCTRPERM\n==WARNING== no kernels", "")])

    def run(command, **how):
        code, out, err = next(answers)
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)

    monkeypatch.setattr(counters.shutil, "which", lambda name: "/bin/ncu")
    monkeypatch.setattr(counters.subprocess, "run", run)
    found = counters.counters()
    assert found["P2"] == "not run: ==ERROR== ERR_NVGPUCTRPERM"
    assert (found["P1"]["work"], found["P1"]["m"]) == ("P1", 1500)
    first, second = found["P1"]["kernels"]
    assert first == {
        "kernel": "partial_kernel", "gpu__time_duration.sum": 12480.0,
        "dram__throughput.avg.pct_of_peak_sustained_elapsed": 61.25,
    }  # fmt: skip
    assert second == {"kernel": "finish_kernel", "gpu__time_duration.sum": "n/a"}


def test_ncu_leaves_the_clocks_alone(monkeypatch):
    calls = []

    def run(command, **how):
        calls.append(command)
        return SimpleNamespace(returncode=1, stdout="", stderr="")

    monkeypatch.setattr(counters.shutil, "which", lambda name: "/bin/ncu")
    monkeypatch.setattr(counters.subprocess, "run", run)
    counters.counters()
    assert all(c[c.index("--clock-control") + 1] == "none" for c in calls) and len(calls) == 2
