"""Greedy decoding of Whisper, token by token, with nothing around the layers themselves.

The same words as transformers' `generate` gives, without its Python per token: caches of fixed
size, logits of the last position alone, clips that have ended dropped from the batch, and each clip
encoded by itself. Models whose routers hook into transformers' own attention blocks
(router="shared") stay with `generate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from saml_kernels.routing import Routing
from saml_models.runtime.threads import look
from saml_models.window import audio_window

__all__ = ["can_decode", "greedy"]

Window = tuple[Tensor, Tensor]  # log-mel features [b, mel bins, frames], mask [b, frames / 2]


def can_decode(model: Any) -> bool:
    """Whether `greedy` can stand in for this model's `generate`."""
    return not hasattr(model, "saml_routers")


@torch.inference_mode()
def greedy(
    model: Any, windows: Iterable[Window], limits: Sequence[int], language: str | None = None
) -> list[list[int]]:
    """The likeliest token at each step, without timestamps.

    Args:
        model: Whisper in evaluation mode, plain or with SAML layers.
        windows: the clips in order, those side by side that share a window's length. The mask is
            True where there is audio. Asked for one by one, as the encoder gets to them.
        limits: tokens of each clip's text at most; with the prompt no more than 448.
        language: code, of a multilingual model; None detects it, clip by clip.

    Returns:
        Token ids of each clip, without the prompt and the end.
    """
    tokens, decoder = _listen(model, windows, language, max(limits))
    generation, device = model.generation_config, tokens.device
    never = _ids(generation.suppress_tokens, device)
    not_first = _ids(generation.begin_suppress_tokens, device)
    ends = set(_ids(generation.eos_token_id, "cpu").tolist())
    texts: list[list[int]] = [[] for _ in limits]
    rows = list(range(len(limits)))  # which clip each row of the batch is
    going = set(rows)
    while going:
        look()
        first = decoder.done == 0
        logits = decoder(tokens)
        logits.index_fill_(1, never, -torch.inf)
        if first:
            logits.index_fill_(1, not_first, -torch.inf)
        best = logits.argmax(-1)
        tokens = best.unsqueeze(1)
        for clip, token in zip(rows, best.tolist(), strict=True):
            if clip in going and token not in ends:
                texts[clip].append(token)
            if token in ends or len(texts[clip]) >= limits[clip]:
                going.discard(clip)
        if 0 < 2 * len(going) <= len(rows):  # copying the caches is soon paid for
            keep = [row for row, clip in enumerate(rows) if clip in going]
            rows = [rows[row] for row in keep]
            tokens = tokens[keep]
            decoder.keep(torch.tensor(keep, device=device))
    return texts


def _listen(
    model: Any, windows: Iterable[Window], language: str | None, limit: int
) -> tuple[Tensor, _Decoder]:
    """Encode every window: the prompt [B, n], and a decoder that knows what was heard."""
    routing = getattr(model, "saml_routing", None) or Routing()
    prompts: list[Tensor] = []
    heard: list[list[tuple[Tensor, Tensor]]] = []  # window by window, layer by layer
    clips: list[Tensor] = []
    done = 0
    for features, mask in windows:
        look()
        rows = slice(done, done := done + len(features))
        with audio_window(model, features.shape[-1]), routing.narrowed(rows):
            routing.mask = mask.to(model.device)
            try:
                found = model.model.encoder(features.to(model.device, model.dtype))
                encoded = found.last_hidden_state
                attentions = (layer.encoder_attn for layer in model.model.decoder.layers)
                heard.append([(a.k_proj(encoded), a.v_proj(encoded)) for a in attentions])
                prompts.append(_prompt(model, encoded, language))
            finally:
                routing.mask = None
            if routing.clip is not None:
                clips.append(routing.clip)
    routing.clip = torch.cat(clips) if clips else None
    prompt = torch.cat(prompts)
    return prompt, _Decoder(model, heard, prompt.shape[1] + limit)


def _prompt(model: Any, encoded: Tensor, language: str | None) -> Tensor:
    """What the text begins with: [B, n], n = 2, or with language and task 4."""
    generation = model.generation_config
    ids: list[Any] = [generation.decoder_start_token_id]
    if getattr(generation, "is_multilingual", False):
        if language is None:
            ids.append(model.detect_language(encoder_outputs=BaseModelOutput(encoded)))
        else:
            ids.append(generation.lang_to_id[f"<|{language}|>"])
        ids.append(generation.task_to_id["transcribe"])
    if hasattr(generation, "no_timestamps_token_id"):
        ids.append(generation.no_timestamps_token_id)
    prompt = torch.empty(len(encoded), len(ids), dtype=torch.int64, device=encoded.device)
    for column, value in enumerate(ids):
        prompt[:, column] = value
    return prompt


