"""Rounding a weight by what it does to the layer's output, in the format that `quantize` writes.

For a layer y = x W^T, with x of second moment H = E[x x^T], the mean squared error of the output is
tr((W - Q) H (W - Q)^T). `round_calibrated` makes it small in three steps, each of which may be left
out; codes, scales and their double quantisation are those of `quantize`, byte for byte in size.

1. Scales. A scale per block that minimises sum_k H_kk (W_k - Q_k)^2, found on a grid around the
   block's largest magnitude, then rounded as it is stored.
2. Codes. GPTQ (arXiv 2210.17323) with the scales fixed: column by column in the order of falling
   H_kk ("act-order"), what is lost in one is made good in those that follow.
3. Refinement. Coordinate descent on the error itself: each scale in turn, among the values that its
   8-bit code can stand for, then each code in turn.

Matrices are held transposed here, [K, N]: a column of W, which is one step, lies in one piece.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saml_kernels.errors import SAMLError
from saml_kernels.quantization.codes import NESTED_BLOCK, code_table, nested_code
from saml_kernels.quantization.layout import stored_scales
from saml_kernels.quantization.tensor import (
    QuantizedTensor,
    check_settings,
    pack_codes,
    store_scales,
)

__all__ = ["output_error", "round_calibrated", "round_together"]

SEARCHED = (0.5, 1.1, 13)  # of a block's largest magnitude: least, most, how many
_TOGETHER = 32  # columns between two matrix products
_ROWS = 4096  # of W at a time: what a step touches stays in the caches
_FINE = 2048
_TINY = 1e-30  # a scale below this has no reciprocal worth having


def output_error(weight: Tensor, rounded: Tensor, moment: Tensor) -> float:
    """tr((W - Q) H (W - Q)^T): the mean squared error of the layer's output, summed over outputs.

    Args:
        weight, rounded: [N, ...], flattened to [N, K].
        moment: H [K, K].
    """
    lost = (weight.double() - rounded.double()).flatten(1)
    return float(((lost @ moment.double()) * lost).sum())


def round_calibrated(
    weight: Tensor,
    moment: Tensor,
    format: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    **options: Any,
) -> QuantizedTensor:
    """Quantise a weight for inputs of a known second moment; see `round_together`."""
    return round_together([weight], moment, format, block_size, double_quant, **options)[0]


@torch.no_grad()
def round_together(
    weights: Sequence[Tensor],
    moment: Tensor,
    format: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    *,
    damping: float = 0.05,
    search: bool = True,
    gptq: bool = True,
    refinements: int = 1,
    name: str = "weight",
) -> list[QuantizedTensor]:
    """Quantise weights of layers that have the same inputs, for their second moment.

    Each comes out as it would alone (but for the order of sums); together they take fewer steps.

    Args:
        weights: W [N, ...] of any N, floating point; flattened to [N, K], as
            `nn.functional.unfold` orders a convolution's inputs.
        moment: H [K, K], symmetric and positive semidefinite: sums or means of x x^T alike.
        format, block_size, double_quant: as for `quantize`.
        damping: of the mean of H's diagonal, added to the diagonal: it keeps what the inputs
            have seldom shown from being given away. Inputs that were always zero get it too.
        search: choose scales by the diagonal of H; else they are the largest magnitudes.
        gptq: choose codes by GPTQ; else the nearest.
        refinements: rounds of step 3.
        name: for error messages.

    Raises:
        SAMLError: as `quantize` does, or `moment` has another shape, is not finite, or is not
            positive semidefinite.
    """
    check_settings(format, block_size)
    for weight in weights:
        if not weight.is_floating_point() or weight.numel() == 0 or weight.dim() < 2:
            raise SAMLError(
                f"{name}: {weight.dtype} {tuple(weight.shape)}; expected a floating-point tensor "
                "of two or more dimensions with at least one element"
            )
        if not torch.isfinite(weight).all():
            raise SAMLError(f"{name}: {tuple(weight.shape)} holds NaN or infinity")
    flat = [weight.detach().flatten(1).float() for weight in weights]
    device, width = flat[0].device, flat[0].shape[1]
    hessian = _damped(moment.detach().to(device), width, damping, name)
    grid = _Grid.of(format, device)
    layouts = [_Layout(len(one), width, block_size) for one in flat]
    diagonal = hessian.diagonal().float()
    scales = []
    for one, layout in zip(flat, layouts, strict=True):
        absmax = _searched(one, diagonal, layout, grid) if search else _largest(one, layout)
        scales.append(_Scales.store(absmax, double_quant, name))
    parts = list(zip(scales, layouts, strict=True))

    def by_element() -> Tensor:
        return torch.cat([layout.by_element(own.values()) for own, layout in parts], dim=1)

    target = torch.cat([one.T for one in flat], dim=1)
    ranks = _gptq(target, by_element(), hessian, grid) if gptq else None
    if ranks is None:
        ranks = grid.nearest(target, by_element())
    single = hessian.float()
    heights = [layout.height for layout in layouts]
    for _ in range(refinements):
        for (own, layout), aim, chosen in zip(
            parts, target.split(heights, dim=1), ranks.split(heights, dim=1), strict=True
        ):
            _refit(own, aim, chosen, single, layout, grid)
        _descend(target, ranks, by_element(), single, grid)
    made = []
    for weight, own, chosen in zip(weights, scales, ranks.split(heights, dim=1), strict=True):
        codes = grid.order[chosen.T.reshape(-1)]
        packed = codes.to(torch.uint8).view(torch.int8) if format == "int8" else pack_codes(codes)
        made.append(
            QuantizedTensor(
                packed, own.stored, own.nested, own.offset, weight.shape, format, block_size
            )
        )
    return made


def _damped(moment: Tensor, width: int, damping: float, name: str) -> Tensor:
    """H in float64, symmetric, with damping; the identity where there were no inputs at all."""
    if moment.shape != (width, width) or not moment.is_floating_point():
        raise SAMLError(
            f"{name}: moment {moment.dtype} {tuple(moment.shape)}; expected floating point "
            f"{(width, width)}, as the weight has {width} inputs"
        )
    if not torch.isfinite(moment).all():
        raise SAMLError(f"{name}: moment holds NaN or infinity; check the calibration inputs")
    hessian = (moment + moment.T).double() / 2
    mean = hessian.diagonal().mean()
    if mean <= 0:
        return torch.eye(width, dtype=torch.float64, device=moment.device)
    hessian.div_(mean).diagonal().add_(max(damping, 1e-6))
    return hessian


@dataclass(frozen=True)
class _Grid:
    """The values of a format in rising order; a rank is a place in it."""

    values: Tensor  # float32 [n]
    fine: Tensor  # float32 [4097]: the nearest value for evenly spaced ones from -1 to 1
    middles: Tensor  # float32 [n - 1]
    order: Tensor  # int64 [n]: the code of each rank

    @classmethod
    def of(cls, format: str, device: torch.device) -> _Grid:
        table = code_table(format, device)
        order = torch.argsort(table, stable=True)
        if format in ("int4", "int8"):
            order = order[1:]  # symmetric, as `quantize` rounds: no code below -1
        values = table[order].contiguous()
        middles = (values[:-1] + values[1:]) / 2
        even = torch.linspace(-1, 1, 2 * _FINE + 1, device=device)
        return cls(values, values[torch.bucketize(even, middles)], middles, order)

    def ranks(self, relative: Tensor) -> Tensor:
        """Of the nearest values, int32."""
        return torch.bucketize(relative, self.middles, out_int32=True)

    def roughly(self, relative: Tensor) -> Tensor:
        """The nearest values, but for arguments close to a middle: quick, for a search. Writes."""
        place = relative.mul_(_FINE).clamp_(-_FINE, _FINE).add_(_FINE + 0.5).int()
        return self.fine.index_select(0, place.view(-1)).view_as(relative)

    def nearest(self, target: Tensor, scales: Tensor) -> Tensor:
        """Ranks of what is nearest to `target` under these scales."""
        return self.ranks(target * _reciprocal(scales))


def _reciprocal(scales: Tensor) -> Tensor:
    usable = scales.abs() > _TINY
    return torch.where(usable, 1 / torch.where(usable, scales, 1.0), 0.0)


class _Layout:
    """Where blocks lie in W [N, K]: cut from the rows one after the other, across their ends.

    After `rows` rows the pattern repeats: such a group of rows holds `blocks` whole blocks.
    """

    def __init__(self, height: int, width: int, block_size: int) -> None:
        self.height, self.width, self.block_size = height, width, block_size
        common = math.gcd(width, block_size)
        self.rows, self.blocks = block_size // common, width // common
        self.groups = -(-height // self.rows)
        self.count = -(-height * width // block_size)

    def cut(self, flat: Tensor) -> Tensor:
        """[N, K] -> [blocks, block_size], the last one filled up with zeros."""
        elements = flat.reshape(-1)
        missing = self.count * self.block_size - elements.numel()
        return F.pad(elements, (0, missing)).view(self.count, self.block_size)

    def by_element(self, scales: Tensor) -> Tensor:
        """[blocks] -> [K, N]: the scale of each element."""
        if self.width % self.block_size == 0:
            in_row = scales.view(self.height, -1).T
            return in_row.repeat_interleave(self.block_size, dim=0)
        elements = scales.repeat_interleave(self.block_size)[: self.height * self.width]
        return elements.view(self.height, self.width).T.contiguous()

    def pieces(self, block: int) -> list[tuple[int, int, int]]:
        """Row in its group, first and last column of each piece of a group's block."""
        found = []
        at, end = block * self.block_size, (block + 1) * self.block_size
        while at < end:
            row, column = divmod(at, self.width)
            stop = min(self.width, column + end - at)
            found.append((row, column, stop))
            at += stop - column
        return found


