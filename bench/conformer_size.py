"""How much smaller Conformers get with everything included: bytes on disk, random weights.

    python bench/conformer_size.py

canary-512 and canary-1024 have Canary's widths (1024 with fewer layers), small is what
`saml train-base` makes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from transformers import CanaryConfig

from saml_kernels import SAMLConfig
from saml_models.base_training import Shape
from saml_models.conformer import Conformer
from saml_models.families import family_of
from saml_models.storage import _stored_form, round_experts, write_tensors
from saml_models.surgery import apply_saml


def canary(width: int, layers: int, decoder_layers: int, vocabulary: int) -> CanaryConfig:
    both = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": 8}
    return CanaryConfig(
        vocab_size=vocabulary,
        encoder_config={
            "model_type": "parakeet_encoder", **both, "num_hidden_layers": layers,
            "num_mel_bins": 128,
        },
        decoder_config={
            **both, "vocab_size": vocabulary, "num_hidden_layers": decoder_layers,
            "num_key_value_heads": 8, "head_dim": width // 8,
        },
    )  # fmt: skip


def main() -> None:
    shapes = {
        "canary-512": canary(512, 17, 4, 5248),
        "canary-1024": canary(1024, 4, 1, 16384),
        "small": Shape().config(),
    }
    for name, config in shapes.items():
        for experts, rank in ((0, 4), (4, 4), (4, 2), (4, 1)):
            model = Conformer(config).eval()
            saml = SAMLConfig(num_experts=experts, rank=rank, expert_init="lora")
            report = apply_saml(model, saml)
            round_experts(model)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "model.safetensors"
                write_tensors(path, _stored_form(model, family_of(model)), {})
                stored = path.stat().st_size
            print(
                f"{name}: {experts} experts of rank {rank}: {report.full_bytes / 1e6:.1f} MB -> "
                f"{stored / 1e6:.2f} MB, {report.full_bytes / stored:.2f}x"
            )


if __name__ == "__main__":
    main()
