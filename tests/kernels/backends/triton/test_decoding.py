"""Every byte of every format through the kernel that decodes; the permutes' PTX: test_lookup.py."""

import pytest
import torch

from saml_kernels.backends.triton.backend import dequantize
from saml_kernels.quantization.codes import code_table
from saml_kernels.quantization.tensor import QuantizedTensor


def every_byte(format: str, device: str) -> QuantizedTensor:
    """[4, 128] or, for INT8, [4, 64]: each byte once, blocks of 32 with scales 1, 2, 3, ..."""
    codes = torch.arange(256, dtype=torch.uint8)
    width = 64 if format == "int8" else 128
    absmax = torch.arange(1, 4 * width // 32 + 1, dtype=torch.float32)
    if format == "int8":
        codes = codes.view(torch.int8)
    return QuantizedTensor(codes, absmax, None, None, (4, width), format, 32).to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", ["nf4", "fp4", "int4", "int8"])
def test_every_byte(format, dtype, device):
    """On a GPU these are the permutes, in the interpreter the look-up in memory: one answer."""
    weight = every_byte(format, device)
    out = dequantize(weight, dtype)
    values = code_table(format)
    codes = torch.arange(256)
    if format != "int8":
        codes = torch.stack((codes >> 4, codes & 15), 1).view(-1)
        if dtype != torch.float32 and device != "cpu":
            values = values.half().float()  # what the permutes look up for 16-bit types
    scales = torch.arange(1, len(codes) // 32 + 1).repeat_interleave(32)
    expected = (values[codes] * scales).view(weight.shape).to(dtype)
    rtol = 2e-7 if dtype == torch.float32 else 0
    if dtype == torch.bfloat16 and device == "cpu":
        rtol = 2**-7  # Triton's interpreter cuts off where a GPU rounds
    torch.testing.assert_close(out.cpu(), expected, rtol=rtol, atol=0)


def test_by_permutes_and_by_memory(device, monkeypatch):
    """Where there are permutes (a GPU), the same kernel without them gives the same values."""
    weight = every_byte("nf4", device)
    found = []
    for version in (None, "6.0"):  # ROCm has no PTX
        monkeypatch.setattr(torch.version, "hip", version)
        found.append(dequantize(weight, torch.float32))
    torch.testing.assert_close(*found, rtol=0, atol=0)
