"""Cost rules of packed stores: reading them, attending over them, and packing what was appended.

A kernel decodes as it attends: it reads the packed bytes once, and a few operations for each value
(:data:`KERNEL_OPS`) come on top of attention's; rotations turn the query and the result, not the cache.
How many launches that takes, and whether pages are packed by a kernel, depends on the family of kernels
(:class:`graphwright.cost_model.streaming.StoreKernels`).
The reference decodes tile by tile instead: its arithmetic is counted by running it on one page
(:mod:`graphwright.cost_model.codec_work`), and every tile of every row starts its kernels anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch
from torch.fx.node import Node

from graphwright.cost_model.codec_work import Work, codec_work
from graphwright.cost_model.cost import ACTIVATIONS, CACHE, B, Cost, Expr, T
from graphwright.cost_model.eviction_costs import evicting
from graphwright.cost_model.listed_pages import Listing
from graphwright.cost_model.op_costs import (
    append,
    attend,
    attention_arithmetic,
    cost_of,
    read_tokens,
    slot_bytes,
)
from graphwright.cost_model.shapes import Call
from graphwright.cost_model.streaming import deciding
from graphwright.ir.codecs import PageShape, parse_codec
from graphwright.ir.graph import argument
from graphwright.ir.packed_ops import TILE, page_shape

#: Float32 operations of a kernel for each value that it decodes: to a number, times a scale, plus an offset.
KERNEL_OPS = 3
#: What the reference takes beside its codec: kernels for a row's tile of one store and for a tile of an
#: attention, and bytes that they hand to one another for each value, float32 copies of tiles mostly.
#: Counted by running it; ``tests/cost_model/test_packed_costs.py`` counts again.
READ_KERNELS, ATTEND_KERNELS, COPIED = 34, 34, 42


@dataclass(frozen=True)
class _Store:
    """A packed store as rules see it.

    Attributes:
        tail, first: fake tensors.
        window: tokens that attention sees; 0 means all.
        recent: tokens that stay in the tail beside the page that is being filled.
        listing: the lists of pages that it is read by; None where everything is read.
    """

    tail: torch.Tensor
    first: torch.Tensor
    codec: str
    page: int
    window: int
    recent: int
    listing: Listing | None = None

    @classmethod
    def of(cls, store: Sequence[Node], codec: str, page: int, listing: Listing | None = None) -> _Store:
        """From an op's arguments; the placeholders say what tensors do not."""
        _, tail, first = store[:3]
        recent = tail.meta.get("store", {}).get("recent", 0)
        window = tail.meta.get("window", 0)
        return cls(tail.meta["val"], first.meta["val"], codec, page, window, recent, listing)

    @property
    def shape(self) -> PageShape:
        return page_shape(self.tail, self.page)

    @property
    def token_values(self) -> int:
        """Numbers of one token."""
        return self.shape.groups * self.shape.features

    @property
    def seen(self) -> Expr:
        """Tokens of one sequence that a step reads."""
        return read_tokens(self.window, self.listing)

    @property
    def page_bytes(self) -> Expr:
        """Packed bytes of one token."""
        return sympy.Rational(parse_codec(self.codec).page_bytes(self.shape), self.page)

    def bytes_read(self) -> Expr:
        """Of one sequence: pages, and what is in none of them.

        The tail holds half a page on average, besides the recent tokens and the step's own. What lists
        leave out is packed.
        """
        first = 0 if self.window else int(self.first.shape[2])
        unpacked = sympy.Min(read_tokens(self.window), T + first + self.recent + sympy.Rational(self.page, 2))
        full = self.token_values * self.tail.dtype.itemsize
        return unpacked * full + (self.seen - unpacked) * self.page_bytes

    def turning(self) -> int:
        """Operations of turning one vector by the codec's rotations, as matrices."""
        parts = parse_codec(self.codec).transforms
        return sum(2 * self.shape.features**2 for p in parts if p.orthogonal and p.name != "reorder")

    def reading(self, in_kernel: bool) -> Cost:
        """Reading and decoding all of it."""
        values = B * self.seen * self.token_values
        read = Cost(read={CACHE: B * self.bytes_read()})
        if in_kernel:
            return read + Cost({"float32": KERNEL_OPS * values})
        decoding = codec_work(self.codec, self.shape)[1]
        launches = B * tiles(self.window) * (READ_KERNELS + decoding.kernels)
        return read + _work(decoding, values) + Cost(read={ACTIVATIONS: COPIED * values}, launches=launches)


