"""Reading audio: rates, channels, formats, parts, and files that are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from saml_kernels.errors import SAMLError
from saml_models.data.audio import SAMPLE_RATE, check_audio, load_audio


@pytest.fixture(scope="module")
def clip(speech_root: Path) -> Path:
    return min((speech_root / "LibriSpeech" / "test-other" / "1688").glob("*/*.flac"))


def _tone(rate: int, seconds: float = 1.0, frequency: float = 440.0) -> np.ndarray:
    time = np.arange(round(rate * seconds)) / rate
    return (0.5 * np.sin(2 * np.pi * frequency * time)).astype(np.float32)


def _one_line(error: pytest.ExceptionInfo[SAMLError], path: Path) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_16_khz_mono_comes_back_unchanged(clip: Path) -> None:
    samples = load_audio(clip)
    expected, rate = soundfile.read(clip, dtype="float32")
    assert rate == SAMPLE_RATE
    assert samples.dtype == np.float32
    assert np.array_equal(samples, expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("clip.wav", {"subtype": "PCM_16"}),
        ("clip.flac", {"subtype": "PCM_16"}),
        ("clip.sph", {"format": "NIST", "subtype": "PCM_16"}),
    ],
)
def test_lossless_formats_hold_the_same_speech(
    clip: Path, tmp_path: Path, name: str, options: dict[str, str]
) -> None:
    samples = load_audio(clip)
    soundfile.write(tmp_path / name, samples, SAMPLE_RATE, **options)
    assert np.array_equal(load_audio(tmp_path / name), samples)


def test_mp3_sounds_like_the_original(clip: Path, tmp_path: Path) -> None:
    samples = load_audio(clip)
    soundfile.write(tmp_path / "clip.mp3", samples, SAMPLE_RATE, format="MP3")
    decoded = load_audio(tmp_path / "clip.mp3")
    shared = min(len(decoded), len(samples))
    assert abs(len(decoded) - len(samples)) < SAMPLE_RATE // 10
    assert np.corrcoef(decoded[:shared], samples[:shared])[0, 1] > 0.95


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000])
def test_other_rates_are_resampled(tmp_path: Path, rate: int) -> None:
    soundfile.write(tmp_path / "tone.wav", _tone(rate), rate, subtype="FLOAT")
    samples = load_audio(tmp_path / "tone.wav")
    assert samples.shape == (SAMPLE_RATE,)
    inner = slice(1_000, -1_000)
    assert np.abs(samples - _tone(SAMPLE_RATE))[inner].max() < 1e-3


@pytest.mark.parametrize("channels", [2, 6])
def test_channels_are_averaged(tmp_path: Path, channels: int) -> None:
    rng = np.random.default_rng(0)
    frames = rng.uniform(-0.5, 0.5, (4_000, channels)).astype(np.float32)
    soundfile.write(tmp_path / "many.wav", frames, SAMPLE_RATE, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(tmp_path / "many.wav"), frames.mean(axis=1), atol=1e-6)


def test_more_samples_than_one_block(tmp_path: Path) -> None:
    samples = np.linspace(-1, 1, 300_001, dtype=np.float32)
    soundfile.write(tmp_path / "long.wav", samples, SAMPLE_RATE, subtype="FLOAT")
    assert np.array_equal(load_audio(tmp_path / "long.wav"), samples)


@pytest.mark.parametrize(("start", "end"), [(0.5, 1.25), (None, 0.75), (1.0, None)])
def test_a_part_is_a_slice_of_the_whole(
    clip: Path, tmp_path: Path, start: float | None, end: float | None
) -> None:
    samples = load_audio(clip)
    soundfile.write(tmp_path / "clip.mp3", samples, SAMPLE_RATE, format="MP3")
    soundfile.write(tmp_path / "clip.ogg", samples, SAMPLE_RATE, format="OGG")
    for path in (clip, tmp_path / "clip.mp3", tmp_path / "clip.ogg"):
        whole = load_audio(path)
        first = 0 if start is None else round(start * SAMPLE_RATE)
        last = len(whole) if end is None else round(end * SAMPLE_RATE)
        part = load_audio(path, start, end)
        assert part.shape == whole[first:last].shape
        # MP3 and Ogg decode to within float32 rounding, which depends on how memory is aligned.
        assert np.abs(part - whole[first:last]).max() < 1e-6


def test_long_mp3_is_decoded_in_one_piece(clip: Path, tmp_path: Path) -> None:
    samples = np.tile(load_audio(clip), 3)
    path = tmp_path / "long.mp3"
    soundfile.write(path, samples, SAMPLE_RATE, format="MP3")
    whole, _ = soundfile.read(path, dtype="float32")
    assert len(whole) > 500_000
    assert np.abs(load_audio(path) - whole).max() < 1e-6
    assert np.abs(load_audio(path, 20.0, 25.0) - whole[320_000:400_000]).max() < 1e-6


def test_a_segment_may_overshoot_by_rounding_only(clip: Path) -> None:
    whole = load_audio(clip)
    seconds = len(whole) / SAMPLE_RATE
    assert np.array_equal(load_audio(clip, 1.0, seconds + 0.1), whole[SAMPLE_RATE:])
    for start, end in [(0.0, seconds + 5), (seconds, None), (2.0, 1.0), (-1.0, 1.0), (1.0, 1.0)]:
        with pytest.raises(SAMLError, match="segment") as error:
            load_audio(clip, start, end)
        _one_line(error, clip)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(SAMLError, match="no such file") as error:
        load_audio(tmp_path / "none.wav")
    _one_line(error, tmp_path / "none.wav")
    with pytest.raises(SAMLError, match="is a folder"):
        load_audio(tmp_path)


@pytest.mark.parametrize("name", ["text.wav", "text.flac", "text.raw", "text.mp3"])
def test_text_named_like_audio(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("this is a shopping list, not a recording\n" * 40)
    with pytest.raises(SAMLError, match="cannot be read as audio") as error:
        load_audio(path)
    _one_line(error, path)


def test_empty_file_and_empty_audio(tmp_path: Path) -> None:
    (tmp_path / "zero.wav").touch()
    soundfile.write(tmp_path / "header.wav", np.zeros(0, np.float32), SAMPLE_RATE)
    for name in ("zero.wav", "header.wav"):
        with pytest.raises(SAMLError, match="empty") as error:
            load_audio(tmp_path / name)
        _one_line(error, tmp_path / name)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rate", [SAMPLE_RATE, 44_100])
def test_nan_and_infinity(tmp_path: Path, bad: float, rate: int) -> None:
    samples = _tone(rate)
    samples[17] = bad
    soundfile.write(tmp_path / "bad.wav", samples, rate, subtype="FLOAT")
    with pytest.raises(SAMLError, match="NaN or infinite, the first is number 17") as error:
        load_audio(tmp_path / "bad.wav")
    _one_line(error, tmp_path / "bad.wav")


def test_truncated_flac_is_refused_or_shorter(clip: Path, tmp_path: Path) -> None:
    data = clip.read_bytes()
    (tmp_path / "cut.flac").write_bytes(data[: len(data) // 2])
    whole = load_audio(clip)
    try:
        part = load_audio(tmp_path / "cut.flac")
    except SAMLError as error:
        assert "cut.flac" in str(error)
    else:
        assert 0 < len(part) < len(whole)
        assert np.array_equal(part, whole[: len(part)])


def test_a_header_that_claims_too_much_costs_no_memory(clip: Path, tmp_path: Path) -> None:
    data = bytearray(clip.read_bytes())
    # STREAMINFO's last 36 bits before the checksum count the samples: claim 2^36 - 1 of them.
    data[21] |= 0x0F
    data[22:26] = b"\xff\xff\xff\xff"
    (tmp_path / "liar.flac").write_bytes(bytes(data))
    try:
        samples = load_audio(tmp_path / "liar.flac")
    except SAMLError as error:
        assert "liar.flac" in str(error)
    else:
        assert np.array_equal(samples, load_audio(clip))


def test_check_audio_takes_silence_and_refuses_other_shapes() -> None:
    check_audio(np.zeros(10, np.float32), "silence")
    with pytest.raises(SAMLError, match=r"stereo: float32 of shape \[10, 2\]"):
        check_audio(np.zeros((10, 2), np.float32), "stereo")
    with pytest.raises(SAMLError, match="integers: int16"):
        check_audio(np.zeros(10, np.int16), "integers")
