"""`python -m bench gpu` without a GPU: its steps at small sizes, its limits, its files."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from synthetic import small_whisper

from bench.gpu import check, checks, counters, models, results
from bench.layers.roofline import Roofs
from bench.place import as_module, environment
from saml_kernels import SAMLConfig
from saml_kernels.backends import reference
from saml_kernels.backends.triton.configs import ROUTES
from saml_models.compress.apply import apply_saml
from saml_models.compress.checkpoint import save_saml

CPU = torch.device("cpu")
pytest.importorskip("triton")


@pytest.fixture
def small(tmp_path):
    """A step's setting on the CPU."""
    return check.Setting(CPU, tmp_path / "results", 500.0, True, False, None, None)


def read(setting, name):
    return json.loads((setting.results / f"{name}.json").read_text())


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
    monkeypatch.setattr(checks, "sanitize", lambda: found)
    assert check.perform("sanitizers", small)[0] == code
    assert read(small, "sanitizers")["sanitizers"] == found


def test_the_tuning_table_is_copied_if_there_is_one(small, tmp_path, monkeypatch):
    table = tmp_path / "table.json"
    monkeypatch.setattr(
        "saml_kernels.backends.triton.tuning.tune", lambda shapes, device, minutes: (table, 0)
    )
    traits = "saml_kernels.backends.triton.configs.device_traits"
    monkeypatch.setattr(traits, lambda device: ("sm_90", 132, "x"))
    assert check.perform("tune", small) == (check.NOT_RUN, "no time for a row")
    assert not small.results.exists()
    table.write_text("{}")
    assert check.perform("tune", small)[0] == 0
    assert [p.name for p in small.results.iterdir()] == ["sm_90.json"]
    assert (small.results / "sm_90.json").read_text() == "{}"


def test_everything_gets_its_least_within_five_minutes():
    steps, budget = check.STEPS, 4.8 * 60
    left = budget
    for i, step in enumerate(steps):
        limit = check.limit_of(step, steps[i + 1 :], left)
        assert step.least <= limit <= step.most
        left -= limit
    assert left >= 0 and budget < 300
    files = {"layers" if s.name.startswith("P") else s.name for s in steps}
    assert len(files) <= 8
    # With less, the first come first; who could not be served anyway is not saved for.
    step, large = check.Step("a", 20, 60), check.Step("b", 30, 60)
    assert check.limit_of(step, [large], 55.0) == 25.0
    assert check.limit_of(step, [large], 45.0) == 45.0
    assert check.limit_of(step, [large], 19.0) is None


SCRIPT = """
import subprocess, sys, time
name, seconds = sys.argv[-3], float(sys.argv[-1])
print("noise")
if name == "long":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    open(sys.argv[1], "w").write(str(child.pid))
    time.sleep(60)
if name == "broken":
    print("RuntimeError: no kernel image")
    sys.exit(1)
if name == "absent":
    print("there is no such thing here")
    sys.exit(3)
print(f"all is well with {seconds:.0f} s")
"""


def test_no_step_stops_another(tmp_path, capsys):
    script, pid = tmp_path / "script.py", tmp_path / "pid"
    script.write_text(SCRIPT)
    step, call = check.Step, [sys.executable, str(script), str(pid)]
    steps = [step("long", 1, 3), step("broken", 1, 50), step("absent", 1, 50)]
    steps += [step("fine", 1, 50), step("large", 500, 600)]
    found = check.run_steps(steps, call, 100.0)
    ended = {outcome.step: (outcome.ended, outcome.said) for outcome in found}
    assert ended["long"] == ("stopped", "not done in 3 s; its file has what it had found")
    assert ended["broken"] == ("failed", "RuntimeError: no kernel image")
    assert ended["absent"] == ("not run", "there is no such thing here")
    assert ended["fine"] == ("done", "all is well with 46 s")  # less what ending takes
    assert ended["large"][0] == "not run" and ended["large"][1].endswith("it needs 500")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(ended)
    status = Path(f"/proc/{pid.read_text()}/status")
    assert not status.exists() or "zombie" in status.read_text()  # the child as well


def test_unknown_steps_are_refused():
    call = [*as_module("bench"), "gpu", "--do", "P7"]
    done = subprocess.run(call, capture_output=True, text=True, env=environment())
    assert done.returncode == 2 and done.stderr.startswith(
        "--do P7: expected some of shapes, suite"
    )


