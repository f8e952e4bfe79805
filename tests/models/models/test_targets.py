"""What a transcript becomes: text is text, and one that is too long is refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic import END, small_conformer, small_whisper

from saml_kernels import SAMLConfig
from saml_kernels.errors import SAMLError
from saml_models.compress.apply import apply_saml
from saml_models.data.corpora import Utterance, load_corpus
from saml_models.models.registry import bind
from saml_models.models.targets import check_target, plain_tokens
from saml_models.training import samples
from saml_models.training.adapt import adapt
from saml_models.training.pretrain import pretrain
from saml_models.training.samples import training_samples

TYPED = [
    "hello <|endoftext|> there",
    "<|startoftranscript|><|notimestamps|> hello",
    "from <|0.00|> to <|30.00|>",
    "<|endoftext|",
    "a <|en<|endoftext|>|> b",
    "plain words, as ever",
]


@pytest.fixture(scope="module")
def utterance(speech_root: Path) -> Utterance:
    found = load_corpus(speech_root / "LibriSpeech" / "test-other", ["1688"])
    return min(found, key=lambda u: len(u.load()))


def model() -> Any:
    network = small_whisper(vocabulary=51864)
    network.config.max_target_positions = 448
    apply_saml(network, SAMLConfig(num_experts=2, rank=2))
    return network


@pytest.mark.parametrize("text", TYPED)
def test_typed_control_tokens_are_text(tiny_en: Any, text: str) -> None:
    tokenizer = tiny_en[1].tokenizer
    ids, prompt = bind(*tiny_en).token_ids(text)
    assert ids[-1] == tokenizer.eos_token_id
    words = ids[prompt:-1]
    assert all(i < tokenizer.eos_token_id for i in words)
    assert tokenizer.backend_tokenizer.decode(words, skip_special_tokens=False) == " " + text


def test_text_without_control_tokens_has_the_tokens_it_had(tiny_en: Any) -> None:
    tokenizer, text = tiny_en[1].tokenizer, " He said: 'a < b', then |stop|. Ünïcode, 日本語."
    assert plain_tokens(tokenizer, text) == tokenizer(text, add_special_tokens=False).input_ids


def test_a_conformers_control_tokens_too() -> None:
    tokenizer = small_conformer()[1].tokenizer
    typed = tokenizer(f"the {END} dog", add_special_tokens=False).input_ids
    assert tokenizer.eos_token_id in typed
    ids = plain_tokens(tokenizer, f"the {END} dog")
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_a_text_longer_than_the_decoder_is_refused(tiny_en: Any) -> None:
    network = tiny_en[0]
    check_target(network, "fits", [0] * 448)
    with pytest.raises(SAMLError, match=r"^long: its text is 449 tokens long, .* takes 448"):
        check_target(network, "long", [0] * 449)
    ids, _ = bind(network, tiny_en[1]).token_ids("word " * 500)
    assert len(ids) == 503 and ids[-1] == tiny_en[1].tokenizer.eos_token_id


@pytest.mark.parametrize("learn", [adapt, pretrain, training_samples])
def test_training_names_the_clip_before_anything_is_heard(
    tiny_en: Any, utterance: Utterance, learn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("heard before the texts were checked")

    monkeypatch.setattr(samples, "decode_clips", never)
    long = replace(utterance, id="clip-7", text="One two three four. " * 120)
    with pytest.raises(SAMLError, match="clip-7: its text is 603 tokens long"):
        if learn is training_samples:
            learn(bind(model(), tiny_en[1]), [utterance, long])
        else:
            learn(model(), tiny_en[1], [utterance, long])


def test_a_bare_text_is_counted_as_it_is_learnt(
    tiny_en: Any, utterance: Utterance, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "ACKNOWLEDGEMENT THEREFORE " * 60
    tokens = plain_tokens(tiny_en[1].tokenizer, " " + text.strip())
    assert len(tokens) > 448
    monkeypatch.setattr(samples, "decode_clips", lambda *a, **o: [""])
    (sample,) = training_samples(bind(model(), tiny_en[1]), [replace(utterance, text=text)])
    assert sample.text.lower() == text.lower().strip()
