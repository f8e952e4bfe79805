"""How a weight lies on a GPU: codes as they are stored, and one float32 scale for each block.

A double-quantised scale is three loads, each waiting for the one before: code, code book, outer
scale. In decoding that wait is longer than the bytes take, so a weight that moves to a GPU gets its
scales in float32 beside the stored ones (4 bytes a block more; the stored ones stay, and are what
is saved, copied and moved back). A float16 scale would not be exact. Codes need no other order than
that of the file: a row's bytes lie side by side, so a tile of 32 columns or more is read 16 bytes
at a time.

A weight whose rows differ in format is one `QuantizedTensor` for each group of rows: a layout knows
nothing of other rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from saml_kernels.quantization.codes import NESTED_BLOCK, nested_code

__all__ = ["DEVICES", "blockwise", "kernel_scales", "refresh_scales", "stored_scales"]

DEVICES = {"cuda"}  # a weight that moves there is laid out at once


class _Kept(NamedTuple):
    """Scales made of others, which are weakly held by the dictionary and the two here."""

    scales: Tensor
    nested: Tensor
    offset: Tensor
    versions: tuple[int, ...] | None


# By the tensor of stored scales: what is moved, copied or loaded is another one, and what is
# dropped takes its scales along.
_KEPT = WeakTensorKeyDictionary()


def kernel_scales(absmax: Tensor, nested: Tensor | None, offset: Tensor | None) -> Tensor:
    """The scales that kernels on a GPU read: float32 [blocks].

    The same tensor for as long as the stored ones live; new values in those are followed.

    Args:
        absmax: float32 [blocks], which is given back; or uint8 [blocks] under double quantisation.
        nested: float32 [ceil(blocks / 256)] or None; offset: float32 [] or None.
    """
    if nested is None or offset is None:
        return absmax
    versions = _versions(absmax, nested, offset)
    kept: _Kept | None = _KEPT.get(absmax)
    if kept is None or kept.nested is not nested or kept.offset is not offset:
        # No inference tensor, whatever the mode: it may be written to again.
        with torch.inference_mode(False), torch.no_grad():
            kept = _Kept(stored_scales(absmax, nested, offset), nested, offset, versions)
        _KEPT[absmax] = kept
    elif kept.versions != versions:
        refresh_scales(absmax, nested, offset)
    return kept.scales


def refresh_scales(absmax: Tensor, nested: Tensor | None, offset: Tensor | None) -> None:
    """Follow new values in the stored scales, in place: kernels may hold the address."""
    kept: _Kept | None = _KEPT.get(absmax)
    if kept is None or nested is None or offset is None:
        return
    with torch.inference_mode(False), torch.no_grad():
        kept.scales.copy_(stored_scales(absmax, nested, offset))
    _KEPT[absmax] = _Kept(kept.scales, nested, offset, _versions(absmax, nested, offset))


def _versions(*tensors: Tensor) -> tuple[int, ...] | None:
    """How often each was written to; None where nobody counts."""
    if any(t.is_inference() for t in tensors):
        return None
    return tuple(t._version for t in tensors)


def stored_scales(
    absmax: Tensor, nested: Tensor | None, offset: Tensor | None, blocks: Tensor | None = None
) -> Tensor:
    """`QuantizedTensor.scales` of its parts."""
    chosen = absmax if blocks is None else absmax[blocks]
    if nested is None or offset is None:
        return chosen
    values = nested_code(absmax.device)[chosen.int()]
    if blocks is None:
        return blockwise(values, nested, NESTED_BLOCK) + offset
    return values * nested[blocks // NESTED_BLOCK] + offset


def blockwise(values: Tensor, scales: Tensor, block_size: int) -> Tensor:
    """values [n] times the scale of their block; the last block may be short."""
    count = values.numel()
    if count % block_size == 0:
        return (values.view(-1, block_size) * scales.unsqueeze(-1)).view(-1)
    return values * scales.repeat_interleave(block_size)[:count]
