"""README and docs: commands parse, Python runs or resolves, tables are what the results say."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer

import saml_kernels
import saml_models
from bench.report.tables import has_tables, write_tables
from saml_models.cli.main import app as saml_app

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PAGES = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]  # fmt: skip
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
RUNNABLE = {"torch", "saml_kernels"}
"""A block that imports nothing else is run: it needs no model and no audio."""


@dataclass(frozen=True)
class Piece:
    """Code of a page: `language` is "" for a shell's; `whole` is False for code in a sentence."""

    page: Path
    line: int
    language: str
    text: str
    whole: bool = True

    def __str__(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


def pieces() -> list[Piece]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in FENCED.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Piece(page, line, match[1], match[2]))
        prose = FENCED.sub(lambda match: "\n" * match[0].count("\n"), text)
        for number, line_text in enumerate(prose.splitlines(), start=1):
            found += [Piece(page, number, "", span, False) for span in INLINE.findall(line_text)]
    return found


def commands(program: str) -> list[tuple[Piece, list[str]]]:
    """Calls of a program ("saml", "make", "python -m"), without the program and comments."""
    start = program.split()
    found = []
    for piece in pieces():
        if piece.language:
            continue
        for line in piece.text.replace("\\\n", " ").splitlines():
            if not line.startswith(f"{program} "):
                continue
            found.append((piece, shlex.split(line, comments=True)[len(start) :]))
    return found


def blocks() -> list[Piece]:
    return [piece for piece in pieces() if piece.language == "python"]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def ids(value):
    if isinstance(value, Piece):
        return str(value)
    return " ".join(value)[:40] if isinstance(value, list) else None


def test_the_readme_is_short_and_has_one_table_of_results():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    assert text.count("<!-- results: end -->") == 1


def test_pages_hold_what_these_tests_look_for():
    assert len(commands("saml")) > 30
    assert len(commands("make")) > 5
    assert len(commands("python -m")) > 10
    assert len(blocks()) > 8


@pytest.mark.parametrize(("piece", "arguments"), commands("saml"), ids=ids)
def test_commands_parse(piece, arguments):
    command, name = typer.main.get_command(saml_app), "saml"
    while arguments and hasattr(command, "commands"):
        name, *arguments = arguments
        assert name in command.commands, f"{piece}: no command {name}"
        command = command.commands[name]
    if hasattr(command, "commands"):
        assert not piece.whole, f"{piece}: a command is missing"
        return
    try:
        command.make_context(name, list(arguments))
    except Exception as error:
        # A sentence may name a command without all that it needs, but nothing that it has not.
        missing = type(error).__name__ == "MissingParameter"
        assert missing and not piece.whole, f"{piece}: {error.format_message()}"


def test_a_command_that_does_not_exist_is_noticed():
    piece = Piece(ROOT / "README.md", 1, "", "")
    for arguments in (["nothing"], ["adapt", "--nothing"], ["quantize"], ["speakers"]):
        with pytest.raises(AssertionError, match="README"):
            test_commands_parse(piece, arguments)


@pytest.mark.parametrize(("piece", "arguments"), commands("make"), ids=ids)
def test_make_has_the_targets(piece, arguments):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    variables = re.findall(r"^(\w+) \?=", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for argument in arguments:
        name, sign, _ = argument.partition("=")
        assert name in (variables if sign else targets), f"{piece}: make {argument}"


def help_of(*arguments: str) -> str:
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    call = [sys.executable, "-m", *arguments, "--help"]
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(arguments)}: {done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_modules_have_the_names_and_options():
    """Of `python -m MODULE`, and of the benchmark's door each NAME."""
    asked: dict[tuple[str, ...], set[str]] = {}
    for _, (module, *arguments) in commands("python -m"):
        if module in ("pytest", "mkdocs", "wyoming_openai"):  # not ours
            continue
        name = arguments[:1] if module == "bench" else []
        options = {a for a in arguments if a.startswith("--")}
        asked.setdefault((module, *name), set()).update(options)
    names = {call[1] for call in asked if call[0] == "bench" and len(call) > 1} - {"NAME"}
    door = help_of("bench")
    assert not [name for name in sorted(names) if name not in door], door
    for call, options in asked.items():
        if options:
            text = help_of(*call)
            assert not [o for o in sorted(options) if o not in text], f"{call}: {text}"


@pytest.mark.parametrize("piece", blocks(), ids=ids)
def test_python_compiles_and_its_names_are_there(piece):
    tree = ast.parse(piece.text, str(piece))
    modules: dict[str, object] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found = importlib.import_module(alias.name)
                modules[alias.asname or alias.name] = found
        elif isinstance(node, ast.ImportFrom):
            found = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(found, alias.name), f"{piece}: {node.module} has no {alias.name}"
    recognisers = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("saml.load(")
        for target in node.targets
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = node.value.id
            if name in modules:
                assert hasattr(modules[name], node.attr), f"{piece}: {name}.{node.attr}"
            if name in recognisers:
                assert hasattr(saml_models.Recogniser, node.attr), f"{piece}: {name}.{node.attr}"


def imported(piece: Piece) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(piece.text)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("piece", [p for p in blocks() if imported(p) <= RUNNABLE], ids=ids)
def test_python_of_the_operator_runs(piece):
    names: dict[str, object] = {}
    exec(compile(piece.text, str(piece), "exec"), names)
    assert names["y"].isfinite().all()


@pytest.mark.parametrize("page", [p for p in PAGES if has_tables(p)], ids=name_of)
def test_tables_are_what_the_results_say(page, tmp_path):
    copy = tmp_path / page.name
    shutil.copyfile(page, copy)
    assert not write_tables(copy, RESULTS), f"{page.name}: python -m bench report writes it anew"


@pytest.mark.parametrize("package", [saml_kernels, saml_models], ids=lambda p: p.__name__)
def test_api_pages_have_every_public_name(package):
    page = ROOT / "docs" / "api" / f"{package.__name__.removeprefix('saml_')}.md"
    named = re.findall(rf"^::: {package.__name__}\.(\w+)$", page.read_text(), re.MULTILINE)
    assert sorted(named) == sorted(package.__all__)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_are_there(page):
    """Those that begin with a folder of ours, and a table's cells below its heading's folder."""
    wanted, folder = [], ""
    for line in page.read_text().splitlines():
        if heading := re.match(r"\| `(saml_\w+/)` \|", line):
            folder = heading[1]
        elif line.startswith("| `") and folder:
            wanted += [folder + span for span in INLINE.findall(line.split("|")[1])]
        elif not line.startswith("|"):
            folder = ""
        wanted += re.findall(r"`((?:saml_kernels|saml_models|bench|tests|docs)/[^`\s]*)`", line)
    missing = [path for path in wanted if not any(ROOT.glob(path.rstrip("/")))]
    assert not missing, missing


def test_extras_are_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"])
    for page in PAGES:
        text = page.read_text()
        named = set(",".join(re.findall(r"saml-kernels\[([\w,-]+)\]", text)).split(",")) - {""}
        table = text.partition("| extra | brings |\n")[2].partition("\n\n")[0]
        for row in table.splitlines()[1:]:
            named |= set(INLINE.findall(row.split("|")[1]))
        assert named <= extras, f"{page.name}: {sorted(named - extras)}"
