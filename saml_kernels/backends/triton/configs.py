"""Which tiles and which route a shape takes: tuning tables as data, and the rule for the rest.

A table of measured entries (the user's own, which `saml bench --tune` writes, or that of a compute
capability, `tables/sm_90.json`) goes by the nearest measured shape. Where there is none near, the
cost model (costs.py) picks among the configurations of `tables/default.json`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from saml_kernels.backends.triton import costs
from saml_kernels.errors import SAMLError

__all__ = [
    "ROUTES",
    "SHARED_OUT",
    "Config",
    "bounded",
    "choose",
    "device_traits",
    "forget_tables",
    "from_hopper",
    "on_change",
    "predicted",
    "pretending",
    "read_table",
    "serving",
    "table_changed",
    "user_table",
]

# single: one launch for a few tokens; decode: two; split: the reduction is shared out among
# programs; fused: one program for a tile of the result; dense: as fused, on the weight dequantised
# to scratch; scratch: the same scratch, and one cuBLAS product over [X | H] and [W | B]; stacked:
# one of X and [W ; A], and a pass over its result, which needs no copy of X.
# Backward, single, decode and split are one way, and so are scratch and stacked, which have cuBLAS
# make [dY W | dY B]; the others make dX, dP and dZ in one launch.
ROUTES = ("single", "decode", "split", "fused", "dense", "scratch", "stacked")
SHARED_OUT = ("single", "decode", "split")  # those that share the reduction out among programs
Rules = dict[str, list[tuple[dict[str, Any], "Config"]]]
NEAR = 2.0  # a measured shape further than this factor (in M x N x K) says nothing
MAX_SPLIT = 16
WHERE = ("min_m", "max_m", "m", "n", "k", "on")  # an entry's keys that are no part of a `Config`
SPLITS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Config:
    """Route and tile sizes of one product.

    Attributes:
        route: one of `ROUTES`.
        block_m, block_o, block_d: tile of tokens, of the result's features, of the reduction.
        split: shares of the reduction; 0 lets `choose` fill the device.
        warps, stages: of a Triton program.
        group: tile rows that run side by side.
        scale: of the weight's blocks, forward: "before" the product, as dequantise does, or "after"
            it, which takes fewer instructions and rounds the codes in place of code times scale
            (`device.base_product` says how far).
        loads: of a dense product's tiles, forward: "pointers", or "descriptors" for a persistent
            kernel that copies them by the tensor memory accelerator, on Hopper and later.
        dependent: of decode's second launch, which then starts before the first has ended
            (programmatic dependent launch), on Hopper and later.
    """

    route: str = "fused"
    block_m: int = 64
    block_o: int = 64
    block_d: int = 64
    split: int = 0
    warps: int = 4
    stages: int = 3
    group: int = 8
    scale: str = "before"
    loads: str = "pointers"
    dependent: bool = False

    def __post_init__(self) -> None:  # noqa: D105
        sizes = (self.block_m, self.block_o, self.block_d)
        powers = all(16 <= n <= 256 and n & (n - 1) == 0 for n in sizes)
        fits = 0 <= self.split <= 64 and self.warps in (1, 2, 4, 8) and 1 <= self.stages <= 8
        fits = fits and 1 <= self.group <= 64 and self.scale in ("before", "after")
        fits = fits and self.loads in ("pointers", "descriptors")
        fits = fits and isinstance(self.dependent, bool)
        if self.route not in ROUTES or not powers or not fits:
            raise SAMLError(f"tuning table: {self} is not a configuration")


def read_table(text: str, source: str) -> Rules:
    """Rules of a table by direction; each is (where it applies, configuration).

    Raises:
        SAMLError: not a tuning table; names `source`.
    """
    try:
        values = json.loads(text)
        rules: Rules = {}
        for direction in ("forward", "backward"):
            rules[direction] = []
            for entry in values[direction]:
                where = {k: entry.pop(k) for k in WHERE if k in entry}
                for told in ("microseconds", "before_microseconds"):
                    entry.pop(told, None)
                rules[direction].append((where, Config(**entry)))
        return rules
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SAMLError(f"{source}: not a tuning table ({error!r}); remove it") from error


def user_table(capability: str, device: str) -> Path:
    """The user's own table, in $SAML_CACHE or ~/.cache/saml-kernels; `saml bench --tune` writes it.

    Its name carries a hash of the device's name, the versions and the kernels' source: what was
    measured with others is not found.
    """
    folder = os.environ.get("SAML_CACHE") or "~/.cache/saml-kernels"
    return Path(folder).expanduser() / f"{capability}-{_fingerprint(device)}.json"


@cache
def _fingerprint(device: str) -> str:
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    digest = hashlib.sha256(f"{device}/{triton}/{torch.__version__}".encode())
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]


@cache
def _tables(capability: str, device: str) -> tuple[Rules, ...]:
    """What was measured: the user's, the shipped one of this capability, as far as they exist."""
    tables = []
    own = user_table(capability, device)
    if own.is_file():
        tables.append(read_table(own.read_text(), str(own)))
    shipped = files("saml_kernels.backends.triton") / "tables" / f"{capability}.json"
    if shipped.is_file():
        tables.append(read_table(shipped.read_text(), shipped.name))
    return tuple(tables)