@dataclass
class _Scales:
    """Scales as they are stored; under double quantisation changed one by one in their 8 bits."""

    stored: Tensor  # uint8 or float32 [blocks]
    nested: Tensor | None
    offset: Tensor | None

    @classmethod
    def store(cls, absmax: Tensor, double_quant: bool, name: str) -> _Scales:
        if not double_quant:
            return cls(absmax, None, None)
        return cls(*store_scales(absmax, name))

    def values(self, which: Tensor | None = None) -> Tensor:
        """float32, as `QuantizedTensor.scales` gives them."""
        return stored_scales(self.stored, self.nested, self.offset, which)

    def set(self, which: Tensor, wanted: Tensor) -> None:
        """Store what is nearest to the wanted values of some blocks."""
        if self.nested is None or self.offset is None:
            self.stored[which] = wanted
            return
        table = nested_code(self.stored.device)
        units = (wanted - self.offset) * _reciprocal(self.nested[which // NESTED_BLOCK])
        middles = (table[:-1] + table[1:]) / 2
        self.stored[which] = torch.bucketize(units, middles).to(torch.uint8)


def _largest(flat: Tensor, layout: _Layout) -> Tensor:
    return layout.cut(flat).abs().amax(dim=1)


def _searched(flat: Tensor, diagonal: Tensor, layout: _Layout, grid: _Grid) -> Tensor:
    """Scales that minimise the error weighted by H's diagonal: float32 [blocks].

    Each candidate rounds the block; the scale kept is the least-squares one for the codes found.
    """
    blocks = layout.cut(flat)
    least, most, steps = SEARCHED
    found = []
    step = max(1, 2**16 // layout.block_size)
    for start in range(0, layout.count, step):
        part = blocks[start : start + step]
        first = start * layout.block_size
        index = torch.arange(first, first + part.numel(), device=flat.device) % layout.width
        weights = diagonal[index].view_as(part)
        largest = part.abs().amax(dim=1)
        best, scale = torch.full_like(largest, -1.0), largest.clone()
        weighted = part * weights
        for factor in torch.linspace(least, most, steps).tolist():
            values = grid.roughly(part * _reciprocal(largest * factor).unsqueeze(1))
            along = torch.linalg.vecdot(weighted, values)
            across = torch.linalg.vecdot(weights, values.square_())
            # What the block loses is sum_k H_kk W_k^2 less this.
            kept = torch.where(across > 0, along * along / across, 0.0)
            better = (kept > best) & (along > 0)
            best = torch.where(better, kept, best)
            scale = torch.where(better, along / across, scale)
        found.append(scale)
    return torch.cat(found)


def _gptq(target: Tensor, scales: Tensor, hessian: Tensor, grid: _Grid) -> Tensor:
    """Ranks [K, N] by GPTQ with act-order; `target` and `scales` are W^T and S^T [K, N]."""
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor = _inverse_factor(hessian[order][:, order])
    inverse = (1 / factor.diagonal()).tolist()
    ranks = torch.empty(target.shape, dtype=torch.int32, device=target.device)
    for start in range(0, target.shape[1], _ROWS):
        part = slice(start, start + _ROWS)
        left, own = target[order, part], scales[order, part]
        reciprocal = _reciprocal(own)
        chosen = torch.empty(left.shape, dtype=torch.int32, device=left.device)
        for first in range(0, len(left), _TOGETHER):
            last = min(first + _TOGETHER, len(left))
            lost = torch.empty_like(left[first:last])
            near = factor[first:last, first:last].contiguous()
            steps = zip(
                *(t[first:last].unbind() for t in (left, own, reciprocal, chosen)),
                lost.unbind(),
                near.unbind(),
                strict=True,
            )
            for k, (row, scale, over, rank, error, along) in enumerate(steps, start=1):
                torch.bucketize(row * over, grid.middles, out_int32=True, out=rank)
                value = grid.values.index_select(0, rank).mul_(scale)
                torch.sub(row, value, out=error).mul_(inverse[first + k - 1])
                if first + k < last:
                    left[first + k : last].addr_(along[k:], error, alpha=-1)
            left[last:].addmm_(factor[first:last, last:].T, lost, alpha=-1)
        ranks[order, part] = chosen
    return ranks


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular U, float32, with H^-1 = U^T U, by way of H = U^-1 U^-T.

    Raises:
        SAMLError: H is not positive definite.
    """
    # Upper times its transpose is lower times its transpose, seen from the other end.
    lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if failed.any():
        raise SAMLError("moment: is not positive semidefinite; expected sums of x x^T")
    unit = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    inverse = torch.linalg.solve_triangular(lower, unit, upper=False)
    return inverse.flip(0, 1).float()


def _refit(
    scales: _Scales, target: Tensor, ranks: Tensor, hessian: Tensor, layout: _Layout, grid: _Grid
) -> None:
    """Each block's scale in turn: the stored value nearest to where the error is least."""
    rows, groups = layout.rows, layout.groups
    missing = groups * rows - layout.height
    # [K, rows, groups]; codes of rows that are not there are zero and so change nothing.
    values = F.pad(grid.values[ranks], (0, missing)).view(layout.width, groups, rows)
    values = values.transpose(1, 2).contiguous()
    lost = target - grid.values[ranks] * layout.by_element(scales.values())
    slope = F.pad(hessian @ lost, (0, missing)).view(layout.width, groups, rows)
    slope = slope.transpose(1, 2).contiguous()
    every = torch.arange(groups, device=target.device) * layout.blocks
    for block in range(layout.blocks):
        pieces = layout.pieces(block)
        along = across = torch.zeros(groups, device=target.device)
        for row, first, last in pieces:
            own = values[first:last, row]
            along = along + (own * slope[first:last, row]).sum(dim=0)
            across = across + (own * (hessian[first:last, first:last] @ own)).sum(dim=0)
        which = every + block
        there = (which < layout.count) & (across > 0)
        if not there.any():
            continue
        index = which[there]
        before = scales.values(index)
        scales.set(index, before + along[there] / across[there])
        change = torch.zeros(groups, device=target.device)
        change[there] = scales.values(index) - before
        for row, first, last in pieces:
            slope[:, row].addmm_(hessian[:, first:last], values[first:last, row] * change, alpha=-1)


def _descend(target: Tensor, ranks: Tensor, scales: Tensor, hessian: Tensor, grid: _Grid) -> None:
    """Each code in turn, in place: the value nearest to where the error is least."""
    inverse = (1 / hessian.diagonal()).tolist()
    for start in range(0, target.shape[1], _ROWS):
        part = slice(start, start + _ROWS)
        own, chosen = scales[:, part].contiguous(), ranks[:, part].contiguous()
        reciprocal = _reciprocal(own)
        now = grid.values[chosen].mul_(own)
        slope = hessian @ (target[:, part] - now)
        for first in range(0, len(target), _TOGETHER):
            last = min(first + _TOGETHER, len(target))
            change = torch.empty_like(now[first:last])
            near = hessian[first:last, first:last].contiguous()
            steps = zip(
                *(t[first:last].unbind() for t in (slope, now, own, reciprocal, chosen)),
                change.unbind(),
                near.unbind(),
                strict=True,
            )
            for k, (along, value, scale, over, rank, moved, row) in enumerate(steps, start=1):
                best = torch.add(value, along, alpha=inverse[first + k - 1]).mul_(over)
                torch.bucketize(best, grid.middles, out_int32=True, out=rank)
                torch.sub(grid.values.index_select(0, rank).mul_(scale), value, out=moved)
                if first + k < last:
                    slope[first + k : last].addr_(row[k:], moved, alpha=-1)
            slope[last:].addmm_(hessian[last:, first:last], change, alpha=-1)
        ranks[:, part] = chosen
