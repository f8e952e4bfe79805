"""Quantised layers without experts: embeddings, tied output heads, ordinary convolutions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saml_kernels.config import SAMLConfig
from saml_kernels.ops.api import saml_linear
from saml_kernels.ops.arguments import autocast_dtype
from saml_kernels.quantization.tensor import QuantizedTensor, quantize

__all__ = ["SAMLEmbedding", "TiedHead"]


class SAMLEmbedding(nn.Module):
    """An embedding table in low bits: only the rows that are looked up are dequantised."""

    def __init__(self, weight: QuantizedTensor, padding_idx: int | None = None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = padding_idx
        self.weight = weight
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
        return self.weight.rows(index, self.compute.dtype).view(*x.shape, self.embedding_dim)

    def attend(self, x: Tensor) -> Tensor:
        """The tied output head: x [..., d] -> logits [..., V]."""
        x = x.to(autocast_dtype(x) or x.dtype)
        return saml_linear(
            x,
            self.weight,
            x.new_empty(0, 1, self.embedding_dim),
            x.new_empty(0, self.num_embeddings, 1),
            x.new_empty(0),
        )

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, format={self.weight.format}"


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
