"""Descriptions in the metadata of safetensors files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from saml_kernels import SAMLError
from saml_models.compress.difference import read_difference
from saml_models.runtime.tensors import read_metadata, write_tensors


@pytest.mark.parametrize("text", ["{", "3", "[" * 100_000, '{"kind": "other"}'])
def test_a_description_that_is_none_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"w": torch.zeros(1)}, {"saml": text})
    assert read_metadata(path) == {"saml": text}
    with pytest.raises(SAMLError, match=r"a\.safetensors: holds no difference") as caught:
        read_difference(path)
    assert "\n" not in str(caught.value)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(SAMLError, match="not a whole safetensors file"):
        read_metadata(path)
