"""What a server is told: its limits, and who may come in."""

from __future__ import annotations

import hashlib
import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from saml_kernels.errors import SAMLError
from saml_models.speakers.store import check_name, default_folder

__all__ = ["Limits", "Settings", "is_loopback", "read_tokens"]

SHORTEST = 16  # characters of a token
_LONGEST_FILE = 1 << 20  # bytes


@dataclass(frozen=True)
class Limits:
    """What one request, and all of them together, may take.

    Attributes:
        bytes: of a request's body.
        seconds: of a recording, decoded.
        memory: bytes of decoded recordings held at once, float32 at 16 kHz.
        decoders: recordings decoded at once.
        clips: of an enrolment.
        voices: of one owner.
    """

    bytes: int = 25 * 2**20
    seconds: float = 3600.0
    memory: int = 2**30
    decoders: int = 2
    clips: int = 200
    voices: int = 100

    def __post_init__(self) -> None:
        """Raise SAMLError for a limit of nothing."""
        for name, value in vars(self).items():
            if value <= 0:
                raise SAMLError(f"limit of {name}: {value}; expected more than 0")


@dataclass(frozen=True)
class Settings:
    """How the server behaves.

    Attributes:
        model: the name it serves, as clients say it.
        limits: see `Limits`.
        tokens: owners' names by the SHA-256 (hex) of their tokens; empty lets everybody in.
        store: the folder of voices.
        origins: of other sites whose pages may call.
        load, experts, device: what the model was loaded by, for those who learn voices beside it.
        epochs: of learning; None is as `saml adapt` has it.
    """

    model: str = "tiny.en"
    limits: Limits = field(default_factory=Limits)
    tokens: dict[str, str] = field(default_factory=dict)
    store: Path = field(default_factory=default_folder)
    origins: tuple[str, ...] = ()
    load: str = ""
    experts: str | None = None
    device: str = "cpu"
    epochs: int | None = None

    def owner_of(self, token: str | None) -> str | None:
        """Whose token it is: "" where none is needed, None where it is nobody's."""
        if not self.tokens:
            return ""
        if token is None:
            return None
        # A digest is looked up, so that the time it takes says nothing about the tokens.
        return self.tokens.get(hashlib.sha256(token.encode()).hexdigest())

    def folder_of(self, owner: str) -> Path:
        """Where an owner's voices are: the store itself, or a folder in it."""
        return self.store / "owners" / check_name(owner) if owner else self.store


def read_tokens(path: Path) -> dict[str, str]:
    """Tokens from a file of lines `OWNER TOKEN`; blank lines and those that begin with # are none.

    Returns:
        Owners by the SHA-256 of their tokens; an owner may have several.

    Raises:
        SAMLError: it cannot be read, or a line is anything else.
    """
    try:
        if path.stat().st_size > _LONGEST_FILE:
            raise SAMLError(f"{path}: is larger than 1 MiB; expected lines of OWNER TOKEN")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SAMLError(f"{path}: cannot be read: {error}") from error
    tokens: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        fields = line.split()
        if len(fields) != 2 or len(fields[1]) < SHORTEST:
            raise SAMLError(
                f"{path}: line {number}; expected OWNER TOKEN, the token of {SHORTEST} characters "
                "or more"
            )
        digest = hashlib.sha256(fields[1].encode()).hexdigest()
        if digest in tokens:
            raise SAMLError(f"{path}: line {number}: the token is there already; give each its own")
        tokens[digest] = check_name(fields[0])
    if not tokens:
        raise SAMLError(f"{path}: holds no tokens; expected lines of OWNER TOKEN")
    return tokens


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own, which nobody else reaches."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
