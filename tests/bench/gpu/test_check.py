"""`python -m bench gpu` without a GPU: what its steps do and write, at small sizes."""

import json
import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.gpu import check, checks, results
from bench.layers.roofline import Roofs
from bench.place import as_module, environment
from saml_kernels.backends.triton.configs import ROUTES

CPU = torch.device("cpu")
pytest.importorskip("triton")


def read(setting, step):
    return json.loads((setting.results / results.FILE).read_text())[step]


def test_what_it_takes_to_start_counts():
    setting = check.Setting(CPU, Path(), time.monotonic() - 3, True, False, None, None)
    assert setting.seconds == 0.0
    assert 4 < replace(setting, until=time.monotonic() + 5).seconds <= 5


@pytest.mark.parametrize(
    ("found", "code"),
    [
        ({"memcheck": "passed", "racecheck": "failed: 1 error"}, 0),
        ({"memcheck": "not run: Device not supported", "racecheck": "passed"}, 0),
        ({"memcheck": "failed: 1 error", "racecheck": "passed"}, 1),
        ({"small case": "failed: no kernel"}, 1),
    ],
)
def test_what_sanitizers_find(found, code, small, monkeypatch):
    monkeypatch.setattr(checks, "sanitize", lambda put: put(found) or found)
    assert check.perform("sanitizers", small)[0] == code
    assert read(small, "sanitizers")["sanitizers"] == found


def test_the_tuning_table_is_copied_after_each_row(small, tmp_path, monkeypatch):
    """However the step ends: the table itself lies in the user's folder, which is not kept."""
    table, rows = tmp_path / "table.json", []

    def tune(shapes, device, minutes, on_row):
        assert 60 * minutes < small.seconds - 20  # the last row comes to its end
        for i, row in enumerate(rows):
            table.write_text(f'["{i}"]')
            on_row(i + 1, 2, row)
            assert (small.results / "sm_90.json").read_text() == f'["{i}"]'
        return table, len(rows)

    monkeypatch.setattr("saml_kernels.backends.triton.tuning.tune", tune)
    traits = "saml_kernels.backends.triton.configs."
    monkeypatch.setattr(traits + "device_traits", lambda device: ("sm_90", 132, "x"))
    monkeypatch.setattr(traits + "user_table", lambda capability, device: table)
    assert check.perform("tune", small) == (check.NOT_RUN, "no time for a row")
    assert not small.results.exists()
    rows[:] = [
        {"microseconds": 2.0, "before_microseconds": 4.0},
        {"microseconds": 2.0, "before_microseconds": None},
    ]
    code, said = check.perform("tune", small)
    assert code == 0 and "2 rows, 2.00x in the mean" in said
    assert [p.name for p in small.results.iterdir()] == ["sm_90.json"]


def test_unknown_steps_are_refused():
    call = [*as_module("bench"), "gpu", "--do", "P7"]
    done = subprocess.run(call, capture_output=True, text=True, env=environment())
    assert done.returncode == 2 and done.stderr.startswith(
        "--do P7: expected some of shapes, properties, suite"
    )


@pytest.mark.slow
def test_the_whole_script_on_a_cpu(tmp_path):
    """Shapes and the suite under Triton's interpreter, from a folder of the user's."""
    call = [*as_module("bench"), "gpu", "--device", "cpu", "--small", "--minutes", "9"]
    call += ["--do", "shapes,suite,compile,speech", "--results", "found", "--commit", "abc"]
    where = {"env": environment(os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})}
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, **where)
    assert done.returncode == 0, done.stdout + done.stderr
    _, summary = done.stdout.split("Summary:\n")
    told = {line.split()[0]: line.partition(" s: ")[2] for line in summary.splitlines()[:-1]}
    calls = 1 + len(ROUTES)
    assert told == {
        "shapes": f"passed: {calls} of {calls} calls", "suite": "passed: 1 passed",
        "compile": "done: 2 of 2 layers",
        "speech": "no --model-folder; `saml quantize` makes one",
    }  # fmt: skip
    assert {p.name for p in (tmp_path / "found").iterdir()} == {results.FILE, check.LOG}
    whole = json.loads((tmp_path / "found" / results.FILE).read_text())
    assert whole["suite"]["tests"] == {"passed": 1, "wrong": {}}
    data = whole["shapes"]
    assert data["about"]["commit"] == "abc" and {"torch", "triton"} <= set(
        data["about"]["versions"]
    )
    names = {"y", "dx", "da", "db", "dgates"}
    assert [set(row["errors"]) for row in data["shapes"]] == [names] * calls
    assert [set(row["worst_rows"]) for row in data["shapes"]] == [names] * calls
    assert "the operator" in {row["route"] for row in data["shapes"]}