def _work(work: Work, values: Expr) -> Cost:
    """Of so many values, without launches."""
    flops, nbytes = (sympy.Rational(round(1000 * x), 1000) for x in (work.flops, work.nbytes))
    return Cost({"float32": flops * values}, {ACTIVATIONS: nbytes * values})


def tiles(window: int = 0) -> Expr:
    """Tiles of slots that a step goes through."""
    return sympy.ceiling(read_tokens(window) / TILE)


def by_tile(cost: Cost, runs: int, launches: Expr) -> Cost:
    """What lies between packed stores and attention, run by so many attentions, each tile for itself."""
    return runs * cost + Cost(launches=runs * (launches * tiles() - cost.launches))


# --- rules ---------------------------------------------------------------------------------------


@cost_of("cache_read")
def _cache_read(call: Call) -> Cost:
    """Nothing decoded is written to memory: it stays in the kernel, or is handed on a tile at a time."""
    store = _Store.of(call.arg("store"), call.arg("codec"), call.arg("page"), call.listing)
    return store.reading(call.in_kernel)


@cost_of("cache_attention")
def _cache_attention(call: Call) -> Cost:
    """Over stores as they are, or over what is streamed, which its reads have been charged for."""
    kernels = call.shapes.streaming.kernels
    if not call.streams:
        combining = kernels.attention_launches - 1 if kernels else 0
        return attend(call, "keys", "values") + Cost(launches=combining)
    cost = attention_arithmetic(call, call.shape("values")[3])
    if not call.in_kernel:
        return cost + Cost(launches=tiles(call.arg("window")) * ATTEND_KERNELS - 1)
    reads = [call.arg(name) for name in ("keys", "values")]
    stores = [_Store.of(*(argument(read, name) for name in ("store", "codec", "page"))) for read in reads]
    return cost + _around_kernel(call, stores)


@cost_of("packed_attention")
def _packed_attention(call: Call) -> Cost:
    """``cache_read`` of both stores and attention, as lowering makes it of the three."""
    kernels = call.shapes.streaming.kernels
    in_kernel = kernels is not None and kernels.supports(**deciding(call.node)) is None
    stores = [
        _Store.of(call.arg(f"{name}s"), call.arg(f"{name}_codec"), call.arg(f"{name}_page"), call.listing)
        for name in ("key", "value")
    ]
    reading = Cost.sum(store.reading(in_kernel) for store in stores)
    cost = reading + attention_arithmetic(call, sympy.Integer(stores[1].shape.features))
    if in_kernel:
        return cost + _around_kernel(call, stores)
    return cost + Cost(launches=tiles(call.arg("window")) * ATTEND_KERNELS - 1)


def _around_kernel(call: Call, stores: Sequence[_Store]) -> Cost:
    """Rotations of the queries, and of the results instead of the values; launches beyond the first."""
    kernels = call.shapes.streaming.kernels
    assert kernels is not None
    heads = call.shape("q")[1]
    launches = kernels.attention_launches - 1
    if any(part.orthogonal for part in parse_codec(stores[0].codec).transforms):
        launches += kernels.turning_launches
    return Cost({"float32": B * T * heads * sum(store.turning() for store in stores)}, launches=launches)


@cost_of("cache_append")
def _cache_append(call: Call) -> Cost:
    """Writing T new tokens; of a packed store, into the tail, and packing each page once it is full.

    Pages are packed by a kernel in one launch, or by the reference; either in one call for all that are
    complete after a step.
    """
    full = slot_bytes(call, call.val("store"))
    cost = append(call, ("new",), full)
    about = call.arg("store").meta.get("store")
    if about is None or "codec" not in about:
        return cost + evicting(call)
    shape = page_shape(call.val("store"), about["page"])
    encoding = codec_work(about["codec"], shape)[0]
    kernels = call.shapes.streaming.kernels
    if kernels is not None and kernels.packs(about["codec"], shape):
        encoding = Work(encoding.flops, 0.0, 1)  # what passes between its steps stays in registers
    page_bytes = sympy.Rational(parse_codec(about["codec"]).page_bytes(shape), about["page"])
    pages = Cost(read={CACHE: B * T * full}, written={CACHE: B * T * page_bytes})
    calls = sympy.Min(1, T / about["page"])
    values = B * T * shape.groups * shape.features
    return cost + pages + _work(encoding, values) + Cost(launches=calls * encoding.kernels)
