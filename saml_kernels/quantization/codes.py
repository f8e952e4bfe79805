"""The code tables: which value each stored code stands for, relative to its block's scale."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

__all__ = [
    "FORMATS",
    "NESTED_BLOCK",
    "code_table",
    "nested_code",
    "nested_lookup",
    "pair_table",
    "sorted_codes",
]

FORMATS = ("nf4", "fp4", "int8", "int4")
NESTED_BLOCK = 256  # scales that share one scale under double quantisation

# QLoRA (arXiv 2305.14314), appendix E: quantiles of a normal, with an exact zero at code 7.
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# bitsandbytes' FP4: one sign bit (the high one), then the magnitudes in twelfths.
# Both zeros are +0, as it has them.
_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
_FP4 = tuple(s * v / 12 + 0.0 for s in (1, -1) for v in _TWELFTHS)


def _dynamic_map() -> Tensor:
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32, device="cpu")
        means = ((10 ** (decade - 6)) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += means + [-m for m in means]
    return _constant(sorted(values))


def _constant(values: Sequence[float]) -> Tensor:
    # Spelt out: the caller may have changed PyTorch's default dtype or device.
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def _pairs(table: Tensor) -> Tensor:
    byte = torch.arange(256, device="cpu")
    return torch.stack((table[byte >> 4], table[byte & 15]), dim=1)


_CODES = {
    "nf4": _constant(_NF4),
    "fp4": _constant(_FP4),
    "int4": _constant(range(-8, 8)) / 7,
    "int8": _constant([*range(128), *range(-128, 0)]) / 127,
}
_TABLES = {
    **_CODES,
    **{f"{name} pairs": _pairs(table) for name, table in _CODES.items() if name != "int8"},
    "nested": _dynamic_map(),
}


# By device, then by name. A dictionary, because torch.compile sees through no function's cache: it
# would copy the table from the host at every call, which a CUDA graph cannot capture.
_COPIES: dict[str, dict[str, Tensor]] = {"cpu": _TABLES}


def _on(name: str, device: torch.device | str) -> Tensor:
    there = _COPIES.setdefault(str(device), {})
    if name not in there:
        there[name] = _TABLES[name].to(device)
    return there[name]


def code_table(format: str, device: torch.device | str = "cpu") -> Tensor:
    """float32 [16] for "nf4", "fp4" and "int4"; float32 [256] for "int8", by unsigned byte."""
    return _on(format, device)


def pair_table(format: str, device: torch.device | str = "cpu") -> Tensor:
    """float32 [256, 2]: both values of a byte of a 4-bit format, the high nibble's first."""
    return _on(f"{format} pairs", device)


def nested_code(device: torch.device | str = "cpu") -> Tensor:
    """float32 [256]: the signed dynamic 8-bit map that double quantisation stores scales in.

    Seven decades, each twice as finely divided as the one below, with 0 and 1 added.
    Source: arXiv 1511.04561, as bitsandbytes builds it.
    """
    return _on("nested", device)


@lru_cache(maxsize=8)
def sorted_codes(format: str, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Codes of a 4-bit float format by rising value, and the 15 midpoints between them."""
    table = code_table(format, device)
    # FP4 has two zeros; bitsandbytes meets code 0 before code 8.
    order = torch.argsort(table, stable=True)
    return order, (table[order[:-1]] + table[order[1:]]) / 2


@lru_cache(maxsize=8)
def nested_lookup(device: torch.device | str = "cpu") -> Tensor:
    """uint8 [65536]: the nearest entry of `nested_code` for evenly spaced values from -1 to 1.

    bitsandbytes 0.50 rounds a scale to this grid first; to share its bytes, so do we.
    """
    table = nested_code(device)
    values = torch.linspace(-1, 1, 65536, dtype=torch.float64, device=device).to(torch.float32)
    above = torch.bucketize(values, table).clamp(1, len(table) - 1)
    # The lower entry where two are equally near.
    lower = values - table[above - 1] <= table[above] - values
    return (above - lower.int()).to(torch.uint8)
