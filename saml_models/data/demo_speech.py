"""Speech for the demo: a given folder, mini LibriSpeech, or Debian's Asterisk prompts."""

from __future__ import annotations

import gzip
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from saml_kernels.errors import SAMLError, needs
from saml_kernels.files import atomic_path
from saml_models.data.audio import MAX_SECONDS, SAMPLE_RATE, load_audio
from saml_models.data.corpora import Utterance, by_speaker, load_corpus
from saml_models.runtime.folders import cache_folder

__all__ = ["LANGUAGES", "asterisk_prompts", "demo_speech", "mini_librispeech"]

# Panayotov et al., mini LibriSpeech, https://www.openslr.org/31/ (CC BY 4.0).
MINI_LIBRISPEECH = "https://www.openslr.org/resources/31/dev-clean-2.tar.gz"
PROMPTS = 80
LANGUAGES = ("en", "fr", "es", "it", "ru")  # of Debian's packages asterisk-core-sounds-*


def demo_speech(path: str | None) -> tuple[list[Utterance], str]:
    """Utterances of one speaker, and where they come from, for people to read.

    Args:
        path: a corpus to take the first speaker with enough utterances of; None fetches speech.

    Raises:
        SAMLError: no source could be reached.
    """
    if path is not None:
        return _one_speaker(load_corpus(Path(path))), path
    reasons = []
    for name, fetch in (
        ("mini LibriSpeech (OpenSLR 31)", mini_librispeech),
        ("Debian's Asterisk prompts (one voice)", asterisk_prompts),
    ):
        try:
            return _one_speaker(load_corpus(fetch(cache_folder()))), name
        except SAMLError as error:
            reasons.append(str(error))
    raise SAMLError(f"no speech to learn from: {'; '.join(reasons)}; give --data PATH")


def _one_speaker(utterances: list[Utterance], least: int = 30) -> list[Utterance]:
    for found in by_speaker(utterances).values():
        if len(found) >= least:
            return found
    raise SAMLError(f"no speaker with {least} utterances in the data; give another --data")


def mini_librispeech(cache: Path) -> Path:
    """Fetch and unpack mini LibriSpeech's dev set (126 MB) with a progress bar.

    Raises:
        SAMLError: the download fails, or pooch is not installed.
    """
    target = cache / "LibriSpeech" / "dev-clean-2"
    if target.is_dir():
        return target
    with needs("the download", "demo"):
        import pooch
    downloader = pooch.HTTPDownloader(progressbar=False, timeout=10)
    try:
        archive = pooch.retrieve(MINI_LIBRISPEECH, None, path=cache, downloader=downloader)
    except Exception as error:  # whatever the network says, it is one line for the reader
        raise SAMLError(
            f"{MINI_LIBRISPEECH}: cannot be fetched ({type(error).__name__})"
        ) from error
    with tempfile.TemporaryDirectory(dir=cache) as folder, tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
        (cache / "LibriSpeech").mkdir(exist_ok=True)
        shutil.move(Path(folder) / "LibriSpeech" / "dev-clean-2", target)
    return target


def asterisk_prompts(cache: Path, language: str = "en") -> Path:
    """One real voice from Debian's packages, as a folder of clip.wav and clip.txt.

    The prompts are 8 kHz, CC BY-SA 3.0 (Russian: CC BY 3.0). Needs `apt-get download` and
    `dpkg-deb`, no root. The `PROMPTS` prompts with the most words are taken (up to 60 words): the
    short ones are too easy.

    Args:
        cache: the folder is made there, and found again.
        language: one of `LANGUAGES`.

    Raises:
        SAMLError: this is no Debian, or the packages cannot be fetched.
    """
    target = cache / f"asterisk-{language}"
    wanted = [f"asterisk-core-sounds-{language}{kind}" for kind in ("-wav", "")]
    if target.is_dir():
        return target
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise SAMLError("Asterisk prompts: apt-get and dpkg-deb are not on this machine")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as name:
        folder = Path(name)
        # apt drops its privileges to a user that must be able to write here.
        folder.chmod(0o777)
        got = subprocess.run(
            ["apt-get", "download", *wanted], cwd=folder, capture_output=True, check=False
        )
        packages = list(folder.glob("*.deb"))
        if got.returncode or len(packages) != len(wanted):
            raise SAMLError("Asterisk prompts: apt-get download failed; run apt-get update first")
        for package in packages:
            subprocess.run(["dpkg-deb", "-x", package, folder], check=True, capture_output=True)
        clips = folder / target.name
        clips.mkdir()
        _lay_out(folder, clips, language)
        shutil.move(clips, target)
    return target


def _lay_out(folder: Path, clips: Path, language: str) -> None:
    name = f"core-sounds-{language}.txt.gz"
    texts = next(folder.rglob(name), None)
    if texts is None:
        raise SAMLError(f"Asterisk prompts: the package holds no {name}")
    sounds = {p.stem: p for p in sorted(folder.rglob("*.wav"))}
    found = []
    for line in gzip.decompress(texts.read_bytes()).decode("utf-8", "replace").splitlines():
        name, _, text = line.partition(":")
        text = text.strip()
        sound = sounds.get(Path(name.strip()).name)
        if sound is not None and 4 <= len(text.split()) <= 60 and text[0].isalpha():
            found.append((text, sound))
    found.sort(key=lambda pair: -len(pair[0].split()))
    taken = 0
    for text, sound in found:
        if taken == PROMPTS:
            break
        if 1.0 < len(load_audio(sound)) / SAMPLE_RATE <= MAX_SECONDS:
            shutil.copyfile(sound, clips / f"{sound.stem}.wav")
            with atomic_path(clips / f"{sound.stem}.txt") as temporary:
                temporary.write_text(text)
            taken += 1
    if taken == 0:
        raise SAMLError("Asterisk prompts: no prompt has both a sound and a text")
