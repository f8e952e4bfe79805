"""Shallow fusion with a person's own words: tokens that spell one get a bonus while decoding.

The spellings make a trie over token ids with failure links (Aho and Corasick, 1975), and each row
of a batch has a node of it as its state. A token that begins a phrase or goes on with one gets the
bonus. A beam search compares whole texts, so there what an unfinished phrase was given is taken
back when it is left (Zhao et al., Shallow-fusion end-to-end contextual biasing, Interspeech 2019);
a greedy search compares the next tokens alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

__all__ = ["BONUS", "OwnWords", "SpellingProcessor", "Spelt", "processors", "variants"]

BONUS = 2.0  # nats a token


def variants(phrase: str) -> list[str]:
    """How a phrase may be written: as given, with a capital, and without case also in others.

    A mixture of cases ("McKenzie", "iPhone") is the person's own spelling and is kept.
    """
    forms = [phrase, phrase[:1].upper() + phrase[1:]]
    if phrase in (phrase.lower(), phrase.upper()):
        forms += [phrase.lower(), phrase.capitalize(), phrase.title()]
    return list(dict.fromkeys(forms))


class OwnWords:
    """The trie, as tensors that a step of decoding can be captured with.

    Node 0 is the root. Edges lead from every other node by the tokens that go on with a phrase, be
    it one that began later; by all other tokens a row is where the root leads.
    """

    def __init__(self, spellings: Iterable[Sequence[int]], bonus: float = BONUS) -> None:
        """Take token ids of each spelling of each phrase, and the bonus in nats a token."""
        self.bonus = bonus
        self.children: list[dict[int, int]] = [{}]  # by node: token -> node
        self.longest = 0
        parent, whole = [0], [False]
        for spelling in spellings:
            node = 0
            for token in spelling:
                if token not in self.children[node]:
                    self.children[node][token] = len(self.children)
                    self.children.append({})
                    parent.append(node)
                    whole.append(False)
                node = self.children[node][token]
            whole[node] = node > 0
            self.longest = max(self.longest, len(spelling))
        # What a beam has been given at a node since the last whole phrase, and may lose.
        given, self.owed = [0.0], [0.0]
        for node in range(1, len(parent)):
            given.append(self.owed[parent[node]] + bonus)
            self.owed.append(0.0 if whole[node] else given[node])
        self.given = given
        self._link()
        edges = [
            (node, token, child)
            for node, tokens in enumerate(self.children)
            for token, child in tokens.items()
        ]
        table = torch.tensor(edges, dtype=torch.int64).reshape(-1, 3).T
        inner = table[0] > 0
        self.first, self.first_child = table[1:, ~inner]
        self.nodes, self.tokens, self.child = table[:, inner]
        # A token that may also begin a phrase has the bonus at every node.
        begins = bonus * torch.isin(self.tokens, self.first)
        self.more = bonus - begins
        self.more_of_beam = torch.tensor(given)[self.child] - begins
        self.owes = torch.tensor(self.owed)

    def _link(self) -> None:
        """Give each node the edges of the longest of its suffixes that begins a phrase."""
        behind = [0] * len(self.children)
        queue = deque(self.children[0].values())
        while queue:
            node = queue.popleft()
            for token, child in self.children[node].items():
                behind[child] = self.walk([token], behind[node])
                queue.append(child)
            if behind[node]:
                self.children[node] = self.children[behind[node]] | self.children[node]

    def to(self, device: torch.device) -> Self:
        """Move the tensors, once for each device."""
        if self.nodes.device != device:
            for name, value in vars(self).items():
                if isinstance(value, Tensor):
                    setattr(self, name, value.to(device))
        return self

    def walk(self, tokens: Iterable[int], node: int = 0) -> int:
        """Where tokens lead from a node."""
        for token in tokens:
            node = self.children[node].get(token) or self.children[0].get(token, 0)
        return node

    def worth(self, tokens: Iterable[int]) -> float:
        """The bonus of all whole phrases in a text, in nats."""
        node, worth = 0, 0.0
        for token in tokens:
            node = self.walk([token], node)
            worth += self.given[node] if not self.owed[node] else 0.0
        return worth

    def biased(self, logits: Tensor, node: Tensor, beams: bool = False) -> Tensor:
        """Logits [B, V] with the bonus at nodes [B]; with `beams`, what is owed is taken back."""
        logits = logits.clone()
        begin = logits.new_full((1, 1), self.bonus).expand(len(logits), len(self.first))
        logits.index_add_(1, self.first, begin)
        if node.device.type != "cpu" or node.any():
            more = (self.more_of_beam if beams else self.more).to(logits.dtype)
            logits.index_add_(1, self.tokens, (self.nodes == node[:, None]) * more)
            if beams:
                logits -= self.owes[node, None].to(logits.dtype)
        return logits


class Spelt:
    """Where each row of a batch is in the trie: of static tensors, as `greedy.Step` is.

    Attributes:
        node: int64 [B].
    """

    def __init__(self, words: OwnWords, rows: int, device: torch.device) -> None:
        self.words = words.to(device)
        self.node = torch.zeros(rows, dtype=torch.int64, device=device)

    def biased(self, logits: Tensor) -> Tensor:
        """Logits [B, V] with the bonus of each row; a copy."""
        return self.words.biased(logits, self.node)

    def move(self, tokens: Tensor) -> None:
        """Go on by the token of each row: int64 [B, 1]."""
        w = self.words
        begun = ((w.first == tokens) * w.first_child).sum(1)
        if self.node.device.type != "cpu" or self.node.any():
            went = (w.nodes == self.node[:, None]) & (w.tokens == tokens)
            on = (went * w.child).sum(1)
            begun = torch.where(on > 0, on, begun)
        self.node.copy_(begun)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self.node = self.node[rows]

    def anew(self, rows: int) -> Spelt:
        """For so many rows that begin."""
        return Spelt(self.words, rows, self.node.device)


class SpellingProcessor(LogitsProcessor):
    """The same for transformers' `generate`, which asks with all tokens so far."""

    def __init__(self, words: OwnWords, beams: int) -> None:
        """`beams` of each clip; with one, nothing is taken back."""
        self.words, self.beams = words, beams

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] after tokens [B, n]."""
        words = self.words.to(scores.device)
        ends = input_ids[:, -words.longest :].tolist()
        node = torch.tensor([words.walk(row) for row in ends], device=scores.device)
        return words.biased(scores, node, self.beams > 1)


def processors(words: OwnWords | None, beams: int) -> dict[str, Any]:
    """Options of `generate` for own words; none where there are none."""
    if words is None:
        return {}
    return {"logits_processor": LogitsProcessorList([SpellingProcessor(words, beams)])}
