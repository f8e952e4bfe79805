"""All contenders: this package's own and its peers."""

from __future__ import annotations

from bench.layers.contenders import Contender, own_contenders
from bench.layers.peers import peer_contenders

__all__ = ["contenders"]


def contenders() -> dict[str, Contender]:
    """Every contender by name, this package's own first."""
    return {c.name: c for c in (*own_contenders(), *peer_contenders())}
