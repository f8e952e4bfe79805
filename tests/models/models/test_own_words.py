"""Own words while decoding: the trie against its definition, and real terms in real speech."""

import itertools
import random

import numpy as np
import pytest
import torch
from synthetic import small_conformer, small_whisper
from typer.testing import CliRunner

from saml_kernels import SAMLError
from saml_models.cli.main import app
from saml_models.data.audio import SAMPLE_RATE
from saml_models.data.corpora import load_corpus
from saml_models.models.espnet import EspnetSpeechModel
from saml_models.models.interface import DecodingOptions
from saml_models.models.own_words import OwnWords, SpellingProcessor, Spelt, variants
from saml_models.models.registry import bind
from saml_models.models.whisper import speech_model as whisper_speech
from saml_models.recogniser import Recogniser
from saml_models.transcription.clips import decode_clips
from saml_models.transcription.together import Together

VOCABULARY = 7
WORDS = [[1, 2, 3], [1, 2], [2, 4], [5], [2, 3, 1, 2, 6], [3, 3]]
TERMS = ["alimentary canal", "minims", "Helstone", "Kowalczyk", "emetic"]


def prefixes():
    return {tuple(word[:n]) for word in WORDS for n in range(1, len(word) + 1)}


def begun(text):
    """The suffixes of a text that begin a phrase, the longest first, and the empty one."""
    return [t for n in range(len(text) + 1) if not (t := tuple(text[n:])) or t in prefixes()]


def texts(count=40, length=9):
    draw = random.Random(0)
    return [[draw.randrange(VOCABULARY) for _ in range(length)] for _ in range(count)]


def test_the_bonus_is_for_tokens_that_go_on_with_a_phrase():
    words = OwnWords(WORDS, bonus=2.0)
    rows = torch.tensor(texts())
    spelt = Spelt(words, len(rows), rows.device)
    logits = torch.randn(len(rows), VOCABULARY)
    for length in range(rows.shape[1]):
        given = spelt.biased(logits) - logits
        for row, text in enumerate(rows[:, :length].tolist()):
            on = {
                t for t in range(VOCABULARY) if any((*s, t) in prefixes() for s in begun(text) if s)
            }
            begin = {word[0] for word in WORDS}
            wanted = [2.0 if t in on | begin else 0.0 for t in range(VOCABULARY)]
            assert given[row].tolist() == pytest.approx(wanted, abs=1e-5)
            assert int(spelt.node[row]) == words.walk(text)
        spelt.move(rows[:, length : length + 1])


def test_a_beam_keeps_the_bonus_of_whole_phrases_alone():
    words = OwnWords(WORDS, bonus=2.0)
    process = SpellingProcessor(words, beams=4)
    for text in texts():
        total = 0.0
        for length, token in enumerate(text):
            before = torch.tensor([[99, *text[:length]]])
            total += float(process(before, torch.zeros(1, VOCABULARY))[0, token])
        assert total == pytest.approx(words.worth(text) + words.owed[words.walk(text)])
    assert words.worth([1, 2, 0]) == 4.0
    assert words.worth([2, 3, 1, 0]) == 0.0


def test_rows_that_are_kept_or_begin_again():
    words = OwnWords(WORDS)
    spelt = Spelt(words, 3, torch.device("cpu"))
    spelt.move(torch.tensor([[1], [0], [2]]))
    spelt.keep(torch.tensor([2, 0]))
    assert spelt.node.tolist() == [words.walk([2]), words.walk([1])]
    assert spelt.anew(4).node.tolist() == [0] * 4
    never = torch.full((2, VOCABULARY), -torch.inf)
    assert torch.equal(spelt.biased(never), never)


def test_spellings_of_a_phrase():
    assert variants("apomorphine") == ["apomorphine", "Apomorphine"]
    assert set(variants("ANN SMITH")) >= {"ann smith", "Ann Smith", "ANN SMITH"}
    assert variants("McKenzie") == ["McKenzie"]
    assert variants("iPhone") == ["iPhone", "IPhone"]


