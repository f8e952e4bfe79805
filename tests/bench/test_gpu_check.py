"""`python -m bench gpu` without a GPU: its steps at small sizes, its limits, its files."""

import json
import os
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from synthetic import small_whisper

from bench.gpu import ahead, check, checks, counters, models, processes, properties, results
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
    until = time.monotonic() + 500
    return check.Setting(CPU, tmp_path / "results", until, True, False, None, None)


def read(setting, step):
    return json.loads((setting.results / results.FILE).read_text())[step]


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


def test_everything_gets_its_least_within_five_minutes():
    steps = check.STEPS
    for minutes in (4.8, 8.5):
        left = 60 * minutes
        for i, step in enumerate(steps):
            limit = check.limit_of(step, steps[i + 1 :], left)
            assert step.least <= limit <= step.most
            left -= limit
        assert left >= 0
    # With less, the first come first; who could not be served anyway is not saved for.
    step, large = check.Step("a", 20, 60), check.Step("b", 30, 60)
    assert check.limit_of(step, [large], 55.0) == 25.0
    assert check.limit_of(step, [large], 45.0) == 45.0
    assert check.limit_of(step, [large], 19.0) is None


def test_what_it_takes_to_start_counts():
    setting = check.Setting(CPU, Path(), time.monotonic() - 3, True, False, None, None)
    assert setting.seconds == 0.0
    assert 4 < replace(setting, until=time.monotonic() + 5).seconds <= 5


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
    log = tmp_path / "results" / "log.txt"
    found = check.run_steps(steps, call, 100.0, log=log)
    ended = {outcome.step: (outcome.ended, outcome.said) for outcome in found}
    assert ended["long"] == ("stopped", "not done in 3 s; its file has what it had found")
    assert ended["broken"] == ("failed", "RuntimeError: no kernel image")
    assert ended["absent"] == ("not run", "there is no such thing here")
    assert ended["fine"] == ("done", "all is well with 45 s")  # less what ending takes
    assert ended["large"][0] == "not run" and ended["large"][1].endswith("it needs 500")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(ended)
    status = Path(f"/proc/{pid.read_text()}/status")
    assert not status.exists() or "zombie" in status.read_text()  # the child as well
    logged = log.read_text().splitlines()
    assert [line.split()[1] for line in logged if line.startswith("== ")] == list(ended)[:-1]
    assert logged.count("noise") == 4 and "RuntimeError: no kernel image" in logged


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


def test_a_model_with_random_weights_does_without_a_folder():
    model, processor = models.Place(None, CPU, models.SMALL).quantised()
    assert processor is None and model.config.d_model == 512 and len(model.saml.layers) > 90
    assert not model.saml.weights["model.encoder.layers.0.fc1.weight"].codes.is_meta


def test_tokens_are_timed_without_saying_loops_again(model_folder):
    """Of noise, texts that never end are loops; `greedy` would say each again, six times over."""
    model, _ = models.Place(model_folder, CPU, models.SMALL).quantised()
    ends = model.generation_config.eos_token_id
    model.generation_config.suppress_tokens = [ends]
    window = (torch.randn(2, 80, 3000), torch.ones(2, 1500, dtype=torch.bool))
    steps = []
    from saml_models.models.whisper import greedy

    before = greedy.Step.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greedy.Step, "__call__", lambda *given: steps.append(1) or before(*given))
        models.decode(model, window, 20)
    assert len(steps) == 20


def test_speech_needs_a_folder_and_a_corpus(small, tmp_path):
    assert check.perform("speech", small)[0] == check.NOT_RUN
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

    def alone(place):
        warnings.warn("training goes on without CUDA graphs: it waits", stacklevel=2)
        warnings.warn("something else", stacklevel=2)
        return {"seconds": 2}

    sheet, place = results.Sheet(tmp_path, "models", CPU), models.Place(tmp_path, CPU, None)
    said = models.measure({"alone": alone}, place, sheet, 600.0)
    assert said == "alone seconds 2; failed: training goes on without CUDA graphs: it waits"
    said = models.measure({"bare": lambda place: import_module("soundfiles")}, place, sheet, 9.0)
    assert said == "bare not run: ModuleNotFoundError: No module named 'soundfiles'"
    said = models.measure(parts, place, sheet, 600.0)
    assert said == (
        "slow failed: TimeoutError: not done in 20 s; bad failed: ValueError: no such layer; "
        "good seconds 2"
    )
    found = json.loads((tmp_path / results.FILE).read_text())["models"]
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


