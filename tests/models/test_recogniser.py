"""The facade: what a script sees of the package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
import torch
from typer.testing import CliRunner

import saml_models as saml
from saml_kernels import SAMLError
from saml_models.cli.main import app
from saml_models.data.corpora import Utterance, load_corpus
from saml_models.training.options import TrainingOptions

OPTIONS = TrainingOptions(epochs=1, learning_rate=1e-3, speeds=(1.0,))


@pytest.fixture(scope="module")
def utterances(speech_root: Path) -> list[Utterance]:
    return load_corpus(speech_root / "LibriSpeech" / "test-other", ["1688"])[:4]


@pytest.fixture(scope="module")
def model() -> saml.Recogniser:
    return saml.load("tiny.en")


@pytest.fixture(scope="module")
def folder(utterances: list[Utterance], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips beside their texts, as somebody records them."""
    place = tmp_path_factory.mktemp("my_clips")
    for number, utterance in enumerate(utterances[:2]):
        soundfile.write(place / f"{number}.wav", utterance.load(), 16000)
        (place / f"{number}.txt").write_text(utterance.text)
    return place


@pytest.fixture(scope="module")
def me(model: saml.Recogniser, folder: Path) -> saml.SpeakerProfile:
    return model.adapt(folder, options=OPTIONS)


def test_a_folder_and_pairs_teach_the_same(
    model: saml.Recogniser, me: saml.SpeakerProfile, utterances: list[Utterance], folder: Path
) -> None:
    pairs = [(folder / f"{i}.wav", utterances[i].text) for i in range(2)]
    samples = [(soundfile.read(path)[0], text) for path, text in pairs]
    assert me.name == folder.name and me.about["utterances"] == 2
    for given in (pairs, samples):
        again = model.adapt(given, options=OPTIONS)
        assert again.hash == me.hash and again.name == "me"
    assert model.adapt(pairs, speaker="ann", options=OPTIONS).name == "ann"


def test_audio_in_every_form_is_the_same_audio(
    model: saml.Recogniser, utterances: list[Utterance]
) -> None:
    path, clip = utterances[2].audio, utterances[2].load()
    text = model.transcribe(path).text
    assert text
    for form in (str(path), clip, torch.from_numpy(clip), clip.tolist(), tuple(clip.tolist())):
        assert model.transcribe(form).text == text
    transcripts = model.transcribe([path, clip])
    assert [t.text for t in transcripts] == [text, text] and model.transcribe([]) == []
    half = soxr.resample(clip, 16000, 8000)
    slow, fast = (model.transcribe(half, rate=rate) for rate in (8000, 16000))
    assert slow.segments[0].end == pytest.approx(len(clip) / 16000, abs=0.01)
    assert fast.segments[0].end == pytest.approx(len(clip) / 32000, abs=0.01)


def test_the_command_line_gives_the_same_text(
    model: saml.Recogniser, me: saml.SpeakerProfile, utterances: list[Utterance], tmp_path: Path
) -> None:
    profile, path = tmp_path / "me.safetensors", utterances[2].audio
    me.save(profile)
    result = CliRunner().invoke(app, ["transcribe", str(path), "--speaker", str(profile)])
    assert result.exit_code == 0, result.output
    assert model.transcribe(path, speaker=me).text == result.stdout.strip()
    assert model.transcribe(path, speaker=profile).text == result.stdout.strip()
    plain = CliRunner().invoke(app, ["transcribe", str(path)])
    released = saml.load("tiny.en", compress=False)
    assert released.transcribe(path).text == plain.stdout.strip()


