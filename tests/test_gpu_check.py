"""What bench/gpu_check.py makes of its checks, its tuning and its counters, without a GPU."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCH = Path(__file__).resolve().parent.parent / "bench"
CPU = torch.device("cpu")
pytest.importorskip("triton")


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu_check
    import gpu_checks
    import gpu_counters

    return SimpleNamespace(check=gpu_check, checks=gpu_checks, counters=gpu_counters)


def test_the_kernels_tests_are_found(scripts):
    names, said = scripts.checks.collected()
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
def test_verdict(tool, code, output, expected, scripts):
    assert scripts.checks.verdict(tool, code, output).startswith(expected)


def test_sanitizers_that_take_too_long_have_not_run(scripts, monkeypatch):
    def run(command, timeout, **how):
        if "compute-sanitizer" in command[0]:
            raise subprocess.TimeoutExpired(command, timeout)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(scripts.checks.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(scripts.checks.subprocess, "run", run)
    found = scripts.checks.sanitize()
    assert found["small case"] == "passed"
    assert found["memcheck"] == found["racecheck"] == "not run: unfinished after 75 s"

    def late(command, timeout, **how):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(scripts.checks.subprocess, "run", late)
    assert scripts.checks.sanitize() == {"small case": "unfinished after 180 s"}


@pytest.mark.parametrize(
    ("found", "fine"),
    [
        ({"memcheck": "passed", "racecheck": "failed: 1 error"}, True),
        ({"memcheck": "not run: Device not supported", "racecheck": "passed"}, True),
        ({"memcheck": "failed: 1 error", "racecheck": "passed"}, False),
        ({"small case": "failed: no kernel"}, False),
    ],
)
def test_what_blocks_timing(found, fine, scripts, tmp_path, monkeypatch):
    monkeypatch.setattr(scripts.check, "check_kernels", lambda minutes: "passed: 100 tests")
    monkeypatch.setattr(scripts.check, "sanitize", lambda: found)
    monkeypatch.setattr(scripts.check, "recomputation", lambda: [])
    assert scripts.check.check(CPU, tmp_path / "results", 1.0) == fine
    (path,) = (tmp_path / "results").glob("checks-*.json")
    assert json.loads(path.read_text())["checks"] == {"tests/kernels": "passed: 100 tests", **found}


def test_the_tuning_table_is_copied_if_there_is_one(scripts, tmp_path, monkeypatch, capsys):
    table, results = tmp_path / "table.json", tmp_path / "new" / "results"
    monkeypatch.setattr(scripts.check, "tune", lambda shapes, device, minutes: (table, 0))
    monkeypatch.setattr(scripts.check.configs, "device_traits", lambda device: ("sm_90", 132, "x"))
    scripts.check.tune_device(CPU, results, 0.0)
    assert "no time for a row" in capsys.readouterr().out and not results.exists()
    table.write_text("{}")
    scripts.check.tune_device(CPU, results, 1.0)
    assert [p.name for p in results.iterdir()] == ["sm_90.json"]
    assert (results / "sm_90.json").read_text() == "{}"


NCU = """==PROF== Connected to process 7
small talk
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","partial_kernel","gpu__time_duration.sum","ns","12,480"
"0","7","partial_kernel","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","61.25"
"1","7","finish_kernel","gpu__time_duration.sum","ns","n/a"
==PROF== Disconnected
"""


def test_counters(scripts, monkeypatch):
    monkeypatch.setattr(scripts.counters.shutil, "which", lambda name: None)
    assert scripts.counters.counters() == {"P1": "not run: no ncu", "P2": "not run: no ncu"}
    answers = iter([(0, NCU, ""), (1, "==ERROR== ERR_NVGPUCTRPERM\n==WARNING== no kernels", "")])

    def run(command, **how):
        code, out, err = next(answers)
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)

    monkeypatch.setattr(scripts.counters.shutil, "which", lambda name: "/bin/ncu")
    monkeypatch.setattr(scripts.counters.subprocess, "run", run)
    found = scripts.counters.counters()
    assert found["P2"] == "not run: ==ERROR== ERR_NVGPUCTRPERM"
    assert (found["P1"]["work"], found["P1"]["m"]) == ("P1", 1500)
    first, second = found["P1"]["kernels"]
    assert first == {
        "kernel": "partial_kernel", "gpu__time_duration.sum": 12480.0,
        "dram__throughput.avg.pct_of_peak_sustained_elapsed": 61.25,
    }  # fmt: skip
    assert second == {"kernel": "finish_kernel", "gpu__time_duration.sum": "n/a"}
