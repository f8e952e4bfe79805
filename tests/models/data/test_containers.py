"""Files that a decoder hears in part: joined, cut off, or below a header that is wrong."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from saml_kernels.errors import SAMLError, SAMLWarning
from saml_models.data import audio
from saml_models.data.audio import SAMPLE_RATE, audio_files, load_audio

OTHERS = {
    "sph": {"format": "NIST", "subtype": "PCM_16"},
    "au": {"format": "AU", "subtype": "PCM_16"},
    "w64": {"format": "W64", "subtype": "PCM_16"},
    "caf": {"format": "CAF", "subtype": "PCM_16"},
    "rf64": {"format": "RF64", "subtype": "PCM_16"},
}
WRITTEN = {
    "wav": {},
    "aiff": {},
    "flac": {},
    "mp3": {"format": "MP3"},
    "ogg": {"format": "OGG", "subtype": "VORBIS"},
    "opus": {"format": "OGG", "subtype": "OPUS"},
}


@pytest.fixture(scope="module")
def speech(speech_root: Path) -> list[np.ndarray]:
    """Two utterances, 16 kHz."""
    files = sorted((speech_root / "LibriSpeech" / "test-other" / "1688").glob("*/*.flac"))
    shortest = sorted(files, key=lambda path: path.stat().st_size)[:2]
    return [soundfile.read(path, dtype="float32")[0] for path in shortest]


@pytest.fixture(params=["with PyAV", "without PyAV"])
def _either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "without PyAV":
        monkeypatch.setattr(audio, "has_pyav", lambda: False)
    else:
        pytest.importorskip("av")


def write(path: Path, samples: np.ndarray, rate: int = SAMPLE_RATE, **more: object) -> bytes:
    soundfile.write(path, samples, rate, **((WRITTEN | OTHERS)[path.suffix[1:]] | more))
    return path.read_bytes()


def heard(path: Path) -> tuple[np.ndarray, list[str]]:
    """What is read, and the warnings, each of which names the file in one line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        samples = load_audio(path)
    assert all(w.category is SAMLWarning for w in caught)
    said = [str(w.message) for w in caught]
    assert all(str(path) in line and "\n" not in line for line in said)
    return samples, said


def wav(data: bytes, claim: int, riff: int | None = None) -> bytes:
    riff = claim + 36 if riff is None else riff
    form = struct.pack("<IHHIIHH", 16, 1, 1, SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16)
    return b"RIFF%sWAVEfmt %sdata%s" % (
        struct.pack("<I", riff & 0xFFFFFFFF), form, struct.pack("<I", claim),
    ) + data  # fmt: skip


def pcm(samples: np.ndarray) -> bytes:
    return (samples * 32767).astype("<i2").tobytes()


@pytest.mark.usefixtures("_either")
@pytest.mark.parametrize("kind", [*WRITTEN, *OTHERS])
def test_joined_files_are_heard_one_after_the_other(
    speech: list[np.ndarray], tmp_path: Path, kind: str
) -> None:
    paths = [tmp_path / f"{i}.{kind}" for i in range(2)]
    joined = tmp_path / f"joined.{kind}"
    joined.write_bytes(b"".join(write(p, s) for p, s in zip(paths, speech, strict=True)))
    alone = [load_audio(path) for path in paths]
    samples, said = heard(joined)
    assert not said
    np.testing.assert_allclose(samples, np.concatenate(alone), atol=1e-6)
    middle = len(alone[0]) / SAMPLE_RATE
    part = load_audio(joined, middle - 0.5, middle + 0.5)
    # An Opus decoder comes near, not to, where it would have been without the seek.
    near = 2e-3 if kind == "opus" else 1e-6
    np.testing.assert_allclose(part, samples[len(alone[0]) - 8000 :][:16000], atol=near)
    with pytest.raises(SAMLError, match="outside the recording"):
        load_audio(joined, 1.0, len(samples) / SAMPLE_RATE + 1)


@pytest.mark.usefixtures("_either")
@pytest.mark.parametrize("kind", ["mp3", "ogg", "wav"])
def test_joined_files_of_other_rates_and_channels(
    speech: list[np.ndarray], tmp_path: Path, kind: str
) -> None:
    paths = [tmp_path / f"{i}.{kind}" for i in range(2)]
    parts = write(paths[0], speech[0]), write(paths[1], np.stack([speech[1]] * 2, 1), 44_100)
    (tmp_path / f"joined.{kind}").write_bytes(b"".join(parts))
    samples, said = heard(tmp_path / f"joined.{kind}")
    assert not said
    both = np.concatenate([load_audio(path) for path in paths])
    np.testing.assert_allclose(samples, both, atol=1e-6)