@cache
def _default() -> Rules:
    """What the cost model chooses from."""
    table = files("saml_kernels.backends.triton") / "tables" / "default.json"
    return read_table(table.read_text(), table.name)


def forget_tables() -> None:
    """Read the tables anew at the next call."""
    _tables.cache_clear()
    choose.cache_clear()
    table_changed()


_forgetters: list[Callable[[], None]] = []
changes = 0  # how often what plans were made from has changed


def on_change(forget: Callable[[], None]) -> None:
    """Call `forget` whenever plans made so far no longer hold."""
    _forgetters.append(forget)


def table_changed() -> None:
    """Plans made so far no longer hold: other tables, or other kernels."""
    global changes
    changes += 1
    for forget in _forgetters:
        forget()


@lru_cache(maxsize=4096)
def choose(
    direction: str, m: int, n: int, k: int, capability: str, processors: int, device: str = ""
) -> Config:
    """The configuration of a product of `m` tokens with a weight [n, k].

    Args:
        direction: "forward" (x W^T) or "backward" (dy W).
        m, n, k: shape.
        capability: "sm_90" and the like; "" for none.
        device: its name, for the user's own table.
        processors: of the device, which routes that share the reduction out try to fill.
    """
    for table in _tables(capability, device):
        entry = _nearest(table[direction], m, n, k)
        if entry is not None:
            if not entry.split:
                entry, _ = predicted(direction, m, n, k, capability, processors, (entry,))
            return bounded(entry, direction, n, k)
    return predicted(direction, m, n, k, capability, processors)[0]


def predicted(
    direction: str,
    m: int,
    n: int,
    k: int,
    capability: str,
    processors: int,
    among: Iterable[Config] | None = None,
    device: costs.Device | None = None,
) -> tuple[Config, float]:
    """The configuration that the cost model takes for the fastest, and its time in microseconds.

    Args:
        direction, m, n, k, capability, processors: as in `choose`.
        among: configurations to choose from; those of the default table that serve so many tokens,
            if None. Where `split` is 0 the model shares out the reduction.
        device: in place of the usual one of this capability and size.
    """
    device = device or costs.device_of(capability, processors)
    cost = costs.forward if direction == "forward" else costs.backward
    # Neighbouring numbers of tokens take the same way: fewer kernels are compiled.
    rounded = 1 << max(0, m - 1).bit_length()
    best: tuple[Config, float] | None = None
    for config in serving(direction, m, capability) if among is None else among:
        splits = SPLITS if config.route in SHARED_OUT and not config.split else (config.split,)
        for split in splits:
            one = bounded(replace(config, split=split), direction, n, k)
            time = cost(device, one, rounded, n, k)
            if best is None or time < best[1]:
                best = one, time
    assert best is not None
    return best[0], cost(device, best[0], m, n, k)


def serving(direction: str, m: int, capability: str) -> Iterator[Config]:
    """The default table's configurations for `m` tokens on devices of a capability."""
    for where, config in _default()[direction]:
        most = where.get("max_m")
        serves = where.get("min_m", 0) <= m and (most is None or m <= most)
        if serves and capability in where.get("on", (capability,)):
            yield config


def from_hopper(capability: str) -> bool:
    """Whether such a device has tensor descriptors and dependent launches."""
    if not capability:  # a CPU, whose interpreter knows descriptors
        return True
    return torch.version.hip is None and int(capability.removeprefix("sm_")) >= 90


def bounded(config: Config, direction: str, n: int, k: int) -> Config:
    """`config` with as many shares of the reduction as it has steps, or fewer: a power of two."""
    if config.route not in SHARED_OUT:
        return replace(config, split=1)
    steps = math.ceil((k if direction == "forward" else n) / config.block_d)
    shares = max(1, min(config.split, steps, MAX_SPLIT))
    return replace(config, split=1 << shares.bit_length() - 1)


def _nearest(rules: list[tuple[dict[str, Any], Config]], m: int, n: int, k: int) -> Config | None:
    nearest, best = None, math.log(NEAR)
    for where, config in rules:
        pairs = zip((m, n, k), (where["m"], where["n"], where["k"]), strict=True)
        distance = sum(abs(math.log(max(1, a) / max(1, b))) for a, b in pairs)
        if distance < best:
            nearest, best = config, distance
    return nearest


_pretended: tuple[str, int] = ("", 16)


@contextmanager
def pretending(capability: str, processors: int) -> Iterator[None]:
    """Within the block a CPU stands in for such a device: what `saml_kernels.aot` compiles for."""
    global _pretended
    before, _pretended = _pretended, (capability, processors)
    try:
        yield
    finally:
        _pretended = before


def device_traits(device: torch.device) -> tuple[str, int, str]:
    """(capability, processors, name) of a device; a nominal size for the interpreter on a CPU."""
    if device.type != "cuda":
        return (*_pretended, "")
    return _cuda_traits(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _cuda_traits(index: int) -> tuple[str, int, str]:
    properties = torch.cuda.get_device_properties(index)
    capability = f"sm_{properties.major}{properties.minor}"
    return capability, properties.multi_processor_count, properties.name
