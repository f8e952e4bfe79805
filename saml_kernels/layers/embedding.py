"""Quantised layers without experts: embeddings, tied output heads, ordinary convolutions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saml_kernels.config import SAMLConfig
from saml_kernels.errors import SAMLError
from saml_kernels.ops.api import saml_linear
from saml_kernels.ops.arguments import autocast_dtype
from saml_kernels.quantization.tensor import QuantizedTensor, quantize

__all__ = ["FinerRows", "SAMLEmbedding", "TiedHead"]


class FinerRows(nn.Module):
    """Twice the bits for some rows of a table [V, d]: in low bits, what low bits miss of them.

    Attributes:
        rows: int32 [n], rising, at least one.
        weight: [n, d], which is added to those rows.
    """

    def __init__(self, rows: Tensor, weight: QuantizedTensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows)
        self.rows: Tensor
        self.weight = weight

    @classmethod
    def empty(cls, count: int, table: QuantizedTensor) -> FinerRows:
        """Buffers of the right sizes for a table, to be filled from a file.

        Raises:
            SAMLError: the table has not so many rows, or the count is not positive.
        """
        if type(count) is not int or not 0 < count <= table.shape[0]:
            raise SAMLError(f"finer rows: {count!r}; expected 1 to {table.shape[0]}")
        weight = QuantizedTensor.empty(
            (count, table.shape[1]),
            table.format,
            table.block_size,
            table.double_quant,
            table.device,
        )
        return cls(torch.arange(count, dtype=torch.int32, device=table.device), weight)

    def check(self, table: QuantizedTensor, name: str = "finer") -> FinerRows:
        """Check rows that came from a file.

        Raises:
            SAMLError: they are no rising rows of the table; the message names it.
        """
        rows, (count, width) = self.rows.long().cpu(), table.shape
        rising = bool((rows.diff() > 0).all()) and rows[0] >= 0 and rows[-1] < count
        if not rising or self.weight.shape != (len(rows), width):
            raise SAMLError(
                f"{name}: {len(rows)} rows and {tuple(self.weight.shape)} values; expected rising "
                f"rows of a table {tuple(table.shape)}: the file is damaged"
            )
        return self

    def added_to_rows(self, values: Tensor, index: Tensor) -> Tensor:
        """Rows of the table as looked up, made finer.

        Args:
            values: [n, d], the rows `index` (int64 [n]) of the table.
        """
        place = torch.searchsorted(self.rows, index.to(self.rows.dtype))
        place = place.clamp(max=len(self.rows) - 1)
        found = self.rows[place] == index
        return values + self.weight.rows(place, values.dtype) * found[:, None]

    def added_to_logits(self, logits: Tensor, x: Tensor) -> Tensor:
        """`logits` [..., V] of the table, which may be written to, made finer; x [..., d]."""
        # The operator's output is a view, which autograd lets nobody write to.
        add = logits.index_add if logits.requires_grad else logits.index_add_
        return add(-1, self.rows, _product(x, self.weight))


class SAMLEmbedding(nn.Module):
    """An embedding table in low bits: only the rows that are looked up are dequantised.

    Attributes:
        weight: the table [V, d].
        finer: more bits for some of its rows, or None.
    """

    finer: FinerRows | None

    def __init__(self, weight: QuantizedTensor, padding_idx: int | None = None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = padding_idx
        self.weight, self.finer = weight, None
        # Remembers the dtype the model computes in through `.half()` and `.to()`.
        self.register_buffer("compute", torch.empty(0), persistent=False)
        self.compute: Tensor

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, config: SAMLConfig, weight: QuantizedTensor | None = None
    ) -> SAMLEmbedding:
        """Quantise `embedding` [V, d], if `weight` is not given; the original is left alone.

        Example:
            >>> table = SAMLEmbedding.from_embedding(nn.Embedding(100, 64), SAMLConfig())
            >>> table(torch.tensor([3, 1])).shape
            torch.Size([2, 64])
        """
        if weight is None:
            source = embedding.weight.detach()
            weight = quantize(source, config.format, config.block_size, config.double_quant)
        layer = cls(weight, embedding.padding_idx)
        # Never on the meta device: it is in no file, so nothing would bring it from there.
        device = "cpu" if embedding.weight.is_meta else embedding.weight.device
        layer.compute = torch.empty(0, dtype=embedding.weight.dtype, device=device)
        return layer

    def forward(self, x: Tensor, *, attend: bool = False) -> Tensor:
        """Token ids [...] int64 -> [..., d]; or x [..., d] -> logits [..., V], see `attend`.

        Both ways lead through here, because here is where hooks that move weights wait.

        Raises:
            IndexError: an id outside 0..V - 1, on the CPU.
        """
        if attend:
            return self.attend(x)
        # Rows count from the end too; ids do not.
        index = x.reshape(-1).masked_fill(x.reshape(-1) < 0, self.num_embeddings)
        values = self.weight.rows(index, self.compute.dtype)
        if self.finer is not None:
            values = self.finer.added_to_rows(values, index)
        return values.view(*x.shape, self.embedding_dim)

    def attend(self, x: Tensor) -> Tensor:
        """The tied output head: x [..., d] -> logits [..., V]."""
        x = x.to(autocast_dtype(x) or x.dtype)
        logits = _product(x, self.weight)
        return logits if self.finer is None else self.finer.added_to_logits(logits, x)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, format={self.weight.format}"


def _product(x: Tensor, weight: QuantizedTensor) -> Tensor:
    """x [..., d] -> [..., V] with a table [V, d] without experts."""
    rows, width = weight.shape
    return saml_linear(x, weight, x.new_empty(0, 1, width), x.new_empty(0, rows, 1), x.new_empty(0))


class TiedHead(nn.Module):
    """An output head that owns at most a bias: it asks the embedding it is tied to."""

    def __init__(self, embedding: SAMLEmbedding, bias: Tensor | None = None) -> None:
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        # In a tuple, so that the table is not registered (and saved) twice.
        self._tied = (embedding,)

    @property
    def weight(self) -> QuantizedTensor:
        """The embedding's table [V, d]."""
        return self._tied[0].weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] -> logits [..., V]."""
        logits = self._tied[0](x, attend=True)
        return logits if self.bias is None else logits + self.bias.to(logits.dtype)