@pytest.mark.slow
def test_the_whole_script_on_a_cpu(tmp_path):
    """Shapes and the suite under Triton's interpreter, from a folder of the user's."""
    call = [*as_module("bench"), "gpu", "--device", "cpu", "--small", "--minutes", "9"]
    call += ["--do", "shapes,suite,models", "--results", "found", "--commit", "abc"]
    where = {"env": environment(os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})}
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, **where)
    assert done.returncode == 0, done.stdout + done.stderr
    _, summary = done.stdout.split("Summary:\n")
    told = {line.split()[0]: line.partition(" s: ")[2] for line in summary.splitlines()[:-1]}
    calls = 1 + len(ROUTES)
    assert told == {
        "shapes": f"passed: {calls} of {calls} calls", "suite": "passed",
        "models": "no --model-folder; `saml quantize` makes one",
    }  # fmt: skip
    assert {p.name for p in (tmp_path / "found").iterdir()} == {"shapes.json", "suite.json"}
    data = json.loads((tmp_path / "found" / "shapes.json").read_text())
    assert data["about"]["commit"] == "abc" and {"torch", "triton"} <= set(
        data["about"]["versions"]
    )
    names = {"y", "dx", "da", "db", "dgates"}
    assert [set(row["errors"]) for row in data["shapes"]] == [names] * calls
    assert "the operator" in {row["route"] for row in data["shapes"]}


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


def test_layers_on_a_cpu(small, monkeypatch):
    monkeypatch.setattr("saml_kernels.timing.overwrite_caches", lambda device: None)
    monkeypatch.setattr("bench.layers.harness.measure_roofs", lambda *where: Roofs(2e10, 5e10))
    for work in ("P9", "P11"):
        code, said = check.perform(work, small)
        assert code == 0 and said.startswith("1 of 1 shapes")
    works = read(small, "layers")["works"]  # one file for all
    assert {r["router"] for r in works["P9"]["rows"]} == {"token"}
    assert {r["experts"] for r in works["P11"]["rows"]} == {0}


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
    assert read(small, "host")["host"] == [90.0] and "versions" in read(small, "host")["about"]
    program.write_text("raise SystemExit('no tensors')")
    assert check.perform("host", small) == (1, "no tensors")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tiny_en):
    """What `saml quantize` writes, of a Whisper with d = 64 and random weights."""
    whole, processor = tiny_en
    model = small_whisper(vocabulary=whole.config.vocab_size)
    model.generation_config = whole.generation_config
    for name in ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(whole.config, name))
    apply_saml(model, SAMLConfig(expert_init="lora"))
    folder = tmp_path_factory.mktemp("model")
    save_saml(model, processor, folder)
    return folder


def test_whole_models_on_a_cpu(small, model_folder, monkeypatch):
    monkeypatch.setattr("saml_kernels.timing.overwrite_caches", lambda device: None)
    code, said = check.perform("models", replace(small, model_folder=model_folder))
    assert code == 0, said
    found = read(small, "models")
    for part in ("encoder", "token", "training step"):
        assert "saml" in {row["contender"] for row in found[part]} and part in said
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


def test_models_need_a_folder_and_speech(small, tmp_path):
    assert check.perform("models", small)[0] == check.NOT_RUN
    found = check.perform("speech", replace(small, model_folder=tmp_path))
    assert found == (check.NOT_RUN, "no --speech")


def test_what_takes_too_long_is_broken_off():
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="not done in 0 s"), results.within(0.2):
        time.sleep(60)
    assert time.monotonic() - started < 55
    with results.within(60):
        pass
    time.sleep(0.01)  # nothing is left to go off


def test_a_part_that_fails_or_takes_too_long_leaves_the_others(tmp_path):
    def late(place):
        raise TimeoutError("not done in 20 s")

    def fail(place):
        raise ValueError("no such layer\nat all")

    parts = {"slow": late, "bad": fail, "good": lambda place: {"seconds": 2}}
    path = tmp_path / "models.json"
    sheet, place = results.Sheet(path, CPU), models.Place(tmp_path, CPU, None)
    said = models.measure(parts, place, sheet, 600.0)
    assert said == (
        "slow failed: TimeoutError: not done in 20 s; bad failed: ValueError: no such layer; "
        "good seconds 2"
    )
    found = json.loads(path.read_text())
    assert found["good"] == {"seconds": 2} and found["bad"]["failed"] == "ValueError: no such layer"
    said = models.measure(parts, place, sheet, 0.5)
    assert said.count("no time is left") == 3


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
