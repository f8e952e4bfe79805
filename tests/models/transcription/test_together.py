"""Clips and windows of many recordings and speakers in one batch say what each says alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from saml_kernels import SAMLConfig, SAMLError
from saml_models.data.corpora import load_corpus
from saml_models.models.interface import DecodingOptions, Piece
from saml_models.models.registry import bind
from saml_models.models.whisper import speech_model, timed
from saml_models.models.whisper.languages import no_speech_probability
from saml_models.models.whisper.recording import split_window
from saml_models.models.whisper.timed import HeardWindow
from saml_models.speakers.pretrained import load_adaptable
from saml_models.speakers.profile import SpeakerProfile
from saml_models.text.transcript import Segment
from saml_models.transcription.recordings import transcribe, transcribe_many
from saml_models.transcription.together import Together

CLIP = np.zeros(16000, np.float32)
ZERO = 1000  # the token of 0 s


class Slow:
    """Three windows to a recording; what is said is which."""

    network = SimpleNamespace(register_forward_pre_hook=lambda hook: SimpleNamespace(remove=int))

    def __init__(self) -> None:
        self.batches: list[int] = []

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        yield

    def pieces(self, clip: Any, language: str, options: Any, on_progress: Any, on_text: Any) -> Any:
        said = []
        for number in range(int(clip[0])):
            said.append((yield Piece("window", clip, language, number)))
            on_text(" ".join(said))
        return " ".join(said), [Segment(0, 0.0, 1.0, " ".join(said))]

    def heard_at_once(self, pieces: Sequence[Piece]) -> int:
        return min(3, len(pieces))

    def hear(self, pieces: Sequence[Piece]) -> list[str]:
        self.batches.append(len(pieces))
        if any(piece.clip[0] == 13 for piece in pieces):
            raise SAMLError("thirteen")
        return [str(piece.given) for piece in pieces]


def recording(windows: int) -> np.ndarray:
    return np.full(16000, windows, np.float32)


@pytest.fixture
def together() -> Together:
    return Together(Slow(), 2)  # type: ignore[arg-type]


ENGLISH = DecodingOptions(language="en")


def test_a_short_one_does_not_wait_for_long_ones(together: Together) -> None:
    long = [together.add(recording(9), None, ENGLISH) for _ in range(3)]
    for _ in range(2):
        together.step()
    short = together.add(recording(1), None, ENGLISH)
    together.step()
    assert short.is_done and short.result().text == "0" and not any(p.is_done for p in long)
    while len(together):
        together.step()
    assert [p.result().text for p in long] == [" ".join(map(str, range(9)))] * 3
    assert together.step() == [] and max(together.speech.batches) == 2  # type: ignore[attr-defined]


def test_a_short_one_waits_for_one_batch_of_many_long_ones() -> None:
    together = Together(Slow(), 16)  # type: ignore[arg-type]
    long = np.full(31 * 16000, 9, np.float32)
    for _ in range(12):
        together.add(long, None, ENGLISH)
    for _ in range(2):
        assert len(together.step()) == 3  # what is decoded in one pass
    short = [together.add(recording(1), None, ENGLISH) for _ in range(2)]
    assert together.step()[:2] == short and all(passage.is_done for passage in short)
    together.add(recording(2), None, ENGLISH)
    assert [p.seconds > 30 for p in together.step()] == [True] * 3  # the short ones had theirs


def test_who_leaves_frees_the_place_and_who_fails_fails_alone(together: Together) -> None:
    seen: list[str] = []
    stays = together.add(recording(3), None, ENGLISH, on_text=seen.append)
    leaves = together.add(recording(9), None, ENGLISH)
    fails = together.add(recording(13), None, ENGLISH)
    together.step()
    together.drop(leaves)
    assert len(together) == 2
    while len(together):
        together.step()
    assert stays.result().text == "0 1 2" and seen == ["0", "0 1", "0 1 2", "0 1 2"]
    with pytest.raises(SAMLError, match="thirteen"):
        fails.result()
    with pytest.raises(SAMLError, match="cancelled"):
        leaves.result()


@pytest.mark.parametrize(
    ("ids", "found", "done"),
    [
        ([], [], 32000),
        ([1, 2], [(0, 2, 0.0, 2.0)], 32000),
        ([ZERO + 5, 1, ZERO + 50], [(0, 3, 0.1, 1.0)], 32000),
        ([ZERO, 1, ZERO + 25, ZERO + 25, 2], [(0, 3, 0.0, 0.5)], 8000),
        ([ZERO, 1, ZERO + 25, ZERO + 30, 2, ZERO + 90], [(0, 3, 0, 0.5), (3, 6, 0.6, 1.8)], 32000),
        ([ZERO, 1, ZERO + 25, ZERO + 25], [(0, 3, 0.0, 0.5)], 8000),
        ([ZERO, ZERO, 1], [(0, 1, 0.0, 0.0)], 32000),  # a window that ends nothing goes on
    ],
)
def test_a_window_is_split_at_its_timestamps(ids: Any, found: Any, done: int) -> None:
    segments, samples = split_window(HeardWindow(ids), 32000, ZERO)
    assert [s[:2] for s in segments] == [s[:2] for s in found] and samples == done
    for ours, theirs in zip(segments, found, strict=True):
        assert ours[2:] == pytest.approx(theirs[2:])


@pytest.fixture(scope="module")
def mixed(speech_root: Any) -> Any:
    """A model, two voices for it beside its own, three clips and more than a window of speech."""
    model, processor = load_adaptable("tiny.en", SAMLConfig(num_experts=2, rank=2))
    voices: list[SpeakerProfile | None] = [None]
    for seed in range(2):
        with model.saml.snapshot(), torch.no_grad():
            torch.manual_seed(seed)
            for parameter in model.saml.experts().values():
                parameter.add_(torch.randn_like(parameter) * 0.005)
            voices.append(SpeakerProfile.of(model, speaker=str(seed)))
    found = load_corpus(speech_root / "LibriSpeech" / "test-other", ["1688"])
    clips = sorted((u.load() for u in found), key=len)
    return (model, processor), voices, [*clips[:2], np.concatenate(clips[-3:])[: 34 * 16000]]


def test_times_of_many_speakers_in_one_batch(mixed: Any) -> None:
    model, voices, clips = mixed
    batches: list[int] = []
    hear = speech_model.hear_windows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            speech_model,
            "hear_windows",
            lambda m, p, windows: batches.append(len(windows)) or hear(m, p, windows),
        )
        found = list(transcribe_many(*model, [clips[2], *clips[:2]], [voices[1], None, voices[2]]))
    assert batches[0] == 3
    alone = [
        transcribe(*model, clip, voice, timestamps=True)
        for clip, voice in zip([clips[2], *clips[:2]], [voices[1], None, voices[2]], strict=True)
    ]
    assert found == alone and all(t.segments for t in found)
    assert [t.speaker_hash for t in found] == [voices[1].hash, None, voices[2].hash]
    processor = model[1]
    for transcript, same in zip(found, alone, strict=True):
        for segment, other in zip(transcript.segments, same.segments, strict=True):
            how, again = segment.decoding, other.decoding
            assert how.tokens == again.tokens and how.seek == again.seek
            said = [t for t in how.tokens if t < processor.tokenizer.eos_token_id]
            assert processor.tokenizer.decode(said).strip() == segment.text
            assert how.temperature == 0 and -1 < how.avg_logprob < 0
            assert how.avg_logprob == pytest.approx(again.avg_logprob, abs=1e-4)
            assert 0.5 < how.compression_ratio < 2.4
    first, *_, last = (segment.decoding for segment in found[0].segments)
    assert first.seek == 0 and 2000 < last.seek <= 3000  # the second window
    (how, *_) = (segment.decoding for segment in found[1].segments)
    expected = no_speech_probability(*model, clips[0])
    assert how.no_speech_prob == pytest.approx(expected, rel=1e-3)
    assert "decoding" not in found[0].to_dict()["segments"][0]


def test_silence_is_asked_after_the_start_whatever_follows(mixed: Any) -> None:
    """As in a model of several languages, whose prompt goes on with language and task."""
    model, _, clips = mixed
    start = model[0].generation_config.decoder_start_token_id
    prompts = ([start], [start, 7, 8], [50360, 11, 12, start], [50360, 11, 12, start, 7, 8])
    clip = clips[0][:16000]
    model[0].eval()
    found = [
        timed.hear_windows(*model, [timed.TimedWindow(clip, len(clip), prompt)])[0].no_speech
        for prompt in prompts
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert found[2] == pytest.approx(found[3], rel=1e-3)
    assert found[0] != pytest.approx(found[2], rel=1e-2) and 0 < min(found) <= max(found) < 0.6


def test_what_is_said_again_does_not_depend_on_the_batch(
    mixed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, voices, clips = mixed
    monkeypatch.setattr(timed, "LOG_PROB", 0.0)  # nothing is ever likely enough
    monkeypatch.setattr(timed, "NO_SPEECH", 1.0)
    said = [(clips[0], voices[1]), (clips[1], voices[2])]
    found = transcribe(*model, [c for c, _ in said], [v for _, v in said], timestamps=True)
    assert found == [transcribe(*model, clip, voice, timestamps=True) for clip, voice in said]
    assert all(t.text for t in found)


def test_windows_say_what_transformers_says(mixed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, clips = mixed
    ours = transcribe(*model, clips[2], word_timestamps=True)
    monkeypatch.setattr(speech_model, "can_time", lambda network: False)
    theirs = transcribe(*model, clips[2], word_timestamps=True)
    assert ours.text == theirs.text
    ends = [[w.end for s in t.segments for w in s.words] for t in (ours, theirs)]
    assert np.median(np.abs(np.subtract(*ends))) < 0.05


def test_a_prompt_and_a_temperature(mixed: Any) -> None:
    model, _, clips = mixed
    together = Together(bind(*model), 8)
    options = [
        DecodingOptions("en", prompt="Grane, Grane of sand."),
        DecodingOptions("en", temperature=0.8),
        DecodingOptions("en", timestamps=False, temperature=0.8),
    ]
    passages = [together.add(clips[1], None, one) for one in options]
    while len(together):
        together.step()
    texts = [p.result().text for p in passages]
    assert all(texts) and texts[1] == texts[2]  # the same seed, whatever the row
