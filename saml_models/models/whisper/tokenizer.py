"""Whisper's tokeniser, built from the vocabulary of a CTranslate2 folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, models
from transformers import (
    WhisperTokenizer,
)

from saml_kernels.errors import SAMLError, one_line
from saml_kernels.files import read_json, require
from saml_models.text.normalise import english_spelling

_FIRST_MERGE = ("Ġ", "t")  # a space and a t: the most frequent pair of bytes

_FIRST_MULTILINGUAL_VOCABULARY = 51865

_ENGLISH_VOCABULARY = 51864

_END = "<|endoftext|>"


def build_tokenizer(path: Path, vocab_size: int) -> WhisperTokenizer:
    """Whisper's tokenizer out of `tokenizer.json`, with the timestamps older files leave out.

    Raises:
        SAMLError: the file is missing, too large, inconsistent or not Whisper's.
    """
    content = read_json(path)
    vocabulary, merges, added = _checked_vocabulary(content, path)
    special = [text for text, is_special in added if is_special and text not in vocabulary]
    plain = [text for text, is_special in added if not is_special and text not in vocabulary]
    if not any(text.startswith("<|0.") for text in plain):
        missing = vocab_size - len(vocabulary) - len(special) - len(plain)
        plain += [f"<|{0.02 * i:.2f}|>" for i in range(missing)]
    try:
        tokenizer = WhisperTokenizer(
            vocab=vocabulary, merges=merges, extra_special_tokens=special, pad_token=_END
        )
        tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in plain])
        complete_merges(tokenizer)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise SAMLError(
            f"{path}: not Whisper's tokenizer: {one_line(error)}; download it again"
        ) from error
    known = tokenizer.get_vocab()
    expected = [*vocabulary, *special, *plain]
    ordered = all(known.get(text) == i for i, text in enumerate(expected))
    control = ("startoftranscript", "startofprev", "notimestamps", "transcribe", "translate")
    complete = all(f"<|{text}|>" in special for text in control) and _END in vocabulary
    require(
        ordered and complete and len(known) <= vocab_size,
        path,
        f"Whisper's tokenizer with its control tokens and at most {vocab_size} entries",
    )
    tokenizer.english_spelling_normalizer = english_spelling()
    return tokenizer


def complete_merges(tokenizer: WhisperTokenizer) -> None:
    """Put back the first merge, which the published files of multilingual Whispers have lost.

    Without it " the" is three tokens that the model has never seen side by side, and learning such
    a text teaches it to write them.
    """
    merged = "".join(_FIRST_MERGE)
    if merged not in tokenizer.get_vocab() or tokenizer.tokenize(" t") == [merged]:
        return
    backend = tokenizer.backend_tokenizer
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    backend.model = models.BPE(vocab=model["vocab"], merges=[_FIRST_MERGE, *merges])


def _checked_vocabulary(
    content: dict[str, Any], path: Path
) -> tuple[dict[str, int], list[tuple[str, str]], list[tuple[str, bool]]]:
    """Vocabulary in the order of its ids, merges, and added tokens (text, special) in order."""
    model, added = content.get("model"), content.get("added_tokens")
    require(isinstance(model, dict) and isinstance(added, list), path, "a model and added_tokens")
    assert isinstance(model, dict) and isinstance(added, list)
    vocabulary, merges = model.get("vocab"), model.get("merges")
    require(
        isinstance(vocabulary, dict)
        and all(type(i) is int for i in vocabulary.values())
        and sorted(vocabulary.values()) == list(range(len(vocabulary))),
        path,
        "a BPE vocabulary with ids from 0 up",
    )
    assert isinstance(vocabulary, dict)
    require(isinstance(merges, list), path, "a list of merges")
    assert isinstance(merges, list)
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m or ()) for m in merges]
    require(
        all(len(p) == 2 and p[0] in vocabulary and p[1] in vocabulary for p in pairs),
        path,
        "merges of two known tokens each",
    )
    require(
        all(
            isinstance(token, dict)
            and isinstance(token.get("content"), str)
            and type(token.get("id")) is int
            and isinstance(token.get("special", False), bool)
            for token in added
        ),
        path,
        "added_tokens with id, content and special",
    )
    tokens = sorted(added, key=lambda token: token["id"])
    new = [token["id"] for token in tokens if token["content"] not in vocabulary]
    require(
        new == list(range(len(vocabulary), len(vocabulary) + len(new))),
        path,
        "added_tokens with ids that go on where the vocabulary ends",
    )
    return (
        dict(sorted(vocabulary.items(), key=lambda item: item[1])),
        [(left, right) for left, right in pairs],
        [(token["content"], token.get("special", False)) for token in tokens],
    )


def _is_ints(values: object, end: int) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < end for v in values)
