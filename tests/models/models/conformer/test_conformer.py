"""The Conformer: masks, surgery, files, decoding; random weights unless the test says otherwise."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from synthetic import small_conformer
from torch import nn
from transformers import CanaryConfig
from typer.testing import CliRunner

from saml_kernels import SAMLConfig, SAMLError, SAMLLinear
from saml_kernels.layers.conv import QuantizedConv2d, SAMLPointwiseConv1d
from saml_models.cli.main import app
from saml_models.compress.apply import apply_saml
from saml_models.compress.checkpoint import load_saml, save_saml
from saml_models.compress.layers import quantised_tensors
from saml_models.compress.loading import load_model
from saml_models.data.corpora import load_corpus
from saml_models.evaluation.protocol import SYSTEMS
from saml_models.models import token_limits as limits
from saml_models.models.conformer import joint
from saml_models.models.conformer import speech_model as conformer_speech
from saml_models.models.conformer.loading import is_conformer, load_conformer
from saml_models.models.conformer.model import Conformer
from saml_models.models.registry import bind
from saml_models.training import adapt as adaptation
from saml_models.training.loop import Sample, fit
from saml_models.training.options import TrainingOptions
from saml_models.transcription.clips import decode_clips
from saml_models.transcription.recordings import transcribe


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    return small_conformer()


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    """Noise that changes, of 1.1, 2 and 3.3 seconds."""
    rng = np.random.default_rng(0)
    return [
        (rng.normal(0, 0.1, n) * np.sin(np.arange(n) / 3000)).astype(np.float32)
        for n in (17600, 32000, 52800)
    ]


def batch(pair: Any, clips: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    speech = bind(*pair)
    return speech.collate([speech.prepare(c) for c in clips], None)


@torch.no_grad()
def outputs(model: Any, features: torch.Tensor, mask: torch.Tensor) -> Any:
    """Both branches, with the encoder's mask where the model has routers."""
    speech = bind(model, None)
    if hasattr(model, "saml"):
        model.saml.context.mask = speech.encoder_mask(mask)
    inputs = torch.tensor([[1, 7, 9, 12]] * len(features))
    found = speech.outputs(features, mask, inputs, torch.arange(inputs.numel()))
    return found.logits.view(len(features), 4, -1), found.ctc, found.ctc_lengths


