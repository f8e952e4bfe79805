"""What works without the extras, and the one line that names what is missing."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import saml_models
from saml_kernels.errors import EXTRAS, MissingExtra, SAMLError, absent, missing, needs

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"

# Runs before anything else: importing these packages, or looking for them, finds nothing.
BLOCKER = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import importlib.util
find = importlib.util.find_spec
def find_spec(name, package=None):
    return None if name.partition(".")[0] in {names!r} else find(name, package)
importlib.util.find_spec = find_spec
"""

OPERATOR = """
import torch, saml_kernels
torch.manual_seed(0)
weight = saml_kernels.quantize(torch.randn(64, 128), "nf4")
x = torch.randn(5, 128, requires_grad=True)
a, b, gates = torch.randn(4, 8, 128), torch.randn(4, 64, 8), torch.rand(5, 4)
y = saml_kernels.saml_linear(x, weight, a, b, gates)
y.sum().backward()
hidden = torch.einsum("mk,erk->mer", x, a)
plain = x @ weight.dequantize().T + torch.einsum("mer,enr,me->mn", hidden, b, gates)
torch.testing.assert_close(y, plain, rtol=1e-4, atol=1e-3)
assert x.grad.isfinite().all()
config = saml_kernels.SAMLConfig(num_experts=2, rank=4)
assert saml_kernels.SAMLLinear.from_linear(torch.nn.Linear(128, 64), config)(x).shape == (5, 64)
"""


def python(code: str, *, without: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """A fresh Python in which these packages are not installed."""
    code = BLOCKER.format(names=set(without)) + code
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def requirements() -> dict[str, set[str]]:
    """Names of the packages that each extra asks for itself."""
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    return {
        extra: {re.split(r"[\[<>=!~;]", line)[0] for line in lines}
        for extra, lines in extras.items()
    }


def test_the_packages_of_the_extras_are_those_of_pyproject():
    hyphens = ("whisper_normalizer", "python_multipart", "prometheus_client")
    names = {name: name.replace("_", "-") for name in hyphens}
    asked = requirements()
    for extra, packages in EXTRAS.items():
        assert {names.get(p, p) for p in packages} == asked[extra] - {"saml-kernels"}, extra


def test_the_extra_all_asks_for_every_other():
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    (line,) = extras["all"]
    named = set(re.fullmatch(r"saml-kernels\[(.*)\]", line)[1].split(","))
    assert named | {"whisper", "all"} == set(extras)


def test_the_operator_needs_torch_alone():
    blocked = tuple({p for packages in EXTRAS.values() for p in packages})
    found = python(OPERATOR, without=blocked)
    assert found.returncode == 0, found.stderr


def test_the_operator_imports_nothing_of_an_extra():
    names = {p for packages in EXTRAS.values() for p in packages}
    found = python(
        "import sys, torch; before = set(sys.modules); import saml_kernels; "
        f"print(sorted({names!r} & (set(sys.modules) - before)))"
    )
    assert found.stdout.strip() == "[]", found.stdout + found.stderr


@pytest.mark.parametrize("package", ["typer", "rich", "transformers"])
def test_the_command_says_in_one_line_what_is_missing(package):
    code = (
        "import sys; sys.argv = ['saml', 'doctor']\n"
        "from saml_models.cli.__main__ import main; main()"
    )
    found = python(code, without=(package,))
    assert (found.returncode, found.stdout) == (2, ""), found.stderr
    assert found.stderr == f"saml: needs {package}: pip install 'saml-kernels[whisper]'\n"


def test_another_fault_of_an_import_is_not_hidden():
    code = (
        "import sys; sys.argv = ['saml', 'doctor']\n"
        "sys.modules['saml_models.runtime.quiet'] = None\n"
        "from saml_models.cli.__main__ import main; main()"
    )
    found = python(code)
    assert found.returncode == 1 and "saml_models.runtime.quiet" in found.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", saml_models.__all__)
def test_public_names_are_importable(name):
    value = getattr(saml_models, name)
    assert value.__module__.startswith("saml_models.") and name in dir(saml_models)


def test_public_names_say_what_is_missing():
    code = (
        "import saml_models\n"
        "try:\n    saml_models.load_whisper\n"
        "except ImportError as error:\n    print(type(error).__name__, error, sep=': ')"
    )
    found = python(code, without=("transformers", "tokenizers"))
    assert found.stdout == (
        "MissingExtra: saml_models.load_whisper: needs transformers: "
        "pip install 'saml-kernels[whisper]'\n"
    ), found.stderr


def test_importing_saml_models_imports_nothing_heavy():
    found = python(
        "import sys, saml_models; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    assert found.stdout.strip() == "set()", found.stderr


def test_a_missing_package_is_bad_input_and_an_import_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"^--ray: needs ray: pip .*\[ray\]'$") as error:  # noqa: SIM117
        with needs("--ray", "ray"):
            import ray  # noqa: F401
    assert isinstance(error.value, SAMLError) and isinstance(error.value, ImportError)
    assert absent("ray") == ["ray"]


def test_a_package_that_is_there_and_does_not_load_is_quoted():
    assert absent("whisper") == []
    error = missing("saml", "whisper", ImportError("libsndfile.so: cannot open"))
    assert str(error) == "saml: libsndfile.so: cannot open: pip install 'saml-kernels[whisper]'"


def test_a_fault_in_our_own_modules_is_no_missing_package():
    with pytest.raises(ImportError) as error, needs("--ray", "ray"):
        import_module("saml_models.nothing")
    assert not isinstance(error.value, SAMLError)
