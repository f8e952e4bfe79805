"""A web server in a thread, and a model that answers at once, for tests of what lies between."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import small_voices
import soundfile
import uvicorn

from saml_kernels.errors import SAMLError
from saml_kernels.layers.context import BatchContext
from saml_models.models.interface import Piece
from saml_models.text.transcript import Decoding, Segment, Word


class Talker:
    """Hears a word a second; `pause` seconds pass for every batch.

    Attributes:
        network: with experts, so that profiles can be checked and mixed; a small one by default.
        batches: how many pieces each batch had.
        gate: while it is not set, nothing is heard.
    """

    def __init__(self, pause: float = 0.0, network: Any = None) -> None:
        self.network, self.pause = network or small_voices.make(), pause
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[int] = []
        self.context: BatchContext = self.network.saml.context

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        yield

    def language_code(self, language: str | None, task: str) -> str:
        if language not in (None, "en"):
            raise SAMLError(f"language: this model does not know {language!r}")
        return "en"

    def no_speech(self, clip: Any) -> float:
        return 0.0

    def decode(
        self, clips: Sequence[Any], beam_size: int, language: str | None, own_words: Any = None
    ) -> list[str]:
        self.batches.append(len(clips))
        self.gate.wait(60)
        time.sleep(self.pause)
        return [" ".join(said(len(clip))) for clip in clips]

    def pieces(self, clip: Any, language: str, options: Any, on_progress: Any, on_text: Any) -> Any:
        heard: list[str] = []
        segments = []
        for number in range(0, len(clip), 5 * 16000):
            part = said(len(clip))[len(heard) : len(heard) + 5]
            heard += yield Piece("window", clip[number : number + 5 * 16000], language, part)
            start = number / 16000
            words = [Word(start + i, start + i + 1.0, f" {w}") for i, w in enumerate(part)]
            end = start + len(part)
            how = Decoding(number // 160, [7] * len(part), 0.0, -0.2, 1.1, 0.01)
            segments.append(Segment(len(segments), start, end, " ".join(part), words, how))
            on_text(" ".join(heard))
        return " ".join(heard), segments

    def heard_at_once(self, pieces: Sequence[Piece]) -> int:
        return len(pieces)

    def hear(self, pieces: Sequence[Piece]) -> list[list[str]]:
        self.batches.append(len(pieces))
        self.gate.wait(60)
        time.sleep(self.pause)
        return [piece.given for piece in pieces]


def said(samples: int) -> list[str]:
    """What `Talker` hears in a clip: a word for each whole second."""
    return [f"word{second}" for second in range(samples // 16000)]


def noise(seconds: float, rate: int = 16000) -> np.ndarray:
    """Loud in places, so that it passes for speech: float32 [samples]."""
    count = int(seconds * rate)
    envelope = np.repeat(np.arange(count // 1000 + 1) % 5 == 0, 1000)[:count]
    return (np.random.default_rng(0).normal(0, 0.1, count) * envelope).astype(np.float32)


def wav(seconds: float = 2.0) -> bytes:
    """A file of noise."""
    file = io.BytesIO()
    soundfile.write(file, noise(seconds), 16000, "PCM_16", format="WAV")
    return file.getvalue()


# Of each container a codec of PyAV's and its samples a second.
CONTAINERS = {
    "flac": ("flac", 16000), "mp3": ("mp3", 16000), "mp4": ("aac", 48000), "m4a": ("aac", 44100),
    "ogg": ("libopus", 48000), "wav": ("pcm_s16le", 16000), "webm": ("libopus", 48000),
}  # fmt: skip


def encoded(clip: np.ndarray, name: str) -> bytes:
    """A clip at 16 kHz in one of `CONTAINERS`."""
    import av

    codec, rate = CONTAINERS[name]
    file, layout = io.BytesIO(), "mono"
    with av.open(file, "w", format="mp4" if name == "m4a" else name) as container:
        stream: Any = container.add_stream(codec, rate=rate, layout=layout)
        stream.bit_rate = 128_000
        resampler = av.AudioResampler(stream.format.name, layout, rate, stream.frame_size)
        samples = (clip * 32767).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout=layout)
        frame.sample_rate = 16000
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return file.getvalue()


@contextmanager
def served(app: Any) -> Iterator[str]:
    """Within the block the application answers at the address that is yielded."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error")
    server = uvicorn.Server(config)
    socket = config.bind_socket()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
