"""Options of `pytest bench`; results, table and figure at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bench.layers.cases import WORKS, Case, cases_of
from bench.layers.harness import Setting, run_case, takes_part
from bench.place import RESULTS
from bench.report.environment import result_path
from bench.report.figures import plot_layers
from bench.report.file import Results
from bench.report.timed import tables
from saml_kernels.errors import SAMLError


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("layers beside their peers")
    group.addoption("--full", action="store_true", help="every width and number of tokens")
    group.addoption("--work", default=",".join(WORKS), help="P1, P2, ..., by commas")
    group.addoption("--rounds", type=int, default=7, help="samples of each contender")
    group.addoption("--on", default="cuda" if torch.cuda.is_available() else "cpu", help="device")
    group.addoption("--threads", type=int, help="of the CPU")
    group.addoption("--results", type=Path, default=RESULTS, help="folder for JSON, PNG")


class Measured:
    """Cases are measured when their first test asks, all contenders in turn; then looked up."""

    def __init__(self, config: pytest.Config) -> None:
        self.device = torch.device(config.getoption("--on"))
        if config.getoption("--threads"):
            torch.set_num_threads(config.getoption("--threads"))
        short = not config.getoption("--full")
        self.setting = Setting(self.device, config.getoption("--rounds"), short)
        self.path = result_path(config.getoption("--results"), self.device)
        self.results = Results(self.device, self.setting.roofs.to_dict(), self.path)
        self.found: dict[Case, tuple[dict[str, Any], dict[str, str]]] = {}

    def __call__(self, case: Case, name: str) -> list[float]:
        """Samples in microseconds; skips the test where there are none."""
        if case not in self.found:
            rows, skipped = run_case(case, self.setting)
            self.results.add(case.work, WORKS[case.work].title, rows, skipped)
            self.found[case] = {r["contender"]: r["samples_us"] for r in rows}, skipped
        samples, skipped = self.found[case]
        if name not in samples:
            pytest.skip(skipped.get(name, "built for one case of each work in a short run"))
        return samples[name]


MEASURED = pytest.StashKey[Measured]()


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Measured:
    return request.config.stash.setdefault(MEASURED, Measured(request.config))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    from bench.layers.registry import contenders

    config = metafunc.config
    device = torch.device(config.getoption("--on")).type
    short, pairs = not config.getoption("--full"), []
    for work in config.getoption("--work").split(","):
        for case in cases_of(work, device, short):
            for name, contender in contenders().items():
                if takes_part(case, contender):
                    pairs.append(pytest.param(case, name, id=f"{case.label}: {name}"))
    metafunc.parametrize(("case", "name"), pairs)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    measured = config.stash.get(MEASURED, None)
    if measured is None:
        return
    console = Console(file=terminalreporter._tw._file, width=150)
    for table in tables(measured.results.data):
        console.print(table)
    if measured.device.type == "cpu":
        console.print("GPU rows: not run: no CUDA device was used")
    path = measured.path
    console.print(f"written: {path}")
    try:
        plot_layers(measured.results.data, path.with_suffix(".png"))
        console.print(f"figure: {path.with_suffix('.png')}")
    except SAMLError as error:
        console.print(f"no figure: {error}")