@pytest.mark.parametrize("router", [None, "token", "utterance", "speaker"])
def test_padding_changes_nothing(pair: Any, clips: list[np.ndarray], router: Any) -> None:
    model = deepcopy(pair[0])
    if router:
        apply_saml(model, SAMLConfig(num_experts=2, rank=2, router=router))
        for parameter in model.saml.experts().values():
            nn.init.normal_(parameter, std=0.2)
    logits, ctc, lengths = outputs(model, *batch(pair, clips))
    for row, clip in enumerate(clips):
        alone, alone_ctc, (frames,) = outputs(model, *batch(pair, [clip]))
        assert frames == lengths[row] == alone_ctc.shape[1]
        torch.testing.assert_close(logits[row], alone[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ctc[row, :frames], alone_ctc[0], rtol=1e-4, atol=1e-4)


def test_features_are_those_of_the_library_s_batch(pair: Any, clips: list[np.ndarray]) -> None:
    import soxr

    extractor = pair[1].feature_extractor
    slow = [soxr.resample(c, 16000, 12000) for c in clips]
    theirs = extractor(slow, sampling_rate=12000, return_tensors="pt")
    features, mask = batch(pair, clips)
    longest = features.shape[1]
    assert torch.equal(mask, theirs.attention_mask[:, :longest].bool())
    torch.testing.assert_close(features, theirs.input_features[:, :longest], rtol=0, atol=1e-4)


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("frames", [1, 15, 16, 17, 99])
def test_the_routers_mask_is_the_encoder_s(factor: int, frames: int) -> None:
    config = small_conformer()[0].config
    config.encoder_config.subsampling_factor = factor
    model = Conformer(config).eval()
    mask = torch.arange(100) < torch.tensor([[frames], [100]])
    encoded = model.get_encoder()(torch.randn(2, 100, 64), attention_mask=mask)
    assert torch.equal(bind(model, None).encoder_mask(mask), encoded.attention_mask.bool())


def test_nothing_dense_is_left(pair: Any) -> None:
    model = deepcopy(pair[0])
    depthwise = sum(
        isinstance(m, nn.Conv1d | nn.Conv2d) and m.groups == m.in_channels for m in model.modules()
    )
    report = apply_saml(model, SAMLConfig(num_experts=2, rank=1))
    kept = list(report.kept.values())
    assert kept.count("depthwise") == depthwise == 4  # two of the subsampling, one a block
    for name, module in model.named_modules():
        assert type(module) not in (nn.Linear, nn.Embedding, nn.Conv2d) or name.endswith(
            ("subsampling.layers.0", "subsampling.layers.2")
        ), name
        if type(module) is nn.Conv1d:
            assert module.kernel_size != (1,) and module.groups == module.in_channels, name
    kinds = report.replaced
    assert kinds["SAMLPointwiseConv1d"] == 4 and kinds["QuantizedConv2d"] == 1
    assert kinds["TiedHead"] == kinds["SAMLEmbedding"] == 1
    assert isinstance(model.model.encoder.layers[0].conv.pointwise_conv1, SAMLPointwiseConv1d)
    assert isinstance(model.model.encoder.subsampling.layers[3], QuantizedConv2d)
    # Positions have no voice: their projections are in low bits and have no experts.
    position = model.model.encoder.layers[0].self_attn.relative_k_proj
    assert isinstance(position, SAMLLinear) and len(position.lora_a) == 0


def test_without_experts_logits_move_as_the_dequantised_weights_do(
    pair: Any, clips: list[np.ndarray]
) -> None:
    low, dense = deepcopy(pair[0]), deepcopy(pair[0])
    apply_saml(low, SAMLConfig(num_experts=0))
    state = {n: t for n, t in low.state_dict().items() if n in dense.state_dict()}
    dense.load_state_dict(state, strict=False)  # float16 norms and biases
    for name, weight in quantised_tensors(low).items():
        target = name.removesuffix(".linear.weight") + ".weight" if ".conv." in name else name
        values = weight.dequantize(torch.float32)
        with torch.no_grad():
            dense.get_parameter(target).copy_(values.view_as(dense.get_parameter(target)))
    features = batch(pair, clips)
    with torch.no_grad():
        full, ours, theirs = (outputs(m, *features)[:2] for m in (pair[0], low, dense))
    for a, b, c in zip(full, ours, theirs, strict=True):
        torch.testing.assert_close(b, c, rtol=1e-4, atol=1e-4)
        moved = (c - a).norm()
        assert moved > 0 and (b - a).norm() <= 1.001 * moved


@pytest.mark.parametrize("router", ["token", "utterance"])
def test_logits_come_back_bit_for_bit(
    pair: Any, clips: list[np.ndarray], router: Any, tmp_path: Path
) -> None:
    model = deepcopy(pair[0])
    apply_saml(model, SAMLConfig(num_experts=2, rank=2, router=router))
    for parameter in model.saml.experts().values():
        nn.init.normal_(parameter, std=0.2)
    save_saml(model, pair[1], tmp_path)
    again, processor = load_model(tmp_path)
    features = batch(pair, clips)
    for a, b in zip(outputs(model, *features), outputs(again, *features), strict=True):
        assert torch.equal(a, b)
    assert decode_clips(bind(again, processor), clips) == decode_clips(bind(model, pair[1]), clips)


@pytest.mark.parametrize(
    ("width", "layers", "decoder_layers", "rank"), [(1024, 3, 1, 4), (512, 8, 2, 2)]
)
def test_seven_times_smaller_with_everything(
    width: int, layers: int, decoder_layers: int, rank: int, tmp_path: Path
) -> None:
    """Canary's widths; few layers, so that the suite stays quick. The default rank is 4."""
    heads, vocabulary = 8, 5248
    config = CanaryConfig(
        vocab_size=vocabulary,
        encoder_config={
            "model_type": "parakeet_encoder", "hidden_size": width, "num_hidden_layers": layers,
            "num_attention_heads": heads, "intermediate_size": 4 * width, "num_mel_bins": 128,
        },
        decoder_config={
            "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 4 * width,
            "num_hidden_layers": decoder_layers, "num_attention_heads": heads,
            "num_key_value_heads": heads, "head_dim": width // heads,
        },
    )  # fmt: skip
    model = Conformer(config).eval()
    report = apply_saml(model, SAMLConfig(rank=rank, expert_init="lora"))
    stored = save_saml(model, small_conformer()[1], tmp_path)
    assert report.full_bytes / stored >= 7.0


def test_beams_and_the_ctc_branch(pair: Any, clips: list[np.ndarray]) -> None:
    model, processor = pair
    greedy = decode_clips(bind(model, processor), clips)
    assert [decode_clips(bind(model, processor), [c])[0] for c in clips] == greedy
    beams = decode_clips(bind(model, processor), clips, beam_size=3)
    assert [decode_clips(bind(model, processor), [c], beam_size=3)[0] for c in clips] == beams
    assert not model.training and all(isinstance(t, str) for t in beams)


def test_without_a_ctc_head_the_text_is_the_library_s(
    pair: Any, clips: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = deepcopy(pair[0]), pair[1]
    del model.ctc_head
    # A random model rarely ends by itself, which is taken for a loop.
    monkeypatch.setattr(conformer_speech, "is_loop", lambda ids, limit: False)
    monkeypatch.setattr(limits, "repeated", lambda ids: 0)
    features, mask = batch(pair, clips[:1])
    for beams in (1, 4):
        tokens = model.generate(
            input_features=features,
            attention_mask=mask,
            decoder_input_ids=torch.tensor([[processor.tokenizer.bos_token_id]]),
            num_beams=beams,
            max_new_tokens=int(bind(model, None).encoder_mask(mask).sum()) + 1,
        )
        theirs = processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()
        assert decode_clips(bind(model, processor), clips[:1], beam_size=beams) == [theirs]


def test_the_better_of_two_texts_by_both_branches(pair: Any, clips: list[np.ndarray]) -> None:
    model = pair[0]
    features, mask = batch(pair, clips)
    with torch.no_grad():
        encoded = model.get_encoder()(features, attention_mask=mask)
        ctc = model.ctc_head(encoded.last_hidden_state).log_softmax(-1)
    frames = encoded.attention_mask.sum(-1)
    texts = [[[5, 6, 7], [8], []], [[9, 9], [30, 31, 32, 33], [4]], [[11], [12, 13], [14, 14, 15]]]

    def by_hand(row: int, text: list[int], weight: float) -> float:
        whole = torch.tensor([[1, *text, 2]])
        with torch.no_grad():
            logits = model(
                input_features=features[row : row + 1, : mask[row].sum()],
                attention_mask=mask[row : row + 1, : mask[row].sum()],
                decoder_input_ids=whole[:, :-1],
            ).logits.log_softmax(-1)
        said = logits[0].gather(-1, whole[0, 1:, None]).sum()
        n = int(frames[row])
        heard = -F.ctc_loss(
            ctc[row, :n].unsqueeze(1), torch.tensor([text]).long().view(1, -1),
            torch.tensor([n]), torch.tensor([len(text)]), blank=0, reduction="sum",
        )  # fmt: skip
        return float((1 - weight) * said + weight * heard)

    for weight in (0.0, 0.5, 1.0):
        with torch.no_grad():
            chosen = joint.best_of(texts, model, encoded, ctc, frames, [1], weight=weight)
        for row in range(3):
            assert chosen[row] == max(texts[row], key=lambda t: by_hand(row, t, weight))


def test_ctc_greedy_drops_repeats_and_blanks() -> None:
    path = torch.tensor([[0, 5, 5, 0, 5, 6, 6, 7], [3, 3, 0, 0, 4, 4, 4, 4]])
    found = joint.ctc_greedy(F.one_hot(path, 8).float(), torch.tensor([8, 4]), 0)
    assert found == [[5, 5, 6, 7], [3]]


def test_long_recordings_are_cut_where_they_are_quiet(pair: Any) -> None:
    rng = np.random.default_rng(1)
    audio = rng.normal(0, 0.1, 16000 * 70).astype(np.float32)
    quiet = [16000 * 22, 16000 * 48]
    for place in quiet:
        audio[place : place + 8000] = 0
    seen: list[float] = []
    found = transcribe(*pair, audio, on_progress=lambda done, total: seen.append(done))
    assert found.duration == 70.0 and seen == sorted(seen) and seen[-1] == 70.0
    cuts = [end for _, end in conformer_speech._stretches(audio)]
    assert cuts[-1] == len(audio)
    for cut, place in zip(cuts, quiet, strict=False):
        assert place <= cut <= place + 8000
    for segment in found.segments:
        assert 0 <= segment.start < segment.end <= 70 and segment.end - segment.start <= 30
    with pytest.raises(SAMLError, match="word times"):
        transcribe(*pair, audio, word_timestamps=True)
    with pytest.raises(SAMLError, match="language"):
        transcribe(*pair, audio[:16000], language="de")
    with pytest.raises(SAMLError, match="task"):
        transcribe(*pair, audio[:16000], task="translate")


def test_canary_s_own_prompt_is_asked_for_where_there_is_one(pair: Any) -> None:
    processor = deepcopy(pair[1])
    processor.chat_template = (
        "{% for m in messages %}{% for c in m.content %}{% if c.type == 'text' %}"
        "{{ 'the' if c.source_language == 'en' else 'dog' }}"
        "{% endif %}{% endfor %}{% endfor %}"
    )
    speech: Any = bind(pair[0], processor)
    english, german = (speech.prompt(code) for code in ("en", "de"))
    assert english == processor.tokenizer("the").input_ids != german
    ids, prompt = speech.token_ids("fox")
    assert ids[:prompt] == english and ids[-1] == processor.tokenizer.eos_token_id


def test_a_folder_comes_back_as_it_was(pair: Any, clips: list[np.ndarray], tmp_path: Path) -> None:
    pair[0].save_pretrained(tmp_path)
    pair[1].save_pretrained(tmp_path)
    assert is_conformer(tmp_path)
    model, processor = load_model(tmp_path)
    features = batch((model, processor), clips)
    for a, b in zip(outputs(pair[0], *features), outputs(model, *features), strict=True):
        assert torch.equal(a, b)
    assert decode_clips(bind(model, processor), clips) == decode_clips(bind(*pair), clips)


@pytest.mark.parametrize("harm", ["missing", "cut", "no weights", "no head", "whisper", "device"])
def test_bad_folders_are_one_line(pair: Any, tmp_path: Path, harm: str) -> None:
    pair[0].save_pretrained(tmp_path)
    pair[1].save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    if harm == "cut":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif harm == "no weights":
        weights.unlink()
    elif harm == "no head":
        from safetensors.torch import load_file, save_file

        kept = {n: t for n, t in load_file(weights).items() if not n.startswith("ctc_head")}
        save_file(kept, weights, {"format": "pt"})
    elif harm == "whisper":
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "whisper"}))
    folder = tmp_path / "nothing" if harm == "missing" else tmp_path
    device = "cuda:99" if harm == "device" else None
    with pytest.raises(SAMLError) as found:
        load_conformer(folder, device)
    assert "\n" not in str(found.value)


