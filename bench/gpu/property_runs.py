"""Properties asked for check.py, each in a process of its own beside the others.

A kernel that hangs or strays takes nobody along.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from typing import Any
from unittest.mock import patch

import torch

from bench.gpu.checks import PLAIN
from bench.gpu.properties import PROPERTIES, NotRun
from bench.gpu.results import one_line
from bench.place import NOT_RUN, as_module, environment
from saml_kernels.backends import registry
from saml_kernels.backends.triton.launcher import interpreting
from saml_kernels.cuda import current

__all__ = ["check_properties", "check_property"]

TOGETHER = 8  # processes at a time
LAST_LINES = 30


def check_property(name: str, device: torch.device) -> tuple[int, str]:
    """One, in this process: its exit code, and a line about it."""
    stands_in = {"cpu": "triton"} if interpreting() else {}
    try:
        with current(device), patch.dict(registry.PREFERRED, stands_in):
            return 0, PROPERTIES[name](device)
    except NotRun as why:
        return NOT_RUN, str(why)
    except ModuleNotFoundError as error:  # what a GPU's machine may lack
        return NOT_RUN, one_line(error)


def check_properties(
    device: torch.device, seconds: float, put: Callable[[dict[str, Any]], None]
) -> str:
    """All of them, each in a process of its own; one line about them.

    Args:
        device: "cuda", or "cpu" under Triton's interpreter.
        seconds: what has not ended then is left.
        put: is given what is known so far, by name, after each.
    """
    deadline = time.monotonic() + seconds
    found: dict[str, Any] = {}
    env = environment(PLAIN) if device.type == "cuda" else environment()
    env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def ask(name: str) -> tuple[str, str, list[str]]:
        call = [*as_module("bench.gpu.check"), "--step", f"property-{name}"]
        call += ["--device", device.type]
        left = deadline - time.monotonic()
        if left < 1:
            return name, "unfinished", []
        try:
            done = subprocess.run(call, capture_output=True, text=True, env=env, timeout=left)
        except subprocess.TimeoutExpired:
            return name, f"unfinished after {left:.0f} s", []
        lines = (done.stdout + done.stderr if done.returncode else done.stdout).splitlines()
        lines = [line for line in lines if line.strip()] or [f"exit code {done.returncode}"]
        kind = {0: "passed", NOT_RUN: "not run"}.get(done.returncode, "failed")
        said = done.stdout.strip().splitlines() if kind != "failed" else lines
        return name, f"{kind}: {(said or lines)[-1]}", lines if kind == "failed" else []

    count = TOGETHER if device.type == "cuda" else 1
    with ThreadPoolExecutor(count) as pool:
        for job in as_completed([pool.submit(ask, name) for name in PROPERTIES]):
            name, said, lines = job.result()
            question = (PROPERTIES[name].__doc__ or "").partition("\n")[0]
            found[name] = {"asked": question, "said": said}
            if lines:
                found[name]["output"] = lines[-LAST_LINES:]
            with suppress(OSError):
                put(found)
    ended = {kind: [n for n, one in found.items() if one["said"].startswith(kind)]
             for kind in ("failed", "unfinished", "not run", "passed")}  # fmt: skip
    counted = ", ".join(f"{len(names)} {kind}" for kind, names in ended.items() if names)
    told = [f"{name}: {found[name]['said'].partition(': ')[2][:160]}" for name in ended["failed"]]
    told += [f"{name} {found[name]['said'][:80]}" for name in ended["unfinished"]]
    head = next((k for k in ("failed", "unfinished") if ended[k]), "passed")
    return f"{head}: {counted}" + "".join(f"; {one}" for one in told)
