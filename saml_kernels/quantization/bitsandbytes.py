"""bitsandbytes' form of a quantised weight (version 0.50)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from saml_kernels.errors import SAMLError
from saml_kernels.quantization.codes import (
    NESTED_BLOCK,
    code_table,
    nested_code,
)

_BNB_STATE = "quant_state.bitsandbytes__"


def parse_state(parts: Mapping[str, Any]) -> tuple[Any, ...]:
    """absmax, nested_absmax, offset, shape, format, block size of a packed bitsandbytes state."""
    packed = {key.removeprefix("weight."): value for key, value in parts.items()}
    about_key = next((key for key in packed if key.startswith(_BNB_STATE)), _BNB_STATE + "nf4")
    about = json.loads(bytes(packed[about_key].tolist()).decode())
    if about["quant_type"] not in ("nf4", "fp4"):
        raise SAMLError(
            f"bitsandbytes state: quant_type {about['quant_type']!r}; expected nf4, fp4"
        )
    codes = code_table(about["quant_type"], packed["quant_map"].device)
    if not torch.equal(packed["quant_map"].to(torch.float32), codes):
        raise SAMLError(f"bitsandbytes state: quant_map is not that of {about['quant_type']}")
    nested = offset = None
    if "nested_absmax" in packed:
        if about["nested_blocksize"] != NESTED_BLOCK:
            raise SAMLError(f"bitsandbytes state: nested_blocksize {about['nested_blocksize']}")
        nested = packed["nested_absmax"].to(torch.float32)
        offset = torch.tensor(
            float(about["nested_offset"]), dtype=torch.float32, device=nested.device
        )
        table = packed["nested_quant_map"].to(torch.float32)
        if not torch.equal(table, nested_code(table.device)):
            raise SAMLError("bitsandbytes state: nested_quant_map is not the dynamic 8-bit map")
    shape = [int(n) for n in about["shape"]]
    return packed["absmax"], nested, offset, shape, about["quant_type"], int(about["blocksize"])
