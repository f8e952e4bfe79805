"""A transcript as the tokens that a decoder learns."""

from __future__ import annotations

import math
import re
from typing import Any

from saml_kernels.errors import SAMLError

__all__ = ["check_target", "plain_tokens", "target_limit"]


def plain_tokens(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, in which a control token that somebody typed is the text it looks like.

    Args:
        tokenizer: of transformers.
        text: `hello <|endoftext|> there` has no end in it; times such as `<|0.00|>` count too,
            which transformers' own `split_special_tokens` would leave as they are.
    """
    typed = [token for token in tokenizer.get_added_vocab() if len(token) > 1 and token in text]
    # Cut between two characters of each, so that no piece holds a whole one.
    inside = "|".join(f"(?<={re.escape(t[0])})(?={re.escape(t[1:])})" for t in typed)
    pieces = re.split(inside, text) if typed else [text]
    return [
        i
        for piece in pieces
        for i in tokenizer(piece, add_special_tokens=False, split_special_tokens=True).input_ids
    ]


def target_limit(model: Any) -> float:
    """Tokens that a model's decoder takes, prompt and end among them; infinity if there is none."""
    config: Any = getattr(model, "config", None)
    config = getattr(config, "decoder_config", config)
    most = getattr(config, "max_target_positions", None)
    return most or getattr(config, "max_position_embeddings", None) or math.inf


def check_target(model: Any, name: str, tokens: list[int]) -> None:
    """Refuse a target longer than the decoder: cut, it would lose its end.

    Args:
        model: whose decoder learns it; one without a configuration has no limit.
        name: of the clip.
        tokens: prompt, text and end.

    Raises:
        SAMLError: with the clip and the number of its tokens.
    """
    most = target_limit(model)
    # The last token is only predicted, but the model's own decoding counts it too.
    if len(tokens) > most:
        raise SAMLError(
            f"{name}: its text is {len(tokens)} tokens long, and the decoder takes {most}; "
            "check the text, or cut clip and text into shorter ones"
        )
