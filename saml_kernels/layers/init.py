"""How experts start: from the quantisation error of the weight (LoftQ, arXiv 2310.08659)."""

from __future__ import annotations

import torch
from torch import Tensor

REGULAR = 1e-3  # of the inputs' mean square, added to each direction's


def roots(moment: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of E[x x^T] [K, K], made regular, and its inverse; else I, I."""
    if moment is None:
        identity = torch.eye(like.shape[1]).to(like)
        return identity, identity
    wide = moment.to(like)
    wide = wide + REGULAR * wide.diagonal().mean() * torch.eye(len(wide)).to(like)
    values, vectors = torch.linalg.eigh(wide)
    root = values.clamp(min=torch.finfo(like.dtype).tiny).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a [R, K] and b [N, R] with b a unchanged and each pair of vectors of one length."""
    a_length, b_length = a.norm(dim=1), b.norm(dim=0)
    shift = (b_length / a_length).sqrt()
    shift = torch.where(a_length * b_length == 0, 1.0, shift)
    return a * shift[:, None], b / shift
