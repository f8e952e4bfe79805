"""Which pretrained experts a model gets: by default, by name, from a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from saml_kernels.errors import SAMLError
from saml_models.data.corpora import load_corpus
from saml_models.models.registry import bind
from saml_models.speakers.pretrained import load_adaptable, pretrained_experts
from saml_models.text.wer import pooled, word_errors
from saml_models.transcription.clips import decode_clips


def test_base_hears_english_in_short_windows_when_asked_to(speech_root: Path) -> None:
    """Without these experts it loses a third of the words in such windows: `bench windows`."""
    model, processor = load_adaptable("base", experts="english")
    assert model.saml.short_windows
    utterances = load_corpus(speech_root / "LibriSpeech" / "test-other")[::10]
    clips, said = [u.load() for u in utterances], [u.text for u in utterances]
    heard = decode_clips(bind(model, processor), clips, language="en")
    assert len(said) == 6
    assert pooled(word_errors(said, heard)).wer < 20


def test_base_is_left_to_all_its_languages_by_default() -> None:
    model, _ = load_adaptable("base")
    assert not model.saml.short_windows


def test_names_of_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file comes before a name; a name that is neither is refused, and both are named."""
    assert pretrained_experts("base", "english").about["method"] == "SAML pretraining"
    with pytest.raises(SAMLError, match=r"french: no such file.* for base"):
        pretrained_experts("base", "french")
    with pytest.raises(SAMLError, match=r"english: no such file.* for tiny\.en"):
        pretrained_experts("tiny.en", "english")
    monkeypatch.chdir(tmp_path)
    Path("english").write_text("not experts")
    with pytest.raises(SAMLError, match="english"):
        pretrained_experts("base", "english")
    with pytest.raises(SAMLError, match=r"nothing\.safetensors"):
        pretrained_experts("base", "nothing.safetensors")
