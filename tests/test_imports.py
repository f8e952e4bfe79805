"""Imports run one way: between packages in the order below, between files without a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# Each imports from those above it and from itself; those on one line do not import each other.
ORDER = [
    ("saml_kernels.cuda", "saml_kernels.errors"),
    ("saml_kernels.timing",),
    ("saml_kernels.files",),
    ("saml_kernels.quantization",),
    ("saml_kernels.config",),
    ("saml_kernels.backends",),
    ("saml_kernels.ops",),
    ("saml_kernels.layers",),
    ("saml_kernels",),  # what is public, and aot
    ("saml_models.runtime",),
    ("saml_models.data", "saml_models.text", "saml_models.shipped"),
    ("saml_models.models",),
    ("saml_models.compress",),
    ("saml_models.speakers",),
    ("saml_models.transcription",),
    ("saml_models.training",),
    ("saml_models.evaluation",),
    ("saml_models.recogniser",),
    ("saml_models",),  # what is public
    ("saml_models.server",),
    ("saml_models.cli",),
    ("bench",),
]
LEVELS = {name: level for level, names in enumerate(ORDER) for name in names}


def modules() -> dict[str, Path]:
    """Every module of the packages and the benchmark, by name."""
    found = {}
    for package in ("saml_kernels", "saml_models", "bench"):
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(name: str, source: str) -> set[str]:
    """The modules of ours that a module imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else node.module)
    return {module for module in found if module in MODULES and module != name}


GRAPH = {name: imported(name, path.read_text()) for name, path in MODULES.items()}


def home(module: str) -> str:
    """The longest name in `ORDER` that a module lies under."""
    parts = module.split(".")
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next(name for name in names if name in LEVELS)


def test_no_circle_between_files() -> None:
    graph = {name: uses for name, uses in GRAPH.items() if name != "saml_models"}  # all lazy
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_packages_import_those_above_them() -> None:
    wrong = [
        f"{module} imports {used}"
        for module, uses in GRAPH.items()
        for used in uses
        if module != "saml_models"  # names public things of every package, and imports them late
        and home(used) != home(module)
        and LEVELS[home(used)] >= LEVELS[home(module)]
    ]
    assert not wrong, "\n".join(wrong)


def test_kinds_of_models_do_not_know_each_other() -> None:
    kinds = ("saml_models.models.whisper", "saml_models.models.conformer")
    for kind, other in (kinds, kinds[::-1]):
        for module in (m for m in MODULES if m.startswith(kind)):
            assert not [used for used in GRAPH[module] if used.startswith(other)], module


def test_a_circle_and_a_wrong_way_are_seen() -> None:
    lazy = "def f():\n    from saml_models.cli import main\n"
    assert imported("saml_models.runtime.tensors", lazy) == {"saml_models.cli.main"}
    assert LEVELS[home("saml_models.cli.main")] > LEVELS[home("saml_models.runtime.tensors")]
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


@pytest.mark.parametrize(
    ("package", "absent"),
    [("saml_kernels", ("triton", "transformers")), ("saml_models", ("torch", "transformers"))],
    ids=["saml_kernels", "saml_models"],
)
def test_importing_a_package_brings_no_more(package: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {package}; print([m for m in {absent} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True
    )
    assert done.stdout.strip() == "[]"
