"""What is timed: the shapes and modes of linear layers, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["WIDTHS", "WORKS", "Case", "Work", "cases_of"]

# Whisper's widths: tiny, base, small, medium, large. The other side of a feed-forward is 4 d.
WIDTHS = (384, 512, 768, 1024, 1280)
SHORT_WIDTHS = (384, 1280)
FRAMES = 1500  # of the encoder, for one window of 30 s
EXPERTS, RANK = 4, 16
SWEEP_EXPERTS, SWEEP_RANKS = (1, 4, 8), (4, 8, 16)


@dataclass(frozen=True)
class Case:
    """One shape in one mode.

    Attributes:
        work: the key in `WORKS` that it belongs to.
        mode: "eager", "graph" (captured in a CUDA graph) or "train" (forward and backward).
        m, n, k: tokens, out-features, in-features.
        experts, rank: E and r.
        speakers: the most speakers whose rows stand in the batch.
        clip: rows of one utterance, which belong to one speaker.
    """

    work: str
    mode: str
    m: int
    n: int
    k: int
    experts: int = EXPERTS
    rank: int = RANK
    speakers: int = 1
    clip: int = 1

    @property
    def label(self) -> str:
        """Short, for people."""
        shape = f"{self.m} x {self.k} -> {self.n}"
        more = "" if (self.experts, self.rank) == (EXPERTS, RANK) else (
            f", {self.experts} x {self.rank}"
        )  # fmt: skip
        return f"{self.work} {self.mode} {shape}{more}"


@dataclass(frozen=True)
class Work:
    """A question, and the shapes that answer it.

    Attributes:
        title: the question.
        modes: of its cases; "graph" is left out where there is no GPU.
        tokens: numbers of rows.
        short_tokens: what a short run takes of them.
        sweep: whether numbers of experts and ranks are varied as well.
        against: names of the contenders, None for all that can run the mode.
        speakers: see `Case`.
    """

    title: str
    modes: tuple[str, ...]
    tokens: tuple[int, ...]
    short_tokens: tuple[int, ...]
    sweep: bool = False
    against: tuple[str, ...] | None = None
    speakers: int = 1


MIXED = ("dense", "saml, 1 speaker", "saml, 8 speakers", "saml, 64 speakers",
         "bitsandbytes + PEFT, mixed batch of 64")  # fmt: skip
COMPOSED = ("dense", "bitsandbytes + gated PEFT", "saml + experts")

WORKS: dict[str, Work] = {
    "P1": Work("encoder", ("graph", "eager"), (FRAMES, 8 * FRAMES), (FRAMES,), sweep=True),
    "P2": Work("decoding", ("graph", "eager"), (1, 2, 4, 5, 8, 16), (1, 5), sweep=True),
    "P3": Work(
        "the user's composition", ("graph", "eager"), (1, 5, FRAMES), (5,), sweep=True,
        against=COMPOSED,
    ),
    "P4": Work("training step of one layer", ("train",), (FRAMES, 8 * FRAMES), (FRAMES,)),
    "P5": Work(
        "many speakers in a batch", ("graph", "eager"), (64, 64 * FRAMES // 4), (64,),
        against=MIXED, speakers=64,
    ),
    "P6": Work("linear layers on the CPU", ("eager",), (1, 5, 16, 300, FRAMES), (16, 300)),
}  # fmt: skip


def cases_of(
    work: str,
    device_type: str,
    short: bool,
    widths: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
    experts: int | None = None,
    rank: int | None = None,
) -> list[Case]:
    """The cases of one work on a device; the last four replace what it would choose itself.

    P6 is the CPU's own, P1 and P2 are asked of both; a CPU has no graphs.
    """
    plan = WORKS[work]
    if work == "P6" and device_type != "cpu":
        return []
    widths = widths or (SHORT_WIDTHS if short else WIDTHS)
    tokens = tokens or (plan.short_tokens if short else plan.tokens)
    modes = [m for m in plan.modes if m != "graph" or device_type == "cuda"]
    found = []
    for mode in modes:
        for d in widths:
            for n, k in ((d, d), (4 * d, d), (d, 4 * d)):
                for m in tokens:
                    clip = FRAMES // 4 if m >= FRAMES else 1
                    case = Case(work, mode, m, n, k, speakers=plan.speakers, clip=clip)
                    found.append(case)
    if plan.sweep and not short and not (experts or rank):
        middle = next(c for c in found if c.n == c.k)
        found += [
            replace(middle, experts=e, rank=r)
            for e in SWEEP_EXPERTS
            for r in SWEEP_RANKS
            if (e, r) != (EXPERTS, RANK)
        ]
    changes: dict[str, Any] = {
        k: v for k, v in (("experts", experts), ("rank", rank)) if v is not None
    }
    return [replace(case, **changes) for case in found]
