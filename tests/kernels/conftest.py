"""Kernels run in Triton's interpreter (TRITON_INTERPRET=1) or on a CUDA device, else not at all."""

import pytest
import torch

from saml_kernels import triton as backend
from saml_kernels.triton.dispatch import interpreting

REASON = backend.why_unavailable()


@pytest.fixture(autouse=True)
def runnable():
    if REASON:
        pytest.skip(f"{REASON}; run TRITON_INTERPRET=1 pytest tests/kernels")


@pytest.fixture(scope="session")
def device() -> str:
    return "cpu" if interpreting() else "cuda"


@pytest.fixture(autouse=True)
def poisoned():
    """What a kernel forgets to write is NaN, not what happened to lie there."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