def _ids(values: int | list[int] | None, device: torch.device | str) -> Tensor:
    listed = [values] if isinstance(values, int) else values or []
    return torch.tensor(listed, dtype=torch.int64, device=device)


class _Decoder:
    """The decoder with its caches: each call reads the next tokens and gives the logits."""

    def __init__(
        self, model: Any, heard: list[list[tuple[Tensor, Tensor]]], positions: int
    ) -> None:
        """Caches for `positions` tokens; keys and values [b, T, d] of each window and layer."""
        decoder = model.model.decoder
        self.embed, self.places = decoder.embed_tokens, decoder.embed_positions.weight
        self.norm, self.head = decoder.layer_norm, model.proj_out
        self.routing = getattr(model, "saml_routing", None) or Routing()
        self.done = 0
        keys = [window[0][0] for window in heard]
        lengths = torch.tensor([k.shape[1] for k in keys for _ in range(len(k))])
        self.mask: Tensor | None = None
        if len(set(lengths.tolist())) > 1:
            beyond = torch.arange(int(lengths.max())) >= lengths[:, None, None, None]
            wide = torch.zeros(beyond.shape, dtype=keys[0].dtype)
            self.mask = wide.masked_fill_(beyond, -torch.inf).to(keys[0].device)
        self.layers = []
        for number, layer in enumerate(decoder.layers):
            own = [window[number] for window in heard]
            self.layers.append(_Layer(layer, own, positions))
            for window in heard:  # held twice for no longer than this
                window[number] = None  # type: ignore[call-overload]

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens [B, n] -> logits [B, V] of what comes after the last."""
        end = self.done + tokens.shape[1]
        x = self.embed(tokens) + self.places[self.done : end]
        for layer in self.layers:
            x = layer(x, self.done, self.mask)
        self.done = end
        return self.head(self.norm(x[:, -1]))

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch alone."""
        for layer in self.layers:
            layer.keep(rows)
        if self.mask is not None:
            self.mask = self.mask[rows]
        self.routing.keep(rows)


class _Layer:
    """One of transformers' decoder layers, with the keys and values of text and audio."""

    def __init__(self, layer: Any, heard: Sequence[tuple[Tensor, Tensor]], positions: int) -> None:
        self.layer = layer
        own, cross = layer.self_attn, layer.encoder_attn
        self.audio_keys = _together([keys for keys, _ in heard], cross)
        self.audio_values = _together([values for _, values in heard], cross)
        shape = (len(self.audio_keys), own.num_heads, positions, own.head_dim)
        self.keys = self.audio_keys.new_empty(shape)
        self.values = self.audio_keys.new_empty(shape)

    def __call__(self, x: Tensor, done: int, mask: Tensor | None) -> Tensor:
        """x [B, n, d] after `done` earlier tokens, mask [B, 1, 1, T] of the audio: [B, n, d]."""
        layer, end = self.layer, done + x.shape[1]
        own, cross = layer.self_attn, layer.encoder_attn
        normed = layer.self_attn_layer_norm(x)
        self.keys[:, :, done:end] = _heads(own.k_proj(normed), own)
        self.values[:, :, done:end] = _heads(own.v_proj(normed), own)
        keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        x = x + _attend(own, normed, keys, values, causal=done == 0)
        normed = layer.encoder_attn_layer_norm(x)
        x = x + _attend(cross, normed, self.audio_keys, self.audio_values, mask)
        return x + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(x))))

    def keep(self, rows: Tensor) -> None:
        for name in ("keys", "values", "audio_keys", "audio_values"):
            setattr(self, name, getattr(self, name)[rows])


def _heads(x: Tensor, attention: Any) -> Tensor:
    """[B, n, d] -> [B, heads, n, d / heads]."""
    return x.view(*x.shape[:2], attention.num_heads, attention.head_dim).transpose(1, 2)


def _together(parts: Sequence[Tensor], attention: Any) -> Tensor:
    """Keys or values [b, T, d] of several windows -> [B, heads, longest T, d / heads], zero after.

    Contiguous, because every later step reads all of it.
    """
    longest = max(part.shape[1] for part in parts)
    shape = (sum(map(len, parts)), attention.num_heads, longest, attention.head_dim)
    whole, row = parts[0].new_zeros(shape), 0
    for part in parts:
        whole[row : row + len(part), :, : part.shape[1]] = _heads(part, attention)
        row += len(part)
    return whole


def _attend(
    attention: Any,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    query = _heads(attention.q_proj(x), attention)
    found = F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=causal, scale=attention.scaling
    )
    return attention.out_proj(found.transpose(1, 2).flatten(2))
