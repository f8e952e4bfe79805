"""Calibrated rounding in a file of a quarter of the weight's size: what the nearest codes miss.

Of each weight the file holds the scales as they are and, entropy-coded, how many places each code
lies from the nearest to the full-precision weight under these scales. The reader has the full
model, computes the nearest codes anew and adds the differences. Every operation on the way is one
of IEEE 754 in float64, element by element: the same on every machine.

The container is safetensors. `<layer>.codes` (packed differences, modulo 16, of ranks by value) and
`<layer>.absmax` are raw DEFLATE streams (RFC 1951); `<layer>.nested_absmax` and `<layer>.offset`
are as in `QuantizedTensor`; `<layer>.moved`, float16 [columns], is what calibration moved columns
by on average, in weights of so many rows that it helps. Finer rows of a table are there as they
are, under `<layer>.finer.rows` and `<layer>.finer.weight.` with the parts' names. Parameters that
calibration moved are there in float16 under their names. The metadata's JSON names format, full
model and result, and has a checksum of the tensors.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saml_kernels import QuantizedTensor, SAMLConfig
from saml_kernels.errors import SAMLError
from saml_kernels.quantization.codes import code_table
from saml_kernels.quantization.tensor import pack_codes
from saml_models.compress.calibration import Calibration, finer_of, split_finer, stored_finer
from saml_models.compress.layers import parameters_hash
from saml_models.compress.packing import tensors_hash
from saml_models.runtime.tensors import read_description, read_tensors, write_tensors

__all__ = ["read_rounding", "write_rounding"]

KIND, VERSION = "saml-rounding", 1
ROWS = 4096  # of weights whose columns' means are kept
PART = 1 << 12  # blocks at a time, in float64
SCALES = ("nested_absmax", "offset")


def write_rounding(path: Path, calibration: Calibration, model: nn.Module) -> int:
    """Write what `read_rounding` reads with the same model.

    Args:
        path: replaced, whole or not at all.
        calibration: of `model`, in one format of 4 bits.
        model: at full precision; only what float16 keeps of its values counts.

    Returns:
        Bytes of the file.

    Raises:
        SAMLError: the weights are in several formats, or in 8 bits.
    """
    kinds = {(w.format, w.block_size, w.double_quant) for w in calibration.weights.values()}
    if len(kinds) != 1 or next(iter(kinds))[0] == "int8":
        raise SAMLError(f"{path}: weights in {sorted(kinds)}; expected one format of 4 bits")
    format, block_size, double_quant = next(iter(kinds))
    tensors = {name: value.half() for name, value in calibration.parameters.items()}
    for name, weight in calibration.weights.items():
        original = _original(model, name)
        moved = None
        if len(original) >= ROWS:
            moved = (weight.dequantize() - original).mean(dim=0).half()
            tensors[f"{name}.moved"] = moved
        _, rank_of = _order(format)
        ranks = rank_of[_codes(weight.codes, original.numel()).int()]
        differences = (ranks - _nearest(original, moved, weight)) & 15
        tensors[f"{name}.codes"] = _deflated(pack_codes(differences))
        tensors[f"{name}.absmax"] = _deflated(weight.absmax)
        tensors |= {f"{name}.{s}": getattr(weight, s) for s in SCALES if double_quant}
    tensors |= stored_finer(calibration.finer)
    about = {
        "kind": KIND,
        "version": VERSION,
        "format": format,
        "block_size": block_size,
        "double_quant": double_quant,
        "parameters": _count(model),
        "model_sha256": parameters_hash(model),
        "weight_hash": calibration.hash(),
        "tensors_sha256": tensors_hash(tensors),
        "calibration": calibration.about,
    }
    write_tensors(path, tensors, {"saml": json.dumps(about)})
    return path.stat().st_size


def read_rounding(
    path: str | os.PathLike[str], model: nn.Module, config: SAMLConfig
) -> Calibration | None:
    """The calibration that `write_rounding` was given, bit for bit.

    Args:
        path: of a file that `write_rounding` wrote.
        model: at full precision, on any device.
        config: of the layers.

    Returns:
        The calibration, on the CPU; None where the file is of another model or another format.

    Raises:
        SAMLError: the file is missing, damaged or of a newer version.
    """
    tensors, metadata = read_tensors(path)
    about = read_description(path, metadata, KIND, VERSION, "rounding")
    asked: dict[str, Any] = {
        "format": config.format,
        "block_size": config.block_size,
        "double_quant": config.double_quant,
        "parameters": _count(model),
    }
    if any(about.get(key) != value for key, value in asked.items()):
        return None
    if about.get("model_sha256") != parameters_hash(model):
        return None
    whole = about.get("tensors_sha256") == tensors_hash(tensors)
    apart = split_finer(tensors)
    weights = {}
    for name in [key.removesuffix(".codes") for key in tensors if key.endswith(".codes")]:
        parts = {key: tensors.pop(f"{name}.{key}", None) for key in ("codes", "absmax", *SCALES)}
        moved = tensors.pop(f"{name}.moved", None)
        try:
            original = _original(model, name)
            weights[name] = _weight(original, moved, parts, config)
        except (SAMLError, AttributeError, TypeError, RuntimeError, zlib.error) as error:
            raise SAMLError(f"{path}: {name} is damaged; copy the file again") from error
    try:
        finer = finer_of(apart, weights)
    except SAMLError as error:
        raise SAMLError(f"{path}: {error}; copy the file again") from error
    origin = about.get("calibration")
    found = Calibration(
        weights,
        {name: value.float() for name, value in tensors.items()},
        origin if isinstance(origin, dict) else {},
        finer,
    )
    if not (weights and whole) or found.hash() != about.get("weight_hash"):
        raise SAMLError(f"{path}: does not match its description; copy the file again")
    return found


def _weight(
    original: Tensor, moved: Tensor | None, parts: dict[str, Tensor | None], config: SAMLConfig
) -> QuantizedTensor:
    """A weight of its scales and of its codes' differences."""
    weight = QuantizedTensor.empty(
        original.shape, config.format, config.block_size, config.double_quant
    )
    unpacked = {key: _inflated(parts[key], getattr(weight, key)) for key in ("codes", "absmax")}
    scales = {key: parts[key] for key in SCALES if config.double_quant}
    weight.load_state_dict(unpacked | scales)
    order, _ = _order(config.format)
    differences = _codes(unpacked["codes"], original.numel())
    ranks = (_nearest(original, moved, weight) + differences) & 15
    weight.codes.copy_(pack_codes(order[ranks.int()]))
    return weight


