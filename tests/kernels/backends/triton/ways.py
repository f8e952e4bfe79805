"""Every way a product may go: a route with the tiles of the table, or with any tiles at all."""

from contextlib import contextmanager
from dataclasses import replace

from hypothesis import reject
from hypothesis import strategies as st

from saml_kernels.backends.triton.configs import ROUTES, SHARED_OUT, Config
from saml_kernels.backends.triton.launcher import triton_errors

APART = [r for r in ROUTES if r != "stacked"]  # whose backwards are not each other's
SIZES = st.sampled_from((16, 32, 64, 128))
WAYS = st.one_of(
    st.sampled_from((None, *ROUTES)),
    st.builds(
        Config, st.sampled_from(("single", "decode", "split", "fused", "dense")),
        SIZES, SIZES, SIZES,
        st.sampled_from((1, 2, 3, 5)), group=st.integers(1, 9),
        scale=st.sampled_from(("before", "after")),
        loads=st.sampled_from(("pointers", "descriptors")),
    ).map(lambda c: c if c.route in SHARED_OUT else replace(c, split=1)),
)  # fmt: skip


@contextmanager
def fitting(way):
    """Pass over tiles that the device has no room for, if they were drawn and not the table's."""
    try:
        yield
    except triton_errors("OutOfResources"):
        if not isinstance(way, Config):
            raise
        reject()
