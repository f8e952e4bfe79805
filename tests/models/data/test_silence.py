"""Nothing is said where there is no speech, whichever way it is asked for."""

import numpy as np
import pytest
import soundfile
import torch
from synthetic import small_conformer

from saml_kernels import SAMLConfig
from saml_kernels.errors import SAMLWarning
from saml_models.data.audio import load_audio
from saml_models.data.corpora import load_corpus
from saml_models.data.silence import has_speech
from saml_models.models.registry import bind
from saml_models.speakers.pretrained import load_adaptable
from saml_models.transcription.clips import decode_clips
from saml_models.transcription.recordings import transcribe

RNG = np.random.default_rng(0)
SECONDS = 4


def noise(level):
    """White, of so many dB."""
    return RNG.standard_normal(16000 * SECONDS).astype(np.float32) * 10 ** (level / 20)


def hum():
    t = np.arange(16000 * SECONDS) / 16000
    return (0.05 * np.sin(100 * np.pi * t) + 0.02 * np.sin(300 * np.pi * t)).astype(np.float32)


def click():
    clip = np.zeros(16000 * SECONDS, np.float32)
    clip[9000:9100] = 0.5
    return clip


NOTHING = {
    "digital silence": np.zeros(16000 * SECONDS, np.float32),
    "dither": RNG.integers(-1, 2, 16000 * SECONDS).astype(np.float32) / 32768,
    "an offset": np.full(16000 * SECONDS, 0.1, np.float32),
    "a click": click(),
    "no samples": np.zeros(0, np.float32),
    "very little": np.zeros(100, np.float32),
    "noise": noise(-40),
    "loud noise": noise(-20),
    "hum": hum(),
    "noise, then nothing": np.concatenate((noise(-40), np.zeros(32000, np.float32))),
}


@pytest.fixture(scope="module")
def speech(speech_root):
    return load_corpus(speech_root / "LibriSpeech" / "test-other", ["1688"])[0].load()


@pytest.mark.parametrize("name", NOTHING)
def test_energy_alone(name):
    assert not has_speech(NOTHING[name], lambda: None)


def test_speech_is_never_asked_about(speech):
    def refuse():
        raise AssertionError("asked")

    assert has_speech(speech, refuse)
    assert has_speech(speech * 0.03, refuse)  # -50 dB
    assert has_speech(np.concatenate((np.zeros(16000 * 28, np.float32), speech[:32000])), refuse)
    gated = np.where(np.abs(speech) < 0.01, 0, speech)
    assert has_speech(gated, refuse)


def test_between_them_the_model_is_asked():
    swelling = noise(-40) * np.linspace(0.5, 2.5, 16000 * SECONDS, dtype=np.float32)
    assert has_speech(swelling, lambda: 0.2) and not has_speech(swelling, lambda: 0.7)
    assert has_speech(swelling, lambda: None)


@pytest.fixture(scope="module", params=["full precision", "experts"])
def model(request):
    if request.param == "experts":
        return load_adaptable("tiny.en")
    from saml_models.models.whisper.loading import load_whisper

    return load_whisper("tiny.en")


def test_both_routes_say_nothing(model, speech):
    clips = [NOTHING[name] for name in ("digital silence", "noise", "hum")]
    texts = decode_clips(bind(*model), [*clips, speech])
    assert texts[:3] == [""] * 3 and texts[3]
    for clip in clips:
        found = transcribe(*model, clip)
        assert (found.text, found.segments, found.duration) == ("", [], SECONDS)


def test_a_recording_is_silent_for_a_while(model, speech):
    """30 s of speech's beginning, and then a window of nothing but noise."""
    part = speech[: 16000 * 5]
    recording = np.concatenate((part, noise(-60).repeat(8)[: 16000 * 40]))
    found = transcribe(*model, recording)
    assert found.text and found.segments[-1].start < 10


def test_a_conformer_goes_by_energy():
    model, processor = small_conformer()
    torch.manual_seed(0)
    loud = (torch.randn(32000) * torch.linspace(0.001, 1, 32000)).numpy()
    asked = decode_clips(bind(model, processor), [loud, NOTHING["noise"]])
    assert asked[1] == "" and asked[0] == model_text(model, processor, loud)
    assert transcribe(model, processor, NOTHING["digital silence"]).segments == []


def model_text(model, processor, clip):

    with torch.inference_mode():
        return bind(model, processor).decode([clip], 1, None)[0]


@pytest.mark.parametrize("name", ["antiphase.wav", "antiphase.mp3"])
def test_channels_that_cancel(tmp_path, name, recwarn):
    t = np.arange(32000) / 16000
    voice = 0.3 * np.sin(2 * np.pi * 200 * t) * (np.sin(6 * t) > 0)
    soundfile.write(tmp_path / name, np.stack((voice, -voice), 1), 16000)
    with pytest.warns(SAMLWarning, match=f"{name}: its channels cancel each other"):
        assert np.abs(load_audio(tmp_path / name)).max() < 0.05
    for other in (voice, 0 * voice, RNG.standard_normal(32000) * 0.1):
        recwarn.clear()
        soundfile.write(tmp_path / "fine.wav", np.stack((voice, other), 1), 16000)
        load_audio(tmp_path / "fine.wav")
        assert not recwarn.list


def test_a_short_clip_has_one_window_by_every_route(speech, monkeypatch):
    """A quantised base without experts: with times and without."""
    network, processor = load_adaptable("tiny.en", SAMLConfig(num_experts=0))
    seen = []
    hook = network.model.encoder.conv1.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape[-1])
    )
    clip = speech[: 16000 * 3]
    decode_clips(bind(network, processor), [clip])
    decode_clips(bind(network, processor), [clip], beam_size=2)
    transcribe(network, processor, clip)
    hook.remove()
    assert len(seen) >= 3 and set(seen) == {1300}
