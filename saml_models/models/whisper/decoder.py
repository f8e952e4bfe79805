"""Whisper's decoder over caches of fixed size, and the encoder that fills one half of them.

A row is a clip, with a window and a prompt of its own: shorter windows are masked, shorter prompts
are padded in front.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saml_models.models.interface import context_of
from saml_models.models.whisper.windows import audio_window
from saml_models.runtime.threads import look

__all__ = ["Decoder", "Window", "encode"]

Window = tuple[Tensor, Tensor]  # log-mel features [b, mel bins, frames], mask [b, frames / 2]
Heard = list[tuple[Tensor, Tensor]]  # of a window, layer by layer: keys and values [b, T, d]
ALIGNED = 8  # caches have a multiple of so many positions, which masked attention likes


def encode(
    model: Any, windows: Iterable[Window], on_encoded: Callable[[Tensor], None] | None = None
) -> list[Heard]:
    """Encode every window; what each decoder layer attends to, window by window.

    Args:
        model: Whisper, plain or with SAML layers, whose context holds the batch's speakers; its
            clip vectors are left there.
        windows: asked for one by one.
        on_encoded: called with each window's encoder output [b, T, d].
    """
    context = context_of(model)
    cross: list[Heard] = []
    clips: list[Tensor] = []
    done = 0
    for features, mask in windows:
        look()
        rows = slice(done, done := done + len(features))
        with audio_window(model, features.shape[-1]), context.narrowed(rows):
            with context.batch(mask.to(model.device)):
                encoder_output = model.model.encoder(features.to(model.device, model.dtype))
                encoded = encoder_output.last_hidden_state
                attentions = (layer.encoder_attn for layer in model.model.decoder.layers)
                cross.append([(a.k_proj(encoded), a.v_proj(encoded)) for a in attentions])
                if on_encoded is not None:
                    on_encoded(encoded)
            if context.clip is not None:
                clips.append(context.clip)
    context.clip = torch.cat(clips) if clips else None
    return cross


class Decoder:
    """The decoder with its caches: each call reads the next tokens and gives the logits."""

    def __init__(
        self, model: Any, heard: list[Heard], positions: int, padding: Tensor | None = None
    ) -> None:
        """Caches for `positions` tokens.

        Args:
            model: whose decoder it is.
            heard: what `encode` gave.
            positions: of tokens, padding included.
            padding: int64 [B], tokens before each row's prompt that are none; None is nowhere.
        """
        decoder = model.model.decoder
        self.embed, self.places = decoder.embed_tokens, decoder.embed_positions.weight
        self.norm, self.head = decoder.layer_norm, model.proj_out
        self.context = context_of(model)
        self.clip, self.speakers = self.context.clip, self.context.speakers
        self.positions = -(-positions // ALIGNED) * ALIGNED
        self.padding = padding
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
            self.layers.append(_Layer(layer, own, self.positions))
            for window in heard:  # held twice for no longer than this
                window[number] = None  # type: ignore[call-overload]

    def __call__(self, tokens: Tensor, at: Tensor, end: int, known: Tensor | None = None) -> Tensor:
        """What comes after tokens [B, n] at the positions `at` [n]: logits [B, V].

        Of the caches the first `end` positions are read: those where `known` [1, 1, 1, end] is
        True; None is all, or for several tokens all that lie before.
        """
        return self._logits(self._run(tokens, at, end, known), -1)

    def begin(self, tokens: Tensor, at: Tensor, end: int, start: int) -> tuple[Tensor, Tensor]:
        """What comes after a prompt [B, n], as a call gives it, and after its token `start`."""
        read = self._run(tokens, at, end, None)
        last = self._logits(read, -1)
        same = start % tokens.shape[1] == tokens.shape[1] - 1
        return last, last if same else self._logits(read, start)

    def _logits(self, read: Tensor, place: int) -> Tensor:
        return self.head(self.norm(read[:, place]))

    def attention(self, tokens: Tensor, heads: Sequence[Sequence[int]]) -> Tensor:
        """Where some heads look in the audio at each of the tokens [B, n] of a whole text.

        Args:
            tokens: int64, prompt and padding included; the caches are overwritten.
            heads: pairs of layer and head.

        Returns:
            Probabilities [B, len(heads), n, T].
        """
        count = tokens.shape[1]
        looked: list[Tensor] = []
        self._run(tokens, torch.arange(count, device=tokens.device), count, None, looked)
        return torch.stack([looked[layer][:, head] for layer, head in heads], dim=1)

    def _run(
        self,
        tokens: Tensor,
        at: Tensor,
        end: int,
        known: Tensor | None,
        looked: list[Tensor] | None = None,
    ) -> Tensor:
        """The last layer's output [B, n, d]."""
        if self.padding is None:
            places = self.places.index_select(0, at)
        else:
            last = len(self.places) - 1  # rows that have ended go on beyond it, unread
            places = F.embedding((at - self.padding[:, None]).clamp(0, last), self.places)
            known = self._known(at, end, known)
        x = self.embed(tokens) + places
        for layer in self.layers:
            x = layer(x, at, end, known, self.mask, looked)
        return x

    def _known(self, at: Tensor, end: int, known: Tensor | None) -> Tensor:
        """Which cached positions each row sees: bool [B, 1, n, end].

        Padding sees itself: a softmax over nothing is NaN, and NaN times zero too.
        """
        assert self.padding is not None
        keys = torch.arange(end, device=at.device)
        seen = (keys >= self.padding[:, None, None, None]) & (keys <= at[:, None])
        seen = seen | (keys == at[:, None])
        return seen if known is None else seen & known

    def alone(self, row: int, times: int) -> Decoder:
        """One for a single row, so many times over: see `take_turn`."""
        one, own = copy(self), slice(row, row + 1)
        one.layers = [layer.alone(own, times) for layer in self.layers]
        one.mask = None if self.mask is None else self.mask[own].clone()
        one.padding = None if self.padding is None else self.padding[own].repeat(times)
        context = self.context
        one.clip = None if context.clip is None else context.clip[own].clone()
        one.speakers = None if context.speakers is None else context.speakers[own].clone()
        return one

    def take_turn(self) -> None:
        """Routers hear from now on the clip and the speaker of the row that `alone` took."""
        self.context.clip, self.context.speakers = self.clip, self.speakers

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch alone."""
        for layer in self.layers:
            layer.keep(rows)
        if self.mask is not None:
            self.mask = self.mask[rows]
        if self.padding is not None:
            self.padding = self.padding[rows]
        self.context.keep(rows)


class _Layer:
    """One of transformers' decoder layers, with the keys and values of text and audio."""

    def __init__(self, layer: Any, heard: Sequence[tuple[Tensor, Tensor]], positions: int) -> None:
        self.layer = layer
        own, cross = layer.self_attn, layer.encoder_attn
        self.audio_keys = _together([keys for keys, _ in heard], cross)
        self.audio_values = _together([values for _, values in heard], cross)
        shape = (len(self.audio_keys), own.num_heads, positions, own.head_dim)
        # Zeros, because a masked position still counts as 0 times what lies there.
        self.keys = self.audio_keys.new_zeros(shape)
        self.values = self.audio_keys.new_zeros(shape)

    def __call__(
        self,
        x: Tensor,
        at: Tensor,
        end: int,
        known: Tensor | None,
        mask: Tensor | None,
        looked: list[Tensor] | None = None,
    ) -> Tensor:
        """x [B, n, d] at positions `at`, mask [B, 1, 1, T] of the audio: [B, n, d].

        Where it looked in the audio, [B, heads, n, T], is appended to `looked`.
        """
        layer = self.layer
        own, cross = layer.self_attn, layer.encoder_attn
        normed = layer.self_attn_layer_norm(x)
        self.keys.index_copy_(2, at, _heads(own.k_proj(normed), own))
        self.values.index_copy_(2, at, _heads(own.v_proj(normed), own))
        keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        causal = known is None and x.shape[1] > 1
        x = x + _attend(own, normed, keys, values, known, causal)
        normed = layer.encoder_attn_layer_norm(x)
        if looked is not None:
            logits = _heads(cross.q_proj(normed), cross) @ self.audio_keys.mT * cross.scaling
            looked.append((logits if mask is None else logits + mask).float().softmax(-1))
        x = x + _attend(cross, normed, self.audio_keys, self.audio_values, mask)
        return x + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(x))))

    def alone(self, row: slice, times: int) -> _Layer:
        one = copy(self)
        one.audio_keys = self.audio_keys[row].repeat(times, 1, 1, 1)
        one.audio_values = self.audio_values[row].repeat(times, 1, 1, 1)
        one.keys = self.keys.new_zeros(times, *self.keys.shape[1:])
        one.values = torch.zeros_like(one.keys)
        return one

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
    context = F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=causal, scale=attention.scaling
    )
    return attention.out_proj(context.transpose(1, 2).flatten(2))
