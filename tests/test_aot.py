"""Ahead-of-time builds for GPUs that are not here."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def aot(*arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "saml_kernels.aot", *arguments],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [("sm_80", "float16"), ("sm_87", "float16"), ("sm_90", "bfloat16"), ("sm_80", "float32")],
)
def test_builds_without_spills(arch, dtype, tmp_path):
    done = aot("--arch", arch, "--dtype", dtype, "--model", "base", "--train", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((tmp_path / "kernels.json").read_text())
    assert {k["name"] for k in manifest["kernels"]} >= {"product", "skinny", "outer", "reduce"}
    for kernel in manifest["kernels"]:
        assert kernel["spilled"] == 0
        assert kernel["shared"] <= 99 * 1024
        assert (tmp_path / kernel["file"]).stat().st_size == kernel["size"]


@pytest.mark.parametrize("flag", ["--arch", "--model", "--dtype"])
def test_unknown_name(flag, tmp_path):
    done = aot(flag, "nothing", str(tmp_path))
    assert done.returncode == 2
    assert "nothing" in done.stderr and "expected one of" in done.stderr