def _original(model: nn.Module, name: str) -> Tensor:
    """On the CPU, wherever the model is."""
    weight: Any = model.get_submodule(name).weight
    return weight.detach().cpu()


def _nearest(original: Tensor, moved: Tensor | None, weight: QuantizedTensor) -> Tensor:
    """uint8 [numel]: ranks of the values nearest to `original + moved` under a weight's scales."""
    flat, size = original.reshape(-1), weight.block_size
    order, _ = _order(weight.format)
    values = code_table(weight.format)[order.int()].double()
    middles = ((values[:-1] + values[1:]) / 2).tolist()
    found = []
    for first in range(0, len(weight.absmax), PART):
        part = flat[first * size : (first + PART) * size].half().double()
        if moved is not None:
            column = torch.arange(first * size, first * size + len(part)) % len(moved)
            part += moved.double()[column]
        block = torch.arange(first, min(first + PART, len(weight.absmax)))
        scales = weight.scales(block).double()
        scales[scales == 0] = 1  # of zeros
        part /= scales.repeat_interleave(size)[: len(part)]
        ranks = torch.zeros(len(part), dtype=torch.uint8)
        for middle in middles:  # quicker than torch.bucketize
            ranks += part > middle
        found.append(ranks)
    return torch.cat(found)


def _order(format: str) -> tuple[Tensor, Tensor]:
    """uint8 [16] each: the codes by rising value, and the rank of each code."""
    order = torch.argsort(code_table(format), stable=True)
    return order.to(torch.uint8), torch.argsort(order).to(torch.uint8)


def _codes(packed: Tensor, count: int) -> Tensor:
    """uint8 [count] of two in a byte."""
    return torch.stack((packed >> 4, packed & 15), dim=1).flatten()[:count]


def _deflated(value: Tensor) -> Tensor:
    """uint8 [n]. Differences do not repeat: Huffman codes alone are as short, and quicker."""
    stream = zlib.compressobj(9, wbits=-15, strategy=zlib.Z_HUFFMAN_ONLY)
    packed = stream.compress(value.contiguous().numpy().tobytes()) + stream.flush()
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def _inflated(stream: Tensor | None, like: Tensor) -> Tensor:
    """The bytes of a tensor of the size of `like`, and no more."""
    if stream is None or stream.dtype != torch.uint8:
        raise SAMLError(f"{'nothing' if stream is None else stream.dtype}; expected bytes")
    if like.dtype != torch.uint8:  # scales without double quantisation
        return _inflated(stream, like.view(torch.uint8)).view(like.dtype)
    inflate = zlib.decompressobj(wbits=-15)
    found = inflate.decompress(stream.numpy().tobytes(), like.numel() + 1)
    if len(found) != like.numel() or not inflate.eof:
        raise SAMLError(f"{len(found)} bytes; expected {like.numel()}")
    return torch.frombuffer(bytearray(found), dtype=torch.uint8)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