@pytest.mark.usefixtures("_either")
def test_vorbis_then_opus_in_one_ogg(speech: list[np.ndarray], tmp_path: Path) -> None:
    parts = write(tmp_path / "a.ogg", speech[0]), write(tmp_path / "b.opus", speech[1])
    (tmp_path / "both.ogg").write_bytes(b"".join(parts))
    both = np.concatenate([load_audio(tmp_path / "a.ogg"), load_audio(tmp_path / "b.opus")])
    np.testing.assert_allclose(heard(tmp_path / "both.ogg")[0], both, atol=1e-6)


@pytest.mark.usefixtures("_either")
@pytest.mark.parametrize("loud_first", [True, False])
def test_vbr_mp3_without_its_xing_frame(
    speech: list[np.ndarray], tmp_path: Path, loud_first: bool
) -> None:
    silence = np.zeros(20 * SAMPLE_RATE, np.float32)
    samples = np.concatenate([*speech, silence] if loud_first else [silence, *speech])
    whole = write(tmp_path / "a.mp3", samples, bitrate_mode="VARIABLE", compression_level=0.2)
    xing = whole.find(b"Xing")
    assert 0 < xing < 40
    # 16 kHz is MPEG 2: 72 bytes for each kbit/s and kHz. The first frame is the Xing frame.
    kilobits = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)[(whole[2] >> 4) - 1]
    (tmp_path / "bare.mp3").write_bytes(whole[72 * kilobits // 16 :])
    found, said = heard(tmp_path / "bare.mp3")
    assert not said
    # Nothing says any more how much an encoder put in front and at the end: three frames at most.
    assert len(samples) <= len(found) <= len(samples) + 3 * 576
    power = np.array(
        [np.abs(found[: len(found) // 4]).max(), np.abs(found[-len(found) // 4 :]).max()]
    )
    assert (power.argmax() == 0) == loud_first


@pytest.mark.usefixtures("_either")
def test_tags_padding_and_damage_within_an_mp3(speech: list[np.ndarray], tmp_path: Path) -> None:
    tag = b"ID3\x03\0\0" + bytes([0, 0, 0x10, 0]) + bytes(2048)
    one, two = (write(tmp_path / f"{i}.mp3", s) for i, s in enumerate(speech))
    whole = sum(len(load_audio(tmp_path / f"{i}.mp3")) for i in range(2))
    tagged = tmp_path / "tagged.mp3"
    tagged.write_bytes(tag + one + b"TAG" + b"x" * 125 + tag + two + bytes(50_000))
    samples, said = heard(tagged)
    assert len(samples) == whole and not said
    noise = np.random.default_rng(0).integers(0, 256, 3000, dtype=np.uint8).tobytes()
    damaged = tmp_path / "damaged.mp3"
    damaged.write_bytes(one[:8000] + noise + one[8000:] + two)
    samples, said = heard(damaged)
    assert whole - SAMPLE_RATE // 10 < len(samples) <= whole + 3 * 576


@pytest.mark.usefixtures("_either")
@pytest.mark.parametrize("claim", [0, 0xFFFFFFFF, 0x7FFFF000], ids=hex)
def test_wav_whose_length_nobody_filled_in(
    speech: list[np.ndarray], tmp_path: Path, claim: int
) -> None:
    path = tmp_path / "piped.wav"
    data = pcm(speech[0])
    path.write_bytes(wav(data, claim))
    samples, said = heard(path)
    assert not said
    np.testing.assert_allclose(samples, speech[0], atol=1e-4)
    path.write_bytes(wav(data, claim) + wav(pcm(speech[1]), claim))
    np.testing.assert_allclose(heard(path)[0], np.concatenate(speech), atol=1e-4)


@pytest.mark.usefixtures("_either")
def test_wav_whose_header_gives_less_says_how_much_follows(
    speech: list[np.ndarray], tmp_path: Path
) -> None:
    path, data = tmp_path / "short.wav", pcm(speech[0])
    path.write_bytes(wav(data, 2 * SAMPLE_RATE))  # one second
    samples, (said,) = heard(path)
    assert len(samples) == SAMPLE_RATE
    assert f"about {len(speech[0]) / SAMPLE_RATE - 1:.1f} s follow" in said
    chunk = (
        b"LIST" + struct.pack("<I", 26) + b"INFOISFT" + struct.pack("<I", 14) + b"Lavf60.16.100\0"
    )
    path.write_bytes(wav(data, len(data)) + chunk)
    assert heard(path)[1] == []


@pytest.mark.usefixtures("_either")
@pytest.mark.parametrize("kind", ["wav", "aiff", "flac", "mp3", "sph", "au", "w64", "rf64"])
def test_a_file_that_is_cut_off_is_heard_that_far_and_says_so(
    speech: list[np.ndarray], tmp_path: Path, kind: str
) -> None:
    data = write(tmp_path / f"whole.{kind}", speech[1])
    whole = load_audio(tmp_path / f"whole.{kind}")
    path = tmp_path / f"cut.{kind}"
    path.write_bytes(data[: len(data) * 6 // 10])
    samples, (said,) = heard(path)
    assert 0.4 * len(whole) < len(samples) < 0.7 * len(whole)
    np.testing.assert_allclose(samples[:20_000], whole[:20_000], atol=1e-6)
    seconds = len(samples) / SAMPLE_RATE
    assert f"{seconds:.1f} s were read" in said
    lost = float(said.split("; ")[1].split(" s ")[0])
    assert abs(seconds + lost - len(whole) / SAMPLE_RATE) < 0.2
    with pytest.raises(SAMLError, match="outside the recording"):
        load_audio(path, 1.0, len(whole) / SAMPLE_RATE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what was asked for is there
        assert len(load_audio(path, 0.2, 0.8)) == round(0.6 * SAMPLE_RATE)


@pytest.mark.usefixtures("_either")
@pytest.mark.parametrize("kind", ["ogg", "opus"])
def test_an_ogg_that_is_cut_off_says_so(
    speech: list[np.ndarray], tmp_path: Path, kind: str
) -> None:
    data = write(tmp_path / f"whole.{kind}", np.tile(speech[0], 3))
    (tmp_path / f"cut.{kind}").write_bytes(data[: len(data) * 6 // 10])
    samples, (said,) = heard(tmp_path / f"cut.{kind}")
    assert len(samples) > SAMPLE_RATE
    assert "cut off within a page" in said


@pytest.mark.usefixtures("_either")
def test_flac_that_does_not_say_how_long_it_is(speech: list[np.ndarray], tmp_path: Path) -> None:
    data = bytearray(write(tmp_path / "whole.flac", speech[0]))
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    (tmp_path / "stream.flac").write_bytes(data)
    samples, said = heard(tmp_path / "stream.flac")
    assert not said
    np.testing.assert_allclose(samples, speech[0], atol=1e-4)
    np.testing.assert_array_equal(
        load_audio(tmp_path / "stream.flac", 1.0, 2.0), samples[SAMPLE_RATE : 2 * SAMPLE_RATE]
    )
    with pytest.raises(SAMLError, match="outside the recording"):
        load_audio(tmp_path / "stream.flac", 100.0, None)


def encode(path: Path, samples: np.ndarray, codec: str, rate: int, channels: int = 1) -> None:
    """By PyAV, with the same samples in every channel."""
    av = pytest.importorskip("av")
    layout = {1: "mono", 2: "stereo"}[channels]
    values = np.stack([soxr.resample(samples, SAMPLE_RATE, rate)] * channels)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(values, format="fltp", layout=layout)
        frame.sample_rate = rate
        sizes = av.AudioResampler(
            stream.format, layout, rate, frame_size=stream.codec_context.frame_size or None
        )
        for piece in [*sizes.resample(frame), *sizes.resample(None), None]:
            container.mux(stream.encode(piece))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [
        ("a.m4a", "aac", 44_100),
        ("a.mp4", "aac", 48_000),
        ("a.mov", "alac", 44_100),
        ("a.webm", "libopus", 48_000),
        ("a.mka", "aac", 44_100),
        ("a.aac", "aac", 44_100),
        ("a.opus", "libopus", 48_000),
    ],
)
def test_what_pyav_reads_is_as_loud_and_as_long(
    speech: list[np.ndarray], tmp_path: Path, name: str, codec: str, rate: int, channels: int
) -> None:
    encode(tmp_path / name, speech[0], codec, rate, channels)
    samples, said = heard(tmp_path / name)
    assert not said
    assert 0 <= len(samples) - len(speech[0]) < SAMPLE_RATE // 10
    shared = samples[: len(speech[0])]
    # Encoders delay by some samples: where the two fit best.
    spectrum = np.fft.rfft(shared) * np.conj(np.fft.rfft(speech[0]))
    delay = int(np.argmax(np.fft.irfft(spectrum)))
    delay = delay if delay < len(shared) // 2 else delay - len(shared)
    assert abs(delay) < SAMPLE_RATE // 20
    moved = np.roll(shared, -delay)
    assert np.corrcoef(moved, speech[0])[0, 1] > 0.95
    assert abs(np.linalg.norm(moved) / np.linalg.norm(speech[0]) - 1) < 0.1
    part = load_audio(tmp_path / name, 0.5, 1.5)
    assert abs(len(part) - SAMPLE_RATE) <= 1
    assert np.corrcoef(part[:15_000], samples[8_000:23_000])[0, 1] > 0.99


def test_an_opus_file_starts_with_its_speech_and_has_no_gaps(
    speech: list[np.ndarray], tmp_path: Path
) -> None:
    """libsndfile leaves the encoder's padding in unless it is told to seek, and then clicks."""
    av = pytest.importorskip("av")
    encode(tmp_path / "a.opus", np.tile(speech[0], 4), "libopus", 48_000)
    with av.open(str(tmp_path / "a.opus")) as container:
        expected = np.concatenate([f.to_ndarray()[0].copy() for f in container.decode(audio=0)])
    expected = soxr.resample(expected, 48_000, SAMPLE_RATE)
    np.testing.assert_allclose(load_audio(tmp_path / "a.opus"), expected, atol=1e-5)


def test_without_pyav_the_line_says_what_to_install(
    speech: list[np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(tmp_path / "a.m4a", speech[0], "aac", 44_100)
    monkeypatch.setattr(audio, "has_pyav", lambda: False)
    with pytest.raises(SAMLError, match=r"a\.m4a: .*pip install 'saml-kernels\[audio\]'") as error:
        load_audio(tmp_path / "a.m4a")
    assert "\n" not in str(error.value)


def test_a_cut_off_webm_says_how_much_is_missing(speech: list[np.ndarray], tmp_path: Path) -> None:
    encode(tmp_path / "a.webm", np.tile(speech[0], 4), "libopus", 48_000)
    data = (tmp_path / "a.webm").read_bytes()
    (tmp_path / "cut.webm").write_bytes(data[: len(data) // 2])
    samples, (said,) = heard(tmp_path / "cut.webm")
    lost = float(said.split("; ")[1].split(" s ")[0])
    assert abs(len(samples) / SAMPLE_RATE + lost - 4 * len(speech[0]) / SAMPLE_RATE) < 0.3


def test_of_several_audio_tracks_the_first_is_heard_and_the_others_are_said(
    speech: list[np.ndarray], tmp_path: Path
) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "two.mkv"), "w") as container:
        streams = [
            container.add_stream("pcm_s16le", rate=SAMPLE_RATE, layout="mono") for _ in speech
        ]
        for stream, samples in zip(streams, speech, strict=True):
            values = (samples * 32767).astype(np.int16)[None]
            frame = av.AudioFrame.from_ndarray(values, format="s16", layout="mono")
            frame.sample_rate = SAMPLE_RATE
            container.mux([*stream.encode(frame), *stream.encode(None)])
    samples, (said,) = heard(tmp_path / "two.mkv")
    np.testing.assert_allclose(samples, speech[0], atol=1e-4)
    assert "2 audio tracks" in said


def test_playlists_open_no_other_file(speech: list[np.ndarray], tmp_path: Path) -> None:
    pytest.importorskip("av")
    write(tmp_path / "private.wav", speech[0])
    for name in ("list.mp3", "list.m3u8"):
        (tmp_path / name).write_text(
            f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{tmp_path / 'private.wav'}\n"
            "#EXT-X-ENDLIST\n"
        )
        with pytest.raises(SAMLError, match="cannot be read as audio"):
            load_audio(tmp_path / name)


def test_a_folder_gives_every_format_and_names_the_rest(
    speech: list[np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in WRITTEN:
        write(tmp_path / f"{kind}.{kind}", speech[0])
    encode(tmp_path / "call.m4a", speech[0], "aac", 44_100)
    for name in ("wav.txt", ".hidden.wav", "notes.pdf"):
        (tmp_path / name).write_text("words")
    with pytest.warns(SAMLWarning, match=r"left out: notes\.pdf \(no audio") as caught:
        found = audio_files(tmp_path)
    assert len(caught) == 1
    assert [p.name for p in found] == sorted([*(f"{k}.{k}" for k in WRITTEN), "call.m4a"])
    monkeypatch.setattr(audio, "has_pyav", lambda: False)
    with pytest.warns(SAMLWarning, match=r"left out: call\.m4a \(needs PyAV: pip install"):
        assert [p.name for p in audio_files(tmp_path)] == sorted(f"{k}.{k}" for k in WRITTEN)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "a.pdf").write_text("words")
    with pytest.raises(SAMLError, match=r"no audio below it .*a\.pdf"):
        audio_files(tmp_path / "nothing")
