"""ESPnet's own Conformer with SAML layers, against ESPnet itself on a small random model."""

from __future__ import annotations

import argparse
import importlib
import sys
from copy import deepcopy
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from saml_kernels import SAMLConfig, SAMLError, SAMLLinear
from saml_kernels.layers.conv import QuantizedConv2d, SAMLPointwiseConv1d
from saml_models.compress.apply import apply_saml
from saml_models.compress.checkpoint import save_saml
from saml_models.data.corpora import Utterance
from saml_models.evaluation.protocol import Fold, evaluate
from saml_models.models.registry import bind
from saml_models.training.adapt import adapt
from saml_models.training.options import TrainingOptions
from saml_models.transcription.clips import decode_clips

TOKENS = ["<blank>", "<unk>", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'", "<space>", "<sos/eos>"]
# ESPnet imports these for speech enhancement, text to speech and other encoders.
UNUSED = (
    "torchaudio", "torchaudio.functional", "torchaudio.compliance",
    "torchaudio.compliance.kaldi", "g2p_en", "h5py", "fast_bss_eval", "ci_sdr", "jaconv",
    "tacotron_cleaner", "tacotron_cleaner.cleaners", "jamo", "pypinyin", "nltk",
)  # fmt: skip


@pytest.fixture(scope="module")
def espnet() -> Any:
    """ESPnet's modules; packages that this model does not use may be missing."""
    pytest.importorskip("espnet2", reason="ESPnet is not installed; see saml_models/espnet.py")
    from transformers.utils import import_utils

    import_utils.is_torchaudio_available(), import_utils.is_g2p_en_available()  # remembered
    patch = pytest.MonkeyPatch()
    for name in UNUSED:
        try:
            importlib.import_module(name)
        except (ImportError, OSError):
            stand_in = MagicMock()
            stand_in.__spec__ = ModuleSpec(name, None)
            patch.setitem(sys.modules, name, stand_in)
    try:
        from espnet2.bin import asr_inference
        from espnet2.tasks.asr import ASRTask
    except ImportError as error:
        pytest.skip(f"ESPnet is installed in part: {error}")
    yield ASRTask, asr_inference.Speech2Text
    patch.undo()


@pytest.fixture(scope="module")
def files(espnet: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """config.yaml and weights of a random model, as an ESPnet recipe leaves them."""
    import yaml

    task = espnet[0]
    conf = task.get_default_config()
    conf.update(
        token_list=TOKENS, token_type="char", init=None, specaug=None, normalize=None,
        frontend="default",
        frontend_conf={"fs": "16k", "n_fft": 512, "hop_length": 160, "n_mels": 80},
        encoder="conformer",
        encoder_conf={
            "output_size": 64, "attention_heads": 2, "linear_units": 128, "num_blocks": 2,
            "cnn_module_kernel": 7, "rel_pos_type": "latest", "pos_enc_layer_type": "rel_pos",
            "selfattention_layer_type": "rel_selfattn", "macaron_style": True,
            "use_cnn_module": True, "activation_type": "swish", "dropout_rate": 0.0,
            "positional_dropout_rate": 0.0,
        },
        decoder="transformer",
        decoder_conf={
            "attention_heads": 2, "linear_units": 128, "num_blocks": 1, "dropout_rate": 0.0,
            "positional_dropout_rate": 0.0,
        },
        model_conf={"ctc_weight": 0.3, "lsm_weight": 0.1},
    )  # fmt: skip
    torch.manual_seed(0)
    model = task.build_model(argparse.Namespace(**conf))
    folder = tmp_path_factory.mktemp("espnet")
    (folder / "config.yaml").write_text(yaml.safe_dump(conf))
    torch.save(model.state_dict(), folder / "valid.pth")
    return folder / "config.yaml", folder / "valid.pth"


def load(files: tuple[Path, Path]) -> tuple[Any, Any]:
    from saml_models.models.espnet import load_espnet

    return load_espnet(*files, ctc_weight=0.3, maxlenratio=0.2)


def with_experts(model: Any) -> Any:
    apply_saml(model, SAMLConfig(num_experts=2, rank=2, expert_init="lora"))
    torch.manual_seed(1)
    for parameter in model.saml.experts().values():
        nn.init.normal_(parameter, std=0.1)
    return model


class Dense(nn.Module):
    """The same layer in plain PyTorch: the dequantised weight, experts one by one."""

    def __init__(self, layer: SAMLLinear) -> None:
        super().__init__()
        self.layer, self.scaling = layer, layer.config.scaling
        self.dense = layer.weight.dequantize(layer.lora_a.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer: Any = self.layer
        y = F.linear(x, self.dense, layer.bias)
        if layer.router is not None:
            gates = F.linear(x, layer.router.weight).softmax(-1)
            for e in range(len(layer.lora_a)):
                expert = F.linear(F.linear(x, layer.lora_a[e]), layer.lora_b[e])
                y = y + self.scaling * gates[..., e : e + 1] * expert
        return y


def speech(seconds: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 0.1, int(16000 * seconds)).astype(np.float32)


@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float64, 1e-5), (torch.float32, 1e-3)], ids=["float64", "float32"]
)
def test_loss_and_gradients_are_espnet_s_own(files: Any, dtype: torch.dtype, close: float) -> None:
    model, _ = load(files)
    with_experts(model).to(dtype)
    dense = deepcopy(model)
    for parent in list(dense.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, SAMLLinear):
                setattr(parent, name, Dense(child))
    assert sum(isinstance(m, Dense) for m in dense.modules()) > 30
    clips = [speech(1.5, 0), speech(1.0, 1)]
    padded = nn.utils.rnn.pad_sequence([torch.from_numpy(c) for c in clips], batch_first=True)
    padded = padded.to(dtype)
    text = torch.tensor([[3, 4, 5, 6, 7], [9, 10, 11, -1, -1]])
    found = {}
    for kind, network in (("low", model), ("dense", dense)):
        loss, _, _ = network(
            speech=padded,
            speech_lengths=torch.tensor([len(c) for c in clips]),
            text=text,
            text_lengths=torch.tensor([5, 3]),
        )
        loss.backward()
        gradients = [p.grad for p in network.parameters() if p.requires_grad]
        found[kind] = loss, gradients
    torch.testing.assert_close(found["low"][0], found["dense"][0], rtol=1e-5, atol=1e-5)
    assert len(found["low"][1]) == len(found["dense"][1]) > 90
    seen = 0
    for a, b in zip(found["low"][1], found["dense"][1], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            seen += 1
            scale = max(1.0, float(b.abs().max()))
            torch.testing.assert_close(a, b, rtol=close, atol=1e-5 * scale)
    assert seen > 90


def test_nothing_dense_is_left(files: Any) -> None:
    model, _ = load(files)
    report = apply_saml(model, SAMLConfig(num_experts=2, rank=1))
    assert (
        list(report.kept.values()).count("depthwise") == 3
    )  # one depthwise a block, and the first of the subsampling
    for name, module in model.named_modules():
        assert type(module) not in (nn.Linear, nn.Embedding), name
        if type(module) in (nn.Conv1d, nn.Conv2d):
            assert module.groups == module.in_channels, name
    assert isinstance(model.encoder.embed.conv[2], QuantizedConv2d)
    block = model.encoder.encoders[0]
    assert isinstance(block.conv_module.pointwise_conv1, SAMLPointwiseConv1d)
    assert len(block.self_attn.linear_pos.lora_a) == 0 < len(block.self_attn.linear_q.lora_a)
    assert isinstance(model.ctc.ctc_lo, SAMLLinear)
    with pytest.raises(SAMLError, match="own files"):
        save_saml(model, None, "nowhere")


def test_training_sees_what_espnet_sees(files: Any) -> None:
    model, processor = load(files)
    speaking = bind(model, processor)
    clips = [speech(1.5, 0), speech(1.0, 1)]
    features, mask = speaking.collate([speaking.prepare(c) for c in clips], None)
    inputs = torch.tensor([[30, 5, 6], [30, 7, 8]])
    found = speaking.outputs(features, mask, inputs, torch.arange(inputs.numel()))
    padded = nn.utils.rnn.pad_sequence([torch.from_numpy(c) for c in clips], batch_first=True)
    encoded, lengths = model.encode(padded, torch.tensor([len(c) for c in clips]))
    assert torch.equal(lengths, found.ctc_lengths)
    assert torch.equal(speaking.encoder_mask(mask).sum(1), lengths)
    said, _ = model.decoder(encoded, lengths, inputs, torch.tensor([3, 3]))
    # The shorter clip's last spectrum differs: alone it is mirrored at its end, here padded.
    heard = model.ctc.log_softmax(encoded)
    for row, close in ((0, 1e-4), (1, 1e-2)):
        logits = found.logits.view(2, 3, -1)[row]
        torch.testing.assert_close(logits, said[row], rtol=0, atol=close)
        ctc = found.ctc[row, : lengths[row] - 2], heard[row, : lengths[row] - 2]
        torch.testing.assert_close(*ctc, rtol=0, atol=close)
    ids, prompt = speaking.token_ids("it's")
    assert [TOKENS[i] for i in ids] == ["<sos/eos>", "I", "T", "'", "S", "<sos/eos>"]
    assert prompt == 1


def test_the_protocol_through_speech2text(files: Any, tmp_path: Path) -> None:
    import soundfile

    said = []
    for i in range(3):
        soundfile.write(tmp_path / f"{i}.wav", speech(1.0, i), 16000)
        said.append(Utterance(f"u{i}", "ann", "NO ONE", tmp_path / f"{i}.wav"))
    full, quantised, saml = load(files), load(files), load(files)
    apply_saml(quantised[0], SAMLConfig(num_experts=0))
    with_experts(saml[0])
    clips = [u.load() for u in said]
    theirs = [full[1](c)[0][0].strip() for c in clips]
    assert decode_clips(bind(*full), clips, beam_size=full[1].beam_search.beam_size) == theirs
    options = TrainingOptions(epochs=2, learning_rate=1e-2, speeds=(1.0,))
    before = decode_clips(bind(*saml), clips)
    profile = adapt(*saml, said, options)
    assert profile.about["steps"] == 2 and decode_clips(bind(*saml), clips) == before
    result = evaluate(full, quantised, saml, [Fold("ann", said[:2], said[2:])], options)
    other = result.hypotheses.pop("other_speaker")
    assert not other and all(len(texts) == 1 for texts in result.hypotheses.values())
    assert result.hypotheses["full_precision"] == decode_clips(bind(*full), clips[2:])


def test_missing_files_are_one_line(tmp_path: Path) -> None:
    from saml_models.models.espnet import load_espnet

    with pytest.raises(SAMLError, match="no such file"):
        load_espnet(tmp_path / "config.yaml", tmp_path / "x.pth")
