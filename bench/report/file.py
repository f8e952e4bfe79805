"""A file of results: rows by work, with what they were measured on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from bench.report.environment import about
from saml_kernels.files import is_json, write_json

__all__ = ["Results"]


class Results:
    """Rows by work, with what they were measured on; on disk after each work's rows.

    Works of an earlier run that this one does not repeat are kept where `path` exists already.

    Args:
        device: that was measured.
        roofs: its bandwidth and rate, as `Roofs.to_dict` gives them; none for whole models.
        path: of the JSON file; None keeps the rows in memory.
    """

    def __init__(
        self, device: torch.device, roofs: Mapping[str, float], path: Path | None = None
    ) -> None:
        self.path = path
        self.data: dict[str, Any] = {"about": about(device), "works": {}}
        # Works of one file may be of several runs: each keeps its own.
        self.stamp: dict[str, Any] = {"commit": self.data["about"]["commit"], **roofs}
        if path is not None and is_json("works")(path):
            self.data["works"] = json.loads(path.read_text())["works"]
        self.fresh: list[str] = []  # in the order in which they were begun

    def add(
        self, work: str, title: str, rows: Iterable[dict[str, Any]], skipped: dict[str, str]
    ) -> None:
        """Append to a work; the first time, in place of what an earlier run found."""
        if work not in self.fresh:
            self.fresh.append(work)
            self.data["works"][work] = {"title": title, **self.stamp, "rows": [], "skipped": {}}
        entry = self.data["works"][work]
        entry["rows"] += rows
        entry["skipped"] |= skipped
        if self.path is not None:
            write_json(self.path, self.data)

    def unfinished(self, minutes: float) -> None:
        """Say that time ran out."""
        self.data["unfinished"] = f"stopped after {minutes:g} minutes"
        if self.path is not None:
            write_json(self.path, self.data)
