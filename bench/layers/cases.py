"""What is timed: the shapes and modes of linear layers, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

__all__ = ["WIDTHS", "WORKS", "Case", "Work", "cases_of"]

# Whisper's widths: tiny, base, small, medium, large. The other side of a feed-forward is 4 d.
WIDTHS = (384, 512, 768, 1024, 1280)
SHORT_WIDTHS = (384, 1280)
FRAMES = 1500  # of the encoder, for one window of 30 s
EXPERTS, RANK = 4, 16
SWEEP_EXPERTS, SWEEP_RANKS = (1, 4, 8), (4, 8, 16)
VOCABULARY = 51864  # of the English-only Whispers


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
        router: "given": gates [M, E] come with x; "token": the layer makes them of x.
        dtype: what it runs in; None leaves that to the device.
        autocast: experts and router are held in float32, and autocast to `dtype`.
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
    router: str = "given"
    dtype: str | None = None
    autocast: bool = False

    @property
    def label(self) -> str:
        """Short, for people."""
        shape = f"{self.m} x {self.k} -> {self.n}"
        more = "" if (self.experts, self.rank) == (EXPERTS, RANK) else (
            f", {self.experts} x {self.rank}" if self.experts else ", no experts"
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
        against: names of the contenders, None for all that can run the case.
        widths, short_widths: d of the models whose layers they are.
        outputs: the layers' out-features; None takes those of a block: d to d, d to 4 d and back.
        alike: what its cases have in common beside these, by the attribute's name in `Case`.
    """

    title: str
    modes: tuple[str, ...]
    tokens: tuple[int, ...]
    short_tokens: tuple[int, ...]
    sweep: bool = False
    against: tuple[str, ...] | None = None
    widths: tuple[int, ...] = WIDTHS
    short_widths: tuple[int, ...] = SHORT_WIDTHS
    outputs: int | None = None
    alike: Mapping[str, Any] = field(default_factory=dict)

    def shapes(self, d: int) -> tuple[tuple[int, int], ...]:
        """(out-features, in-features) of the layers at width d."""
        return ((d, d), (4 * d, d), (d, 4 * d)) if self.outputs is None else ((self.outputs, d),)


MIXED = ("dense", "saml, 1 speaker", "saml, 8 speakers", "saml, 64 speakers",
         "bitsandbytes + PEFT, mixed batch of 64")  # fmt: skip
COMPOSED = ("dense", "bitsandbytes + gated PEFT", "saml + experts")
# As `SAMLConfig()` makes them and `fit` trains them; P1 to P6 are larger and leave the router out.
DEFAULTS = {"rank": 4, "router": "token"}
TRAINED = {**DEFAULTS, "dtype": "bfloat16", "autocast": True}

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
        against=MIXED, alike={"speakers": 64},
    ),
    "P6": Work("linear layers on the CPU", ("eager",), (1, 5, 16, 300, FRAMES), (16, 300)),
    "P9": Work(
        "a layer by default", ("graph", "eager"), (1, 5, FRAMES, 8 * FRAMES), (5, FRAMES),
        alike=DEFAULTS,
    ),
    "P10": Work(
        "training step of a layer by default", ("train",), (FRAMES, 8 * FRAMES), (FRAMES,),
        alike=TRAINED,
    ),
    "P11": Work(
        "the tied output head", ("graph", "eager"), (1, 5, 64), (1, 5), short_widths=(384,),
        outputs=VOCABULARY, alike={"experts": 0},
    ),
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

    P6 is the CPU's own, the others are asked of both; a CPU has no graphs, and trains in float32.
    P7 and P8 are whole models.
    """
    plan = WORKS[work]
    if work == "P6" and device_type != "cpu":
        return []
    widths = widths or (plan.short_widths if short else plan.widths)
    alike = dict(plan.alike)
    if device_type == "cpu":
        alike |= {"dtype": None, "autocast": False}
    tokens = tokens or (plan.short_tokens if short else plan.tokens)
    modes = [m for m in plan.modes if m != "graph" or device_type == "cuda"]
    found = []
    for mode in modes:
        for d in widths:
            for n, k in plan.shapes(d):
                for m in tokens:
                    clip = FRAMES // 4 if m >= FRAMES else 1
                    found.append(replace(Case(work, mode, m, n, k, clip=clip), **alike))
    if plan.sweep and not short and not (experts or rank):
        middle = next(c for c in found if c.n == c.k)
        found += [
            replace(middle, experts=e, rank=r)
            for e in SWEEP_EXPERTS
            for r in SWEEP_RANKS
            if (e, r) != (EXPERTS, RANK)
        ]
    asked = {"experts": experts, "rank": rank}
    changes: dict[str, Any] = {k: v for k, v in asked.items() if v is not None}
    return [replace(case, **changes) if case.experts else case for case in found]
