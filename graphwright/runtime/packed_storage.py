"""Packed stores of one generation: pages that a codec packed, and the tail of newest tokens.

See :mod:`graphwright.ir.packed_ops` for the tensors. A step appends to the tail; pages are packed when
the step's tokens are committed, so a rollback never meets a page. Once a page is packed it is the only
copy of its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch

from graphwright.ir.codecs import Codec, PageShape
from graphwright.ir.packed_ops import PackedStore, page_count, tail_slots
from graphwright.runtime.transfers import upload

Tensors = dict[str, torch.Tensor]


@cache
def page_kernel(codec: str, shape: PageShape, device: str) -> Callable[..., None] | None:
    """What packs such pages in one launch on a kind of device; None where the reference does."""
    if device != "cuda":
        return None
    from graphwright.kernels import triton

    if not triton.available()[0] or packing_obstacle(codec, shape) is not None:
        return None
    from graphwright.kernels.triton.encode import encode_pages

    return encode_pages


def packing_obstacle(codec: str, shape: PageShape) -> str | None:
    """Why no kernel packs such pages on GPUs; None if one does."""
    from graphwright.kernels import triton

    reason = triton.installed()
    if reason is not None:
        return reason
    from graphwright.kernels.triton.encode import encode_obstacle

    return encode_obstacle(codec, shape)


@dataclass(frozen=True)
class PackedLayout:
    """What a packed store is made of, without its tensors.

    Attributes:
        name: of the store that it stands for.
        codec: packs its pages.
        shape: of a page.
        first: tokens at the start that stay as they are (F).
        recent: committed tokens that stay in the tail beside the page that is being filled.
        window: tokens that attention sees; 0 means all.
        roles: state name of ``packed``, ``tail``, ``first`` and of every buffer.
        constants: the codec's tables by name.
    """

    name: str
    codec: Codec
    shape: PageShape
    first: int
    recent: int
    window: int
    roles: Mapping[str, str]
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def page(self) -> int:
        """Tokens of a page."""
        return self.shape.tokens

    @property
    def pace(self) -> tuple[int, int, int]:
        """Stores of one pace pack their pages at the same lengths."""
        return self.page, self.first, self.recent

    def pages(self, slots: int) -> int:
        """Pages of a row that may hold ``slots`` tokens."""
        return page_count(slots, self.page, self.first, self.window)

    def tail(self, step_tokens: int) -> int:
        """Slots of the tail for steps of so many tokens."""
        return tail_slots(self.page, self.first, self.recent, step_tokens)

    def packable(self, length: int) -> int:
        """Tokens of a row of ``length`` committed ones that are in pages (the first F included)."""
        pages = (length - self.recent - self.first) // self.page
        return self.first + pages * self.page if pages > 0 else 0

    def room(self, length: int) -> int:
        """Tokens that a row may run before its next page is packed."""
        done = max(self.packable(length), self.first)
        return done + self.page + self.recent - length

    def store(self, stores: Tensors) -> PackedStore:
        """The tensors, to read from."""
        buffers = tuple(stores[self.roles[name]] for name in self.codec.layout(self.shape))
        packed, tail, first = (stores[self.roles[role]] for role in ("packed", "tail", "first"))
        tables = tuple(self.constants.values())
        return PackedStore(packed, tail, first, buffers, tables, self.codec, self.page)

    # --- packing ---------------------------------------------------------------------------------

    def pack(self, stores: Tensors, lengths: Sequence[int], packed: Sequence[int] | None = None) -> None:
        """Pack every page that is complete at these committed lengths.

        Args:
            lengths: ``[B]`` committed tokens.
            packed: ``[B]`` what the tensor ``packed`` holds; without it, it is read from the device.
        """
        store = self.store(stores)
        todo = []
        held = store.packed.tolist() if packed is None else packed
        for row, (length, done) in enumerate(zip(lengths, held, strict=True)):
            target = self.packable(length)
            if target <= done:
                continue
            if not done and self.first:
                head = torch.arange(self.first, device=store.tail.device)
                store.first[row] = store.tail[row][:, head % store.tail.shape[2]]
            todo += [(row, start) for start in range(max(done, self.first), target, self.page)]
        if not todo:
            return
        self._encode(store, todo)
        for row, start in todo:
            store.packed[row] = start + self.page

    def _encode(self, store: PackedStore, todo: Sequence[tuple[int, int]]) -> None:
        """Pages of (row, first token), encoded together."""
        device = store.tail.device
        rows = upload([row for row, _ in todo], device)
        starts = upload([start for _, start in todo], device)
        kernel = page_kernel(str(self.codec), self.shape, device.type)
        if kernel is not None:
            tensors = [store.packed, store.tail, store.first, *store.buffers]
            kernel(tensors, store.constants, str(self.codec), self.page, rows, starts)
            return
        slots = (starts[:, None] + torch.arange(self.page, device=device)) % store.tail.shape[2]
        pages = store.tail.transpose(1, 2)[rows[:, None], slots].transpose(1, 2)  # [n, G, P, D]
        encoded = self.codec.encode(pages, self.constants)
        for buffer, made in zip(store.buffers, encoded.values(), strict=True):
            buffer[rows, ((starts - self.first) // self.page) % buffer.shape[1]] = made

    def unpack(self, stores: Tensors, lengths: Sequence[int]) -> None:
        """Bring back to the tail what rows cut to these lengths have of a page that is no longer full.

        What comes back is what the codec kept of it.
        """
        store = self.store(stores)
        for row, (length, done) in enumerate(zip(lengths, store.packed.tolist(), strict=True)):
            if length >= done:
                continue
            pages = (length - self.first) // self.page
            kept = self.first + pages * self.page if pages > 0 else 0
            numbers = torch.arange(kept, length, device=store.tail.device)
            tokens = store.tokens(numbers.expand(store.tail.shape[0], -1))[row]
            store.tail[row][:, numbers % store.tail.shape[2]] = tokens
            store.packed[row] = kept

    def resize_tail(
        self,
        stores: Tensors,
        lengths: Sequence[int],
        step_tokens: int,
        *,
        packed: Sequence[int],
        into: torch.Tensor | None = None,
    ) -> None:
        """Give the tail room for steps of so many tokens; committed tokens move.

        Args:
            lengths: ``[B]`` committed tokens.
            packed: ``[B]`` those that are in pages.
            into: the tail to move to; without it, a fresh one of zeros.
        """
        tail = stores[self.roles["tail"]]
        size = self.tail(step_tokens)
        if tail.shape[2] == size:
            return
        fresh = tail.new_zeros((*tail.shape[:2], size, tail.shape[3])) if into is None else into
        for row, (length, start) in enumerate(zip(lengths, packed, strict=True)):
            numbers = torch.arange(start, length, device=tail.device)
            fresh[row][:, numbers % size] = tail[row][:, numbers % tail.shape[2]]
        stores[self.roles["tail"]] = fresh