def test_layers_on_a_cpu(small, monkeypatch):
    monkeypatch.setattr("saml_kernels.timing.overwrite_caches", lambda device: None)
    monkeypatch.setattr("bench.layers.harness.measure_roofs", lambda *where: Roofs(2e10, 5e10))
    monkeypatch.setattr(check, "WORKS", {"P9": 2, "P11": 1})
    code, said = check.perform("layers", small)
    assert code == 0 and said.startswith("2 of 2 shapes; eager experts / dense "), said
    assert "eager base / dense " in said
    works = json.loads((small.results / "layers.json").read_text())["works"]
    assert {r["router"] for r in works["P9"]["rows"]} == {"token"}
    assert {r["experts"] for r in works["P11"]["rows"]} == {0}
    assert "torch.compile of the reference" not in {r["contender"] for r in works["P9"]["rows"]}
    assert check.perform("P11", replace(small, until=0.0)) == (0, "0 of 1 shapes; time is up")
    compiled = check._compiled
    with monkeypatch.context() as patch:
        patch.setattr(check, "_run_layers", lambda works, setting, file, among: (file, among))
        file, among = compiled("compiled", small)
    assert file == "compiled.json" and among(SimpleNamespace(slow_build=True, name=""))


def test_a_case_that_fails_leaves_the_others(small, monkeypatch):
    monkeypatch.setattr("bench.layers.harness.measure_roofs", lambda *where: Roofs(2e10, 5e10))

    def run_cases(cases, layers, found, minutes):
        if cases[0].work == "P9":
            raise RuntimeError("an illegal memory access\nand more")
        found.add(cases[0].work, "", [], {})

    monkeypatch.setattr("bench.layers.harness.run_cases", run_cases)
    monkeypatch.setattr(check, "WORKS", {"P9": 2, "P11": 1})
    code, said = check.perform("layers", small)
    assert code == 1 and said.startswith("failed: 1; 1 of 2 shapes; P9 eager ")
    assert said.endswith("RuntimeError: an illegal memory access")
    works = json.loads((small.results / "layers.json").read_text())["works"]
    assert set(works) == {"P9", "P11"} and "failed" in next(iter(works["P9"]["skipped"].values()))
    # Where the device is lost, the other works are another process's.
    monkeypatch.setattr(results, "lost", lambda: True)
    calls = []
    monkeypatch.setattr(check.subprocess, "call", lambda call, env: calls.append(call) or 0)
    code, said = check.perform("layers", small)
    assert code == 1 and calls[0][-2:] == ["--after", "P9"] and "the device was lost" in said
    assert check.perform("layers", replace(small, after="P9"))[1].startswith("1 of 1 shapes")


def test_the_hosts_program_is_asked(small, tmp_path, monkeypatch):
    assert check.HOST == ("bench", "host")
    monkeypatch.setattr(check, "HOST", ("some_host",))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    program = tmp_path / "some_host.py"
    program.write_text(
        "import sys\n"
        "open(sys.argv[sys.argv.index('--json') + 1], 'w').write('[90.0]')\n"
        "print('90 us')"
    )
    assert check.perform("host", small) == (0, "90 us")
    late = replace(small, until=time.monotonic() + 0.01)
    assert check.perform("host", late) == (check.NOT_RUN, "not done in time, 0 lines")
    assert check.perform("host", small)[0] == 0
    assert read(small, "host")["host"] == [90.0] and "versions" in read(small, "host")["about"]
    program.write_text("raise SystemExit('no tensors')")
    assert check.perform("host", small) == (1, "no tensors")


def test_whole_models_on_a_cpu(small, model_folder, monkeypatch):
    monkeypatch.setattr("saml_kernels.timing.overwrite_caches", lambda device: None)
    code, said = check.perform("models", replace(small, model_folder=model_folder))
    assert code == 0, said
    found = read(small, "models")
    for part in ("encoder", "token", "training step"):
        ours = next(row for row in found[part] if row["contender"] == "saml")
        assert part in said and ours["peak_bytes"] > 0
    weights = {r["contender"]: r["weight_bytes"] for r in found["encoder"]}
    assert weights["saml"] < weights["dense"] / 2
    assert {r["contender"] for r in found["encoder"]} == {"dense", "saml"}
    assert all(r["ratio"] > 0 for r in found["encoder"])


def test_speech_on_a_cpu(small, model_folder, speech_root):
    clips = speech_root / "LibriSpeech" / "train-clean-5" / "163"
    setting = replace(small, model_folder=model_folder, speech=clips)
    code, said = check.perform("speech", setting)
    assert code == 0, said
    found = read(small, "speech")
    assert found["clips"]["clips"] == len(found["clips"]["texts"]) == 2
    assert found["adaptation"]["steps"] >= 1 and found["adaptation"]["speaker"] == "163"
    assert found["clips"]["wer"] > 0 and found["adaptation"]["wer_after"] > 0


def test_speech_needs_a_folder_and_a_corpus(small, tmp_path):
    assert check.perform("speech", small)[0] == check.NOT_RUN
    found = check.perform("speech", replace(small, model_folder=tmp_path))
    assert found == (check.NOT_RUN, "no --speech")
