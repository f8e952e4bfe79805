"""One door to the benchmark: `python -m bench NAME`, and `saml bench NAME` in a clone."""

import shutil
import subprocess
import sys
from importlib import import_module

import pytest
from typer.testing import CliRunner

from bench.app import COMMANDS, app
from bench.place import REPOSITORY, as_module, environment

SAML = [sys.executable, "-c", "from saml_models.cli.__main__ import main; main()"]


def plain(text):
    """Without the frame that rich draws."""
    return " ".join(text.replace("│", " ").split())


def run(command, cwd, **more):
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, **more)


def test_help_lists_every_command_and_imports_none_of_them(tmp_path):
    done = run([*as_module("bench"), "--help"], tmp_path, env=environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout.lstrip().startswith("Usage: python -m bench")
    listed = plain(done.stdout)
    for name, module in COMMANDS.items():
        summary = import_module(module).__doc__.partition("\n")[0]
        assert f"{name} {summary}" in listed and len(summary) <= 70
    look = "import sys, bench.app; print({'torch', 'transformers'} & set(sys.modules))"
    done = run([sys.executable, "-P", "-c", look], tmp_path, env=environment())
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name):
    found = CliRunner().invoke(app, [name, "--help"], prog_name="python -m bench")
    assert found.exit_code == 0, found.output
    assert f"Usage: python -m bench {name}" in found.stdout and "--help" in found.stdout
    assert "--worker" not in found.stdout


def test_options_alone_are_those_of_layers(tmp_path):
    asked = ["--work", "P2", "--tokens", "1", "--width", "64", "--rounds", "1", "--device", "cpu"]
    by_name = tmp_path / "named.json"
    for arguments, path in ((asked, tmp_path / "alone.json"), (["layers", *asked], by_name)):
        found = CliRunner().invoke(app, [*arguments, "--json", str(path)])
        assert found.exit_code == 0 and f"written: {path}" in found.stdout, found.output
    found = CliRunner().invoke(app, ["--tokens", "1,x"])
    assert found.exit_code == 2 and found.stdout == ""
    assert found.stderr.startswith("bench: --tokens 1,x: ") and found.stderr.count("\n") == 1


def test_unknown_commands_are_refused():
    found = CliRunner().invoke(app, ["nonsense"])
    assert found.exit_code == 2 and "No such command 'nonsense'" in plain(found.output)


def test_saml_opens_the_door_of_its_own_clone(tmp_path):
    (tmp_path / "bench.py").write_text("raise SystemExit('another bench')")
    where = environment()
    done = run([*SAML, "bench", "--help"], tmp_path, env=where)
    assert done.returncode == 0, done.stderr
    assert "training-memory" in done.stdout
    done = run([*SAML, "bench", "gpu", "--do", "P7", "--minutes", "1"], tmp_path, env=where)
    assert done.returncode == 2 and done.stderr.startswith("--do P7: expected some of shapes")
    done = run([*SAML, "bench", "--tune", "--work", "P1"], tmp_path, env=where)
    assert done.returncode == 2
    assert done.stderr == (
        "saml: bench --tune: --work: expected --width, --device or --minutes alone\n"
    )


@pytest.fixture
def installed(tmp_path):
    """The packages without the repository, as a wheel brings them; beside another's `bench`."""
    folder = tmp_path / "site-packages"
    left_out = shutil.ignore_patterns("__pycache__", "*.so", "*.safetensors")
    for package in ("saml_kernels", "saml_models"):
        shutil.copytree(REPOSITORY / package, folder / package, ignore=left_out)
    (folder / "bench").mkdir()
    (folder / "bench" / "__main__.py").write_text("raise SystemExit('another bench')")

    def saml(*arguments):
        return run([*SAML, *arguments], tmp_path, env=environment() | {"PYTHONPATH": str(folder)})

    return saml


def test_from_a_wheel_it_says_to_clone(installed):
    for arguments in ((), ("layers",), ("gpu", "--do", "P2"), ("--work", "P1", "--tokens", "1")):
        done = installed("bench", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1 and done.stderr.startswith("saml: bench: ")
        assert "clone" in done.stderr and "python -m bench" in done.stderr


def test_from_a_wheel_it_tunes(installed):
    done = installed("bench", "--tune", "--device", "cpu")
    assert done.returncode == 2 and done.stderr.startswith("saml: bench --tune: ")
    assert "clone" not in done.stderr
    done = installed("bench", "--help")
    assert done.returncode == 0 and "--tune" in done.stdout and "python -m bench" in done.stdout