def test_speakers_by_name_and_one_for_each_recording(
    model: saml.Recogniser,
    me: saml.SpeakerProfile,
    utterances: list[Utterance],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SAML_SPEAKERS", str(tmp_path))
    recogniser = saml.Recogniser(model.model, model.processor)
    recogniser.speakers.save(me, "ann")
    paths = [u.audio for u in utterances[2:]]
    alone = [recogniser.transcribe(p, speaker=s).text for p, s in zip(paths, ("ann", None))]  # noqa: B905
    mixed = recogniser.transcribe(paths, speaker=["ann", None])
    assert [t.text for t in mixed] == alone
    assert [t.speaker_hash for t in mixed] == [me.hash, None]
    with pytest.raises(SAMLError, match="bob"):
        recogniser.transcribe(paths[0], speaker="bob")
    with pytest.raises(SAMLError, match="1 for 2 recordings"):
        recogniser.transcribe(paths, speaker=["ann"])


def test_experts_of_a_half_model_are_the_same(model: saml.Recogniser, folder: Path) -> None:
    """Profiles of gates name them by their hash."""
    half = saml.load("tiny.en", dtype=torch.bfloat16)
    assert half.model.model.encoder.layer_norm.weight.dtype == torch.bfloat16
    assert half.model.saml.experts_hash() == model.model.saml.experts_hash()
    assert isinstance(half.transcribe(folder / "0.wav").text, str)


def test_saved_and_loaded(
    model: saml.Recogniser, utterances: list[Utterance], tmp_path: Path
) -> None:
    assert model.save(tmp_path / "small") < 22e6
    again = saml.load(tmp_path / "small")
    assert again.transcribe(utterances[2].audio).text == model.transcribe(utterances[2].audio).text
    with pytest.raises(SAMLError, match="is there already"):
        model.save(tmp_path / "small")
    with pytest.raises(SAMLError, match="quantised already"):
        again.evaluate(utterances, folds=2)


def test_what_cannot_be_is_one_line(model: saml.Recogniser, folder: Path, tmp_path: Path) -> None:
    full = saml.load("tiny.en", compress=False)
    cases: list[tuple[Any, str]] = [
        (lambda: full.adapt(folder), "no SAML layers"),
        (lambda: full.save(tmp_path / "full"), "no SAML layers"),
        (lambda: saml.load("tiny.en", compress=False, experts="english"), "compress"),
        (lambda: model.quantize(), "already has SAML layers"),
        (lambda: model.adapt([("one",)]), "pairs"),
        (lambda: model.adapt([]), "no utterances"),
        (lambda: model.transcribe(np.zeros((2, 16000), np.float32)), r"\[samples\]"),
        (lambda: model.transcribe(np.zeros(16000, np.int16)), "floating-point"),
        (lambda: model.transcribe(np.zeros(16000, np.float32), rate=0), "rate"),
        (lambda: model.to("cuda:99"), "cuda:99"),
    ]
    for act, message in cases:
        with pytest.raises(SAMLError, match=message):
            act()
    assert full.quantize().replaced["SAMLLinear"] > 60
    assert full.adapt(folder, options=OPTIONS).about["utterances"] == 2


def everything(model: Any) -> dict[str, Any]:
    """Tensors, what learns and the modules themselves, by name."""
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    learns = {n: p.requires_grad for n, p in model.named_parameters()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return {
        "tensors": tensors, "learns": learns, "modules": dict(model.named_modules()),
        "hooks": hooks, "own": set(vars(model)),
    }  # fmt: skip


def test_a_refused_quantisation_leaves_the_model_as_it_was(
    me: saml.SpeakerProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = saml.load("tiny.en", compress=False)
    before = everything(full.model)

    def refused(reason: str, calibration: Any = None, **changes: Any) -> None:
        path = tmp_path / "experts.safetensors"
        replace(me, **changes).save(path)
        with pytest.raises(SAMLError, match=rf"experts\.safetensors: .*{reason}"):
            full.quantize(path, calibration=calibration)
        after = everything(full.model)
        tensors = before["tensors"].items()
        assert not hasattr(full.model, "saml")
        assert all(torch.equal(after["tensors"].pop(n), t) for n, t in tensors)
        assert not after["tensors"]
        assert all(after[key] == before[key] for key in ("learns", "modules", "hooks", "own"))

    refused("made for another model", weight_hash="0" * 64)
    monkeypatch.setattr("saml_models.recogniser.calibrate_on", None)  # nothing is calibrated
    layer = next(name for name in me.tensors if name.endswith("lora_a.int8"))
    cut = me.tensors | {layer: me.tensors[layer][:-1]}
    speech = [(np.zeros(16000, np.float32), "")]
    refused("expected .* int8 codes", speech, tensors=cut)
    refused("is pruned", speech, kept={layer.removesuffix(".lora_a.int8"): [0]})
    refused("is a profile of gates", speech, kind="gates")
    assert full.quantize().replaced["SAMLLinear"] > 60


def test_without_a_home_only_enrolled_speakers_are_missed(
    model: saml.Recogniser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    for name in ("SAML_SPEAKERS", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    recogniser = saml.Recogniser(model.model, model.processor)
    with pytest.raises(SAMLError, match=r"no home folder; .* SAML_SPEAKERS or --store"):
        recogniser.transcribe(np.zeros(16000, np.float32), speaker="ann")
    monkeypatch.setenv("SAML_SPEAKERS", str(tmp_path))
    assert recogniser.speakers.names() == []