def test_a_description_that_asks_too_much_is_refused(pair: Any, tmp_path: Path) -> None:
    model = deepcopy(pair[0])
    apply_saml(model, SAMLConfig(num_experts=2, rank=1))
    save_saml(model, pair[1], tmp_path)
    path = tmp_path / "saml.json"
    good = json.loads(path.read_text())
    for side, key, value in [
        ("encoder_config", "hidden_size", 2**20),
        ("encoder_config", "num_hidden_layers", 10**6),
        ("decoder_config", "max_position_embeddings", 10**9),
    ]:
        bad = deepcopy(good)
        bad["model"][side][key] = value
        path.write_text(json.dumps(bad))
        with pytest.raises(SAMLError):
            load_saml(tmp_path)


class Killed(Exception):
    """What a test's `on_step` raises."""


@pytest.fixture(scope="module")
def manifest(speech_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds of each of three utterances of one reader."""
    folder = tmp_path_factory.mktemp("speech")
    found = load_corpus(speech_root / "LibriSpeech" / "test-other", ["1688"])[:3]
    rows = []
    for i, utterance in enumerate(found):
        soundfile.write(folder / f"{i}.wav", utterance.load()[:32000], 16000)
        rows.append({"audio": f"{i}.wav", "text": utterance.text[:40], "speaker": "ann"})
    path = folder / "voice.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def samples(manifest: Path) -> list[Sample]:
    return [Sample(u.load, 2.0, u.text) for u in load_corpus(manifest)]


def test_a_plain_one_is_trained_whole_and_resumes(samples: list[Sample], tmp_path: Path) -> None:
    """Batch statistics move with the weights, on both branches, and are in the checkpoint."""
    options = TrainingOptions(epochs=2, max_batch=1, average=0.5, ctc=0.5, checkpoint_every=1)
    (whole, processor), (again, _) = small_conformer(), small_conformer()
    before = deepcopy(whole.state_dict())
    assert fit(bind(whole, processor), samples, options).steps == 6 and not whole.training
    for name, value in whole.state_dict().items():
        if value.is_floating_point() and "running" in name:
            assert not torch.equal(value, before[name]), name
    moved = [n for n, p in whole.named_parameters() if not torch.equal(p, before[n])]
    assert "ctc_head.weight" in moved and len(moved) > 0.95 * len(list(whole.parameters()))
    path = tmp_path / "run.safetensors"

    def kill(done: int, steps: int, loss: float) -> None:
        if done == 4:
            raise Killed

    with pytest.raises(Killed):
        fit(bind(again, processor), samples, options, path, kill)
    resumed, _ = small_conformer()
    fit(bind(resumed, processor), samples, options, path)
    for name, value in whole.state_dict().items():
        if "num_batches" not in name:
            assert torch.equal(resumed.state_dict()[name], value), name


def test_the_loss_of_both_branches_falls(samples: list[Sample]) -> None:
    options = TrainingOptions(learning_rate=3e-3, epochs=12, max_batch=1, speeds=(1.0,), ctc=0.5)
    report = fit(bind(*small_conformer()), samples[:2], options)
    assert report.last_loss < 0.9 * report.first_loss


def test_adaptation_leaves_a_frozen_batch_norm_alone(samples: list[Sample]) -> None:
    model, processor = small_conformer()
    apply_saml(model, SAMLConfig(num_experts=2, rank=1))
    before = {n: b.clone() for n, b in model.state_dict().items() if "running" in n}
    fit(bind(model, processor), samples, TrainingOptions(epochs=1, max_batch=2))
    assert before and all(torch.equal(model.state_dict()[n], b) for n, b in before.items())


def saml(*arguments: Any) -> Any:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def test_the_same_commands_as_for_whisper(
    pair: Any, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        adaptation, "CONFORMER", replace(adaptation.CONFORMER, epochs=1, speeds=(1.0,))
    )
    base, clip = tmp_path / "base", manifest.parent / "0.wav"
    pair[0].save_pretrained(base)
    pair[1].save_pretrained(base)
    profile, small = tmp_path / "ann.safetensors", tmp_path / "small"
    saml("adapt", "--model", base, "--data", manifest, "--out", profile)
    saml("transcribe", clip, "--model", base, "--speaker", profile)
    saml("quantize", small, "--model", base)
    saml("transcribe", clip, "--model", small)
    out = tmp_path / "out.json"
    saml("evaluate", "--model", base, "--data", manifest, "--folds", 3, "--json", out)
    result = json.loads(out.read_text())
    assert set(result["wer"]) == set(SYSTEMS) and out.with_suffix(".png").exists()
