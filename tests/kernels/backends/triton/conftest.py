"""Kernels run in Triton's interpreter (TRITON_INTERPRET=1) or on a CUDA device, else not at all."""

import pytest

from saml_kernels.backends.triton import backend as backend
from saml_kernels.backends.triton.launcher import interpreting

REASON = backend.why_unavailable()


@pytest.fixture(autouse=True)
def runnable():
    if REASON:
        pytest.skip(f"{REASON}; run TRITON_INTERPRET=1 pytest tests/kernels/backends/triton")


@pytest.fixture(scope="session")
def device() -> str:
    return "cpu" if interpreting() else "cuda"


@pytest.fixture(autouse=True)
def every_test_poisoned(poisoned):
    """See tests/conftest.py."""
