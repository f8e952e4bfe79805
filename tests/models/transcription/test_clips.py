"""A clip's text does not depend on the clips that it is decoded with."""

import pytest
import torch

from saml_kernels import SAMLConfig
from saml_models.compress.checkpoint import save_saml
from saml_models.compress.loading import load_model
from saml_models.data.corpora import load_corpus
from saml_models.models.registry import bind
from saml_models.models.whisper.windows import (
    audio_window,
    clip_window,
    log_mel,
    own_windows,
    window_frames,
)
from saml_models.speakers.pretrained import load_adaptable
from saml_models.transcription.clips import decode_clips


@pytest.fixture(scope="module")
def experts():
    """tiny.en with its pretrained experts, which hear short windows."""
    return load_adaptable("tiny.en")


@pytest.fixture(scope="module")
def clips(speech_root):
    """One short, one middling, one twice as long, one cut off within a word."""
    found = load_corpus(speech_root / "LibriSpeech" / "test-other", ["1688", "1998"])
    found = sorted((u.load() for u in found), key=len)
    return [found[-6], found[0], found[8], found[4][:24000]]


@pytest.mark.parametrize("beam_size", [1, 3])
def test_as_alone(experts, clips, beam_size):
    alone = [decode_clips(bind(*experts), [c], beam_size=beam_size)[0] for c in clips]
    assert len({window_frames(len(c)) for c in clips}) == 4 and all(alone)
    assert decode_clips(bind(*experts), clips, beam_size=beam_size) == alone


def test_windows_are_as_long_as_a_model_needs(experts, clips, tmp_path):
    samples = 16000 * 4
    assert clip_window(experts[0], samples) == 500  # its experts know short ones
    plain, _ = load_model("tiny.en")
    assert clip_window(plain, samples) == 3000  # as released
    bare, processor = load_adaptable("tiny.en", SAMLConfig(num_experts=0))
    assert clip_window(bare, samples) == 1400
    assert clip_window(bare, 16000 * 25) == 3000
    save_saml(bare, processor, tmp_path)
    again, _ = load_model(tmp_path)
    assert clip_window(again, samples) == 1400
    texts = decode_clips(bind(bare, processor), clips[:2])
    assert texts == decode_clips(bind(again, processor), clips[:2]) and all(texts)


def test_nothing_beyond_its_own_window_reaches_a_row(experts, clips):
    model, processor = experts
    windows = [window_frames(len(c)) for c in clips]

    @torch.inference_mode()
    def encode(features, own):
        with audio_window(model, features.shape[-1]), own_windows(model, features, own):
            return model.model.encoder(features).last_hidden_state

    together = log_mel(processor, clips, max(windows))
    together[1, :, windows[1] :] = 100.0  # would be heard, if anything there were
    batch = encode(together, windows)
    for row, (clip, frames) in enumerate(zip(clips, windows, strict=True)):
        alone = encode(log_mel(processor, [clip], frames), [frames])
        torch.testing.assert_close(batch[row, : frames // 2], alone[0], rtol=1e-3, atol=1e-3)
    assert not model.model.encoder.conv2._forward_pre_hooks