def test_ncu_leaves_the_clocks_alone(monkeypatch):
    calls = []

    def run(command, **how):
        calls.append(command)
        return SimpleNamespace(returncode=1, stdout="", stderr="")

    monkeypatch.setattr(counters.shutil, "which", lambda name: "/bin/ncu")
    monkeypatch.setattr(counters.subprocess, "run", run)
    counters.counters()
    assert all(c[c.index("--clock-control") + 1] == "none" for c in calls) and len(calls) == 2


def test_steps_share_one_file(tmp_path):
    first = results.Sheet(tmp_path, "shapes", CPU)
    first.put("said", "passed")
    results.Sheet(tmp_path, "suite", CPU).put("said", "unfinished")
    results.Sheet(tmp_path, "shapes", CPU)  # begun again, and ended before it found something
    found = json.loads((tmp_path / results.FILE).read_text())
    assert found["suite"]["said"] == "unfinished" and set(found["shapes"]) == {"about"}
    (tmp_path / results.FILE).write_text("{")
    results.Sheet(tmp_path, "suite", CPU).put("said", "passed")
    assert set(json.loads((tmp_path / results.FILE).read_text())) == {"suite"}


@pytest.mark.parametrize("name", ["rounding", "profiles", "decoding"])
def test_properties_hold_on_a_cpu(name):
    code, said = properties.check_property(name, CPU)
    assert code == 0 and said


def test_a_property_that_does_not_hold_is_told(monkeypatch):
    """Each compares what it must: spoiled, it fails."""
    from saml_models.compress import rounding_file
    from saml_models.speakers import mixing

    read, mixed = rounding_file.read_rounding, mixing.mixed_batch

    def spoiled(*given):
        found = read(*given)
        found.weights["model.encoder.layers.0.fc1"].codes[5] ^= 1
        return found

    monkeypatch.setattr(rounding_file, "read_rounding", spoiled)
    with pytest.raises(AssertionError, match=r"fc1.*: other codes than the file's"):
        properties.rounding(CPU)
    monkeypatch.setattr(mixing, "mixed_batch", lambda m, speakers: mixed(m, speakers[::-1]))
    with pytest.raises(AssertionError, match="clip 1 is off by"):
        properties.profiles(CPU)
    with pytest.raises(AssertionError, match="in a row"):
        wrong = torch.ones(400, 4)
        wrong[3] = 1.5
        properties.near("y", wrong, torch.ones(400, 4), 0.05)
    with pytest.raises(AssertionError, match="y is off by inf"):
        properties.near("y", torch.full((2, 2), float("nan")), torch.ones(2, 2), 1.0)


def test_properties_are_asked_side_by_side(monkeypatch):
    answers = {
        "counters": (0, "30 graphs\n", ""), "autocast": (1, "", "Traceback\nAssertionError: dx"),
        "network": (properties.NOT_RUN, "needs a CUDA device\n", ""), "training": None,
    }  # fmt: skip

    def run(call, timeout, **how):
        answer = answers[call[call.index("--step") + 1].removeprefix("property-")]
        if answer is None:
            raise subprocess.TimeoutExpired(call, timeout)
        return SimpleNamespace(**dict(zip(("returncode", "stdout", "stderr"), answer, strict=True)))

    kept = {name: properties.PROPERTIES[name] for name in answers}
    monkeypatch.setattr(properties, "PROPERTIES", kept)
    monkeypatch.setattr(properties.subprocess, "run", run)
    puts = []
    said = properties.check_properties(CPU, 50.0, lambda found: puts.append(len(found)))
    assert said.startswith("failed: 1 failed, 1 unfinished, 1 not run, 1 passed; autocast: Asser")
    assert "training unfinished after 50 s" in said and puts == [1, 2, 3, 4]