@pytest.fixture(scope="module")
def sentences(speech_root):
    """Sentences that tiny.en mishears: ten minims; the best emetic; shoppy at Helstone."""
    corpus = load_corpus(speech_root / "LibriSpeech" / "test-other", ["1688", "1998"])
    found = {u.id: u.load() for u in corpus}
    return [found[id] for id in ("1998-15444-0008", "1998-15444-0007", "1688-142285-0005")]


def heard(text):
    return [term for term in TERMS if term.lower() in text.lower()]


def test_terms_are_heard_in_every_way_of_decoding(monkeypatch, tiny_en, sentences):
    speech = bind(*tiny_en)
    words = speech.own_words(TERMS, 3.0)
    assert not any(map(heard, decode_clips(speech, sentences)))
    together = decode_clips(speech, sentences, own_words=words)
    assert all(map(heard, together))
    assert [decode_clips(speech, [c], own_words=words)[0] for c in sentences[:2]] == together[:2]
    beams = decode_clips(speech, sentences, own_words=words, beam_size=2)
    assert list(map(heard, beams)) == [["minims"], ["emetic"], ["Helstone"]]
    monkeypatch.setattr(whisper_speech, "can_decode", lambda model: False)  # by `generate`
    assert decode_clips(speech, sentences[:2], own_words=words) == together[:2]


@pytest.mark.parametrize("beam_size", [1, 2])
def test_long_recordings_with_times(tiny_en, sentences, beam_size):
    pause = np.zeros(11 * SAMPLE_RATE, np.float32)
    recording = np.concatenate([sentences[0], pause, sentences[1], pause, sentences[2]])
    assert len(recording) > 30 * SAMPLE_RATE
    ask = Recogniser(*tiny_en).transcribe
    assert not heard(ask(recording, beam_size=beam_size).text)
    found = ask(recording, own_words=TERMS, beam_size=beam_size)
    assert "minims" in heard(found.text)


@pytest.mark.parametrize("beam_size", [1, 3])
def test_a_conformer_has_them_in_both_branches(beam_size):
    speech = bind(*small_conformer())
    louder = np.linspace(0, 0.1, SAMPLE_RATE)  # steady noise is no speech
    noise = (np.random.default_rng(0).normal(0, 1, SAMPLE_RATE) * louder).astype(np.float32)
    words = speech.own_words(["the"], 1000.0)  # a token of its own
    assert "the" not in decode_clips(speech, [noise], beam_size=beam_size)[0]
    (found,) = decode_clips(speech, [noise], own_words=words, beam_size=beam_size)
    assert "the" in found


def test_espnet_has_none():
    with pytest.raises(SAMLError, match="ESPnet's search has none"):
        EspnetSpeechModel.own_words(None, ["ann"])


def test_recordings_with_other_words_are_decoded_apart(monkeypatch, tiny_en):
    small = small_whisper(vocabulary=51864)
    small.generation_config.no_timestamps_token_id = 50362
    speech = bind(small, tiny_en[1])
    batches = []
    monkeypatch.setattr(
        speech,
        "decode",
        lambda clips, beams, language, own: batches.append(own) or [""] * len(clips),
    )
    mine, yours = speech.own_words(["ann"]), speech.own_words(["bob"])
    together = Together(speech, 8)
    noise = np.random.default_rng(0).normal(0, 0.1, (4, SAMPLE_RATE)).astype(np.float32)
    for clip, own in zip(noise, itertools.cycle([mine, yours]), strict=False):
        together.add(clip, options=DecodingOptions(language="en", timestamps=False, own_words=own))
    while together.step():
        pass
    assert batches == [mine, yours]


def test_from_the_command_line(sentences, tmp_path):
    import soundfile

    soundfile.write(tmp_path / "dose.wav", sentences[0], SAMPLE_RATE)
    names = tmp_path / "names.txt"
    names.write_text("\n".join(TERMS))
    ask = ["transcribe", str(tmp_path / "dose.wav"), "--words", str(names)]
    told = CliRunner().invoke(app, ask)
    assert told.exit_code == 0 and "minims" in told.stdout
    names.write_text("\n")
    told = CliRunner().invoke(app, ask)
    assert isinstance(told.exception, SAMLError) or "holds no words" in told.output
