"""`import saml_models.hf`: transformers reads and writes models with low-bit weights and experts.

It also knows `ConformerWhisper` then, at full precision too.

    import saml_models.hf
    from transformers import AutoModelForSpeechSeq2Seq

    model = AutoModelForSpeechSeq2Seq.from_pretrained("folder that save_pretrained wrote")

Whatever loads or compresses a model through this package has registered it too.
"""

from saml_models.compress.quantizer import SAMLQuantizationConfig, SAMLQuantizer
from saml_models.models.whisper.conformer import ConformerWhisper, ConformerWhisperConfig

__all__ = [
    "ConformerWhisper",
    "ConformerWhisperConfig",
    "SAMLQuantizationConfig",
    "SAMLQuantizer",
]
