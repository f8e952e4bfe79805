"""The wheel, built and installed outside the clone: the way a user of `pip install` has it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from conftest import REPOSITORY

from saml_kernels.errors import EXTRAS

pytestmark = pytest.mark.slow

SOURCES = (
    "saml_kernels", "saml_models", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md",
    "LICENSE", "NOTICE",
)  # fmt: skip
LEFT = shutil.ignore_patterns("*.so", "__pycache__")
COMPILER = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]

OPERATOR = """
import torch, saml_kernels
from pathlib import Path
from saml_kernels.backends.cpu.native import native_status
assert Path(saml_kernels.__file__).is_relative_to({target!r}), saml_kernels.__file__
torch.manual_seed(0)
x, weight = torch.randn(3, 256), saml_kernels.quantize(torch.randn(128, 256), "nf4")
a, b, gates = torch.randn(4, 8, 256), torch.randn(4, 128, 8), torch.rand(3, 4)
y = saml_kernels.saml_linear(x, weight, a, b, gates)
y_plain = saml_kernels.saml_linear(x, weight, a, b, gates, backend="reference")
torch.testing.assert_close(y, y_plain, rtol=1e-4, atol=1e-2)
print(native_status())
"""

EXPERTS = """
from pathlib import Path
import saml_models
from saml_models.speakers.pretrained import shipped_experts
assert Path(saml_models.__file__).is_relative_to({target!r}), saml_models.__file__
print(*(shipped_experts(name).kind for name in ("tiny.en", "base.english")))
"""


class Installed:
    """A wheel of this source, and the folder that it is installed in."""

    def __init__(self, folder: Path, **environment: str) -> None:
        source, self.target = folder / "source", folder / "installed"
        source.mkdir()
        for name in SOURCES:
            if (REPOSITORY / name).is_dir():
                shutil.copytree(REPOSITORY / name, source / name, ignore=LEFT)
            elif (REPOSITORY / name).is_file():
                shutil.copy(REPOSITORY / name, source)
        self.folder = folder
        self.environment = {**os.environ, "PYTHONPATH": str(self.target), "OMP_NUM_THREADS": "1"}
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
        build = ("wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", folder, source)
        self.run(*pip, *build, **environment)
        (self.wheel,) = folder.glob("*.whl")
        shutil.rmtree(source)
        self.run(*pip, "install", "--no-deps", "--no-index", "--target", self.target, self.wheel)

    def run(self, *command: object, **environment: str) -> str:
        """What a command prints that is run outside the clone; it has to end well."""
        done = subprocess.run(
            [str(part) for part in command],
            cwd=self.folder,
            env=self.environment | environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def python(self, code: str) -> str:
        return self.run(sys.executable, "-c", code.format(target=str(self.target)))


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    return Installed(tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_what_it_needs(installed):
    with zipfile.ZipFile(installed.wheel) as archive:
        names = set(archive.namelist())
        folder = next(n for n in names if n.endswith(".dist-info/METADATA")).partition("/")[0]
        metadata = Parser().parsestr(archive.read(f"{folder}/METADATA").decode())
        tags = Parser().parsestr(archive.read(f"{folder}/WHEEL").decode())
    platform = re.sub(r"[-.]", "_", sysconfig.get_platform())
    assert tags.get_all("Tag") == [f"py3-none-{platform}"]
    assert {
        "saml_kernels/py.typed", "saml_models/py.typed",
        "saml_kernels/backends/triton/tables/default.json",
        "saml_models/shipped/experts/tiny.en.safetensors",
        f"{folder}/licenses/LICENSE", f"{folder}/entry_points.txt",
    } <= names  # fmt: skip
    assert not [n for n in names if n.endswith((".c", ".h")) or n.startswith(("tests", "bench"))]
    plain = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert {re.split(r"[<>=]", line)[0] for line in plain} == {"torch", "numpy"}
    assert set(EXTRAS) <= set(metadata.get_all("Provides-Extra"))


def test_the_operator_runs_with_native_code(installed):
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no C compiler here: {COMPILER}")
    assert installed.python(OPERATOR).startswith("native code: ")


def test_the_command_and_the_shipped_experts_are_found(installed):
    saml = installed.target / "bin" / "saml"
    assert re.search(r"\btranscribe\b", installed.run(saml, "--help"))
    report = installed.run(saml, "doctor")
    assert re.search(r"^saml-kernels +\d", report, re.MULTILINE)
    assert installed.python(EXPERTS).split() == ["experts", "experts"]


def test_without_a_compiler_it_runs_on_plain_pytorch(tmp_path):
    plain = Installed(tmp_path, CC="/bin/false")
    assert not list(plain.target.rglob("*.so"))
    assert plain.python(OPERATOR).startswith("no native code: ")
