"""Steps of `bench gpu`: their limits, and their ends."""

import sys
from pathlib import Path

from bench.gpu.check import STEPS
from bench.gpu.steps import Step, limit_of, run_steps


def test_everything_gets_its_least_within_five_minutes():
    for minutes in (4.8, 8.5):
        left = 60 * minutes
        for i, step in enumerate(STEPS):
            limit = limit_of(step, STEPS[i + 1 :], left)
            assert step.least <= limit <= step.most
            left -= limit
        assert left >= 0
    # With less, the first come first; who could not be served anyway is not saved for.
    step, large = Step("a", 20, 60), Step("b", 30, 60)
    assert limit_of(step, [large], 55.0) == 25.0
    assert limit_of(step, [large], 45.0) == 45.0
    assert limit_of(step, [large], 19.0) is None


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
    step, call = Step, [sys.executable, str(script), str(pid)]
    asked = [step("long", 1, 3), step("broken", 1, 50), step("absent", 1, 50)]
    asked += [step("fine", 1, 50), step("large", 500, 600)]
    log = tmp_path / "results" / "log.txt"
    found = run_steps(asked, call, 100.0, log=log)
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
