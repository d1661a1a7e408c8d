"""Semantic ops over a packed cache: reading it, and attending over it tile by tile.

A *packed store* keeps the tokens of each row in three places, given as the tensors
``[packed, tail, first, *buffers]``:

- ``packed [B]`` int64: how many of the row's tokens have left the tail; 0, or F + k * P.
- ``tail [B, G, R, D]``: the newest tokens as they were computed, token p in slot ``p % R``.
- ``first [B, G, F, D]``: the first F tokens as they were computed (attention sinks); F may be 0.
- ``buffers [B, N, ...]``: N pages of P tokens, packed by a codec. Token p is in page
  ``((p - F) // P) % N``; with a sliding window the pages are a ring.

Tokens are appended to the tail by ``cache_append`` and packed between steps (``runtime/storage.py``),
once they are committed: rolling a step back never touches a page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from graphwright.ir.codecs import Codec, PageShape, parse_codec
from graphwright.ir.ops import cache_visibility, semantic_op
from graphwright.ir.page_lists import listed_tokens

#: Slots that the reference decodes at a time: what a step holds decompressed of one layer.
TILE = 1024
# What the reference adds up in: after rounding to the model's dtype, a row's result is the same in
# a step of one token and in a longer one, although the library's products differ in their last bits.
_SUMS = torch.float64


@dataclass(frozen=True)
class PackedStore:
    """The tensors of a packed store with the codec that reads them. See the module for shapes."""

    packed: torch.Tensor
    tail: torch.Tensor
    first: torch.Tensor
    buffers: tuple[torch.Tensor, ...]
    constants: tuple[torch.Tensor, ...]
    codec: Codec
    page: int

    @classmethod
    def of(
        cls, store: Sequence[torch.Tensor], constants: Sequence[torch.Tensor], codec: str, page: int
    ) -> PackedStore:
        """From an op's arguments."""
        packed, tail, first, *buffers = store
        return cls(packed, tail, first, tuple(buffers), tuple(constants), parse_codec(codec), page)

    @property
    def shape(self) -> PageShape:
        """Of one page."""
        return page_shape(self.tail, self.page)

    def decode(self, rows: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        """Pages ``[n]`` (places in the ring) of rows ``[n]`` as ``[n, P, G, D]`` float32."""
        names = self.codec.layout(self.shape)
        chosen = {name: b[rows, pages] for name, b in zip(names, self.buffers, strict=True)}
        return self.codec.decode(chosen, self.named_constants(), self.shape).transpose(1, 2)

    def named_constants(self) -> dict[str, torch.Tensor]:
        """The codec's tables by name."""
        return dict(zip(self.codec.constant_names(self.shape), self.constants, strict=True))

    def tokens(self, numbers: torch.Tensor) -> torch.Tensor:
        """Tokens ``[B, n]`` of each row as ``[B, G, n, D]`` in the tail's dtype; zeros for numbers < 0."""
        first, tail = self.first.shape[2], self.tail.shape[2]
        done = self.packed[:, None]
        row = torch.arange(numbers.shape[0], device=numbers.device)[:, None].expand_as(numbers)
        out = self.tail.transpose(1, 2)[row, numbers.clamp(min=0) % tail]  # [B, n, G, D]
        if first:
            early = (numbers >= 0) & (numbers < first) & (done > 0)
            out[early] = self.first.transpose(1, 2)[row[early], numbers[early]]
        packed = (numbers >= first) & (numbers < done)
        if bool(packed.any()):
            at, rows = numbers[packed] - first, row[packed]
            count = self.buffers[0].shape[1]
            place = rows * count + (at // self.page) % count
            needed, index = torch.unique(place, return_inverse=True)
            decoded = self.decode(needed // count, needed % count)
            out[packed] = decoded[index, at % self.page].to(out.dtype)
        out.masked_fill_((numbers < 0)[:, :, None, None], 0)
        return out.transpose(1, 2)


def page_shape(tail: torch.Tensor, page: int) -> PageShape:
    """The shape of pages of ``page`` tokens like those in a tail ``[B, G, R, D]``."""
    return PageShape(int(tail.shape[1]), page, int(tail.shape[3]))


def page_count(slots: int, page: int, first: int, window: int) -> int:
    """Pages that a row needs for ``slots`` tokens.

    A ring needs one more than fill its slots, and none of its slots stays the first tokens' own.
    """
    return -(-slots // page) + 1 if window else -(-max(slots - first, 0) // page)


def tail_slots(page: int, first: int, recent: int, step_tokens: int) -> int:
    """Tokens that wait in the tail at most: until the first page is full, and the step's own."""
    return first + page + recent + step_tokens


def slot_numbers(lengths: torch.Tensor, counts: torch.Tensor, slots: int) -> torch.Tensor:
    """The token that each slot of a ring of ``slots`` holds after the append, ``[B, S]``; < 0: none."""
    last = (lengths + counts)[:, None] - 1
    slot = torch.arange(slots, device=lengths.device)[None, :]
    return last - torch.remainder(last - slot, slots)


def read_tile(
    store: PackedStore, lengths: torch.Tensor, counts: torch.Tensor, slots: int, start: int, stop: int
) -> torch.Tensor:
    """Slots ``start:stop`` of a packed store seen as ``[B, G, slots, D]``."""
    return store.tokens(slot_numbers(lengths, counts, slots)[:, start:stop])


def _read_fake(store, constants, slots, lengths, counts, codec, page):  # type: ignore[no-untyped-def]
    tail = store[1]
    return tail.new_empty((tail.shape[0], tail.shape[1], slots.shape[2], tail.shape[3]))


@semantic_op(
    "cache_read(Tensor[] store, Tensor[] constants, Tensor slots, Tensor lengths, Tensor counts, "
    "str codec, int page) -> Tensor",
    fake=_read_fake,
)
def cache_read(
    store: Sequence[torch.Tensor],
    constants: Sequence[torch.Tensor],
    slots: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    codec: str,
    page: int,
) -> torch.Tensor:
    """A packed store as the full-precision store it stands for, ``[B, G, S, D]``.

    Lowering never runs this as it is: what reads it is run tile by tile.

    Args:
        store: see the module.
        constants: the codec's tables.
        slots: ``[B, 1, S, 0]``, carries S: token p is in slot ``p % S`` of the result.
        lengths, counts: ``[B]`` int64, tokens before the step and of the step, already in the tail.
        codec: as text.
        page: P.
    """
    packed = PackedStore.of(store, constants, codec, page)
    return read_tile(packed, lengths, counts, slots.shape[2], 0, slots.shape[2])


Tile = tuple[torch.Tensor, torch.Tensor]


def stream_attention(
    q: torch.Tensor,
    tile: Callable[[int, int], Tile],
    value_width: int,
    slots: int,
    positions: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    tree: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    width: int = TILE,
    listed: torch.Tensor | None = None,
) -> torch.Tensor:
    """``cache_attention`` over keys and values that exist one tile at a time.

    Args:
        q: ``[B, H, T, D]``.
        tile: slots ``start:stop`` as keys ``[B, G, n, D]`` and values ``[B, G, n, E]``.
        value_width: E.
        slots: S; the rest as in ``cache_attention``.
        width: slots of a tile.
        listed: ``[B, T, G, S]`` bool, which of the visible tokens each query reads; None: all.

    Returns:
        ``[B, T, H, E]``.
    """
    batch, _, tokens, _ = q.shape
    used = min(slots, int((lengths + counts).max()))
    visible = cache_visibility(positions, lengths, counts, tree, slots, window)[:, :, None]
    if listed is not None:
        visible = visible & listed
    softmax = _RunningSoftmax(q, value_width, sinks)
    for start in range(0, used, width):
        seen = visible[..., start : min(start + width, used)]
        if not bool(seen.any()):
            continue
        keys, values = tile(start, start + seen.shape[3])
        grouped = q.to(_SUMS).view(batch, keys.shape[1], -1, tokens, q.shape[3])
        scores = torch.einsum("bghtd,bgsd->bghts", grouped, keys.to(_SUMS)) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        softmax.add(scores.masked_fill(~seen.transpose(1, 2)[:, :, None], float("-inf")), values.to(_SUMS))
    valid = torch.arange(tokens, device=q.device)[None, :] < counts[:, None]
    out = softmax.result() * valid[:, None, :, None]
    return out.transpose(1, 2).to(q.dtype).contiguous()


class _RunningSoftmax:
    """Softmax-weighted values over keys that come in tiles.

    Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax".
    """

    def __init__(self, q: torch.Tensor, value_width: int, sinks: torch.Tensor | None) -> None:
        batch, heads, tokens, _ = q.shape
        self._top = q.new_full((batch, heads, tokens), float("-inf"), dtype=_SUMS)
        if sinks is not None:
            self._top = self._top.maximum(sinks.to(_SUMS).view(1, heads, 1))
        self._total = torch.where(torch.isinf(self._top), 0.0, 1.0).to(_SUMS)
        self._out = q.new_zeros((batch, heads, tokens, value_width), dtype=_SUMS)

    def add(self, scores: torch.Tensor, values: torch.Tensor) -> None:
        """Scores ``[B, G, H/G, T, n]``, -inf where a key is not seen, with values ``[B, G, n, E]``."""
        top = self._top.maximum(scores.amax(-1).flatten(1, 2))
        anchor = torch.where(top == float("-inf"), 0.0, top)  # a query that has seen nothing yet
        weights = torch.exp(scores - anchor.view(scores.shape[:-1])[..., None])
        decay = torch.exp(self._top - anchor)
        self._total = self._total * decay + weights.sum(-1).flatten(1, 2)
        part = torch.einsum("bghts,bgse->bghte", weights, values).flatten(1, 2)
        self._out = self._out * decay[..., None] + part
        self._top = top

    def result(self) -> torch.Tensor:
        """``[B, H, T, E]``; zeros for a query that saw nothing."""
        return self._out / torch.where(self._total == 0, 1.0, self._total)[..., None]


def _packed_fake(q, keys, key_constants, values, *rest, **kw):  # type: ignore[no-untyped-def]
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], values[1].shape[3]))


@semantic_op(
    "packed_attention(Tensor q, Tensor[] keys, Tensor[] key_constants, Tensor[] values, "
    "Tensor[] value_constants, Tensor slots, Tensor positions, Tensor lengths, Tensor counts, Tensor tree, "
    "str key_codec, int key_page, str value_codec, int value_page, float scale, int window=0, "
    "float softcap=0.0, Tensor? sinks=None, Tensor? pages=None, Tensor? chosen=None, int page=0, "
    "int first=0) -> Tensor",
    fake=_packed_fake,
)
def packed_attention(
    q: torch.Tensor,
    keys: Sequence[torch.Tensor],
    key_constants: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    value_constants: Sequence[torch.Tensor],
    slots: torch.Tensor,
    positions: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    tree: torch.Tensor,
    key_codec: str,
    key_page: int,
    value_codec: str,
    value_page: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    pages: torch.Tensor | None = None,
    chosen: torch.Tensor | None = None,
    page: int = 0,
    first: int = 0,
) -> torch.Tensor:
    """``cache_attention`` over two packed stores, decoded a tile at a time.

    Equal to ``cache_attention`` of ``cache_read`` of each. Args as in both; returns ``[B, T, H, E]``.
    """
    stores = [
        PackedStore.of(keys, key_constants, key_codec, key_page),
        PackedStore.of(values, value_constants, value_codec, value_page),
    ]
    size = slots.shape[2]

    def tile(start: int, stop: int) -> Tile:
        k, v = (read_tile(store, lengths, counts, size, start, stop) for store in stores)
        return k, v

    listed = None
    if pages is not None and chosen is not None:
        listed = listed_tokens(pages, chosen, page, first, lengths, size)
    step = (positions, lengths, counts, tree, scale, window, softcap, sinks)
    return stream_attention(q, tile, values[1].shape[3], size, *step, listed=listed)
