"""`import saml_models.hf`: transformers reads and writes models with low-bit weights and experts.

    import saml_models.hf
    from transformers import AutoModelForSpeechSeq2Seq

    model = AutoModelForSpeechSeq2Seq.from_pretrained("folder that save_pretrained wrote")

Whatever loads or compresses a model through this package has registered it too.
"""

from saml_models.compress.quantizer import SAMLQuantizationConfig, SAMLQuantizer

__all__ = ["SAMLQuantizationConfig", "SAMLQuantizer"]
