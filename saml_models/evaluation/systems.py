"""The five systems of the protocol, loaded by a model's name, and what they weigh."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from saml_kernels import SAMLConfig
from saml_kernels.errors import SAMLError
from saml_models.compress.checkpoint import save_saml
from saml_models.compress.layers import compression_of
from saml_models.compress.loading import load_model
from saml_models.compress.shipped_rounding import compress
from saml_models.evaluation.protocol import Evaluation, Fold, evaluate
from saml_models.training.options import TrainingOptions

__all__ = ["evaluate_systems"]


def evaluate_systems(
    name_or_path: str | os.PathLike[str],
    saml: tuple[Any, Any],
    folds: Sequence[Fold],
    options: TrainingOptions | None = None,
    *,
    device: str | torch.device | None = None,
    guard: bool = True,
    beam_size: int = 1,
    language: str | None = None,
    scoring: str = "whisper",
    checkpoint: Path | None = None,
    on_stage: Callable[[str, int], None] | None = None,
    on_done: Callable[[int], None] | None = None,
) -> Evaluation:
    """Run the protocol, and count the bytes on disk of the quantised models.

    Args:
        name_or_path: what gives the model at full precision.
        saml: the same model with SAML layers and pretrained experts, and its processor.
        folds, options, guard, beam_size, language, scoring, checkpoint, on_stage, on_done: as for
            `protocol.evaluate`.
        device: of the full and the quantised model; None is the CPU.

    Raises:
        SAMLError: the name gives a quantised model, or as `load_model` and `adapt`.
    """
    full, quantised = load_model(name_or_path, device), load_model(name_or_path, device)
    if hasattr(full[0], "saml"):
        raise SAMLError(
            f"{name_or_path}: is quantised already; evaluate compares with full precision"
        )
    compressed = compression_of(saml[0])
    config = compressed.config.to_dict()
    base = {key: config[key] for key in ("format", "block_size", "double_quant")}
    report = compress(quantised[0], SAMLConfig(num_experts=0, **base))
    result = evaluate(
        full, quantised, saml, folds, options,
        guard=guard, beam_size=beam_size, language=language, scoring=scoring,
        checkpoint=checkpoint, on_stage=on_stage, on_done=on_done,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        saml_bytes = save_saml(*saml, folder)
        quantised_bytes = save_saml(*quantised, Path(folder) / "quantised")
    result.size = {
        "full_bytes": report.full_bytes,
        "quantised_bytes": quantised_bytes,
        "saml_bytes": saml_bytes,
        "ratio": round(report.full_bytes / saml_bytes, 3),
    }
    result.trainable = sum(p.numel() for p in compressed.experts().values())
    return result
