"""What the model at full precision expects of each clip's text: soft targets for a student.

Knowledge distillation (Hinton et al., arXiv 1503.02531), but only at the tokens where the teacher's
likeliest one is right: what it knows is kept, and where it errs the text alone is learnt from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from saml_kernels.errors import SAMLError
from saml_models.compress.layers import model_hash
from saml_models.models.interface import QUANTISED_MARGIN, SpeechModel
from saml_models.runtime.tensors import read_tensors, write_tensors
from saml_models.training.batches import Sample, SoftTargets

__all__ = ["LIKELIEST", "taught"]

LIKELIEST = 8  # tokens of the teacher's distribution that are kept
SAVE_EVERY = 256  # clips


@dataclass
class _Answers:
    """The teacher's `LIKELIEST` tokens at every token of the clips asked so far, end to end."""

    ids: list[Tensor]
    shares: list[Tensor]

    def save(self, path: Path, about: str) -> None:
        tensors = {"ids": torch.cat(self.ids), "shares": torch.cat(self.shares)}
        tensors["lengths"] = torch.tensor([len(one) for one in self.ids])
        write_tensors(path, tensors, {"asked": about})


def taught(
    teacher: SpeechModel,
    samples: Sequence[Sample],
    share: float,
    path: Path | None = None,
    on_done: Callable[[int, int], None] | None = None,
) -> list[Sample]:
    """The samples with the teacher's soft targets.

    The teacher hears each clip as it is, without noise and masks.

    Args:
        teacher: at full precision, with the student's tokens.
        samples: with their text.
        share: of the target at a token that the teacher finds likeliest itself; 0 to 1.
        path: a file that keeps what the teacher said, and from which it is taken again.
        on_done: called with (clips heard, clips in all).

    Raises:
        SAMLError: a share that is none.
    """
    if not 0 <= share <= 1:
        raise SAMLError(f"teacher: a share of {share}; give one from 0 to 1")
    about = _fingerprint(teacher, samples)
    known = _read(path, about)
    with torch.inference_mode(), teacher.evaluating():
        for number in range(len(known.ids), len(samples)):
            _ask(teacher, samples[number], known)
            done = number + 1
            if path is not None and (done % SAVE_EVERY == 0 or done == len(samples)):
                known.save(path, about)
            if on_done:
                on_done(done, len(samples))
    return [
        replace(sample, teacher=SoftTargets(ids.numpy(), shares.float().numpy() * share))
        for sample, ids, shares in zip(samples, known.ids, known.shares, strict=True)
    ]


def _ask(teacher: SpeechModel, sample: Sample, known: _Answers) -> None:
    tokens, prompt = teacher.token_ids(sample.text, sample.language)
    logits = teacher.text_logits(sample.load(), tokens, prompt, _margin(teacher))
    likeliest = logits.softmax(dim=-1).topk(LIKELIEST, dim=-1)
    right = likeliest.indices[:, 0] == torch.tensor(tokens[prompt:], device=logits.device)
    known.ids.append(likeliest.indices.int().cpu())
    known.shares.append((likeliest.values * right[:, None]).half().cpu())


def _margin(teacher: SpeechModel) -> float:
    """What it has learnt, where it says so; else less than a whole window, which takes longer."""
    return QUANTISED_MARGIN if teacher.margin is None else teacher.margin


def _fingerprint(teacher: SpeechModel, samples: Sequence[Sample]) -> str:
    """What must be equal for a file of answers to be of use."""
    clips = [(round(s.seconds, 3), s.text, s.language) for s in samples]
    asked = json.dumps([model_hash(teacher.network), LIKELIEST, _margin(teacher), clips])
    return hashlib.sha256(asked.encode()).hexdigest()


def _read(path: Path | None, about: str) -> _Answers:
    """Answers to the same questions, or none: a file that is damaged is made again."""
    none = _Answers([], [])
    if path is None or not path.is_file():
        return none
    try:
        tensors, found = read_tensors(path)
        if found.get("asked") != about:
            return none
        lengths = tensors["lengths"].tolist()
        ids, shares = (tensors[part].split(lengths) for part in ("ids", "shares"))
    except (SAMLError, KeyError, RuntimeError):
        return none
    return _Answers([one.clone() for one in ids], [one.clone() for one in shares])
