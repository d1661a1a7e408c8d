"""Caches of random content for the GPU benchmark: dense, packed by a codec, and read by a list of pages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from graphwright.ir.codecs import PageShape, parse_codec
from graphwright.kernels.triton.attention import Attention, Pages, Side, Step
from graphwright.kernels.triton.choose_pages import choose_pages
from graphwright.kernels.triton.listed_attention import ListedAttention, Lists
from graphwright.kernels.triton.score_pages import score_pages

_PAGE = 64
#: Slots of a packed store's tail: a page and a step.
_TAIL = 128


@dataclass(frozen=True)
class Heads:
    """Sizes of one attention: query heads, key/value heads, and features of a head."""

    queries: int = 32
    groups: int = 8
    width: int = 128


@dataclass(frozen=True)
class Place:
    """Where tensors are made: device (``meta`` to record launches) and dtype of queries and slots."""

    device: torch.device
    dtype: torch.dtype

    def normal(self, *size: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Random numbers, made in place: a large cache is never held twice."""
        return torch.empty(size, dtype=dtype or self.dtype, device=self.device).normal_()

    def longs(self, *size: int, fill: int = 0) -> torch.Tensor:
        """One integer everywhere."""
        return torch.full(size, fill, dtype=torch.int64, device=self.device)


def step_at(place: Place, batch: int, length: int, width: int) -> Step:
    """A step of one token after ``length`` others."""
    return Step(
        place.longs(batch, 1, fill=length),
        place.longs(batch, fill=length),
        place.longs(batch, fill=1),
        place.longs(batch, 0),
        width**-0.5,
    )


@dataclass
class Dense:
    """One token over a dense cache of ``context`` tokens, its own included."""

    q: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    step: Step

    @classmethod
    def make(cls, place: Place, heads: Heads, batch: int, context: int) -> Dense:
        """Of random content."""
        keys, values = (place.normal(batch, heads.groups, context, heads.width) for _ in range(2))
        step = step_at(place, batch, context - 1, heads.width)
        return cls(place.normal(batch, heads.queries, 1, heads.width), keys, values, step)

    @property
    def nbytes(self) -> int:
        """What a step must read."""
        return self.keys.nbytes + self.values.nbytes

    def run(self) -> torch.Tensor:
        """Our attention, ``[B, 1, H, E]``."""
        return Attention(self.q, self.keys, self.values, self.step).run()


@dataclass
class Packed:
    """One token over pages; the tail holds nothing but its own key and value."""

    q: torch.Tensor
    tails: tuple[torch.Tensor, torch.Tensor]
    pages: Pages
    step: Step
    nbytes: float

    @classmethod
    def make(
        cls, place: Place, heads: Heads, batch: int, context: int, codecs: tuple[str, str], seed: int = 0
    ) -> Packed:
        """Random codes and plausible scales; nothing is encoded."""
        shape, count = PageShape(heads.groups, _PAGE, heads.width), context // _PAGE
        packed = place.longs(batch, fill=count * _PAGE)
        tails = tuple(place.normal(batch, heads.groups, _TAIL, heads.width) for _ in range(2))
        first = tuple(t[:, :, :0].contiguous() for t in tails)
        sides = []
        for index, text in enumerate(codecs):
            codec = parse_codec(text)
            draws = torch.Generator().manual_seed(seed)
            samples = torch.randn(2, heads.groups, _PAGE, heads.width, generator=draws)
            tables = [t.to(place.device) for t in codec.constants(shape, samples).values()]
            buffers = [
                _content(place, (batch, count, *size), kind) for size, kind in codec.layout(shape).values()
            ]
            sides.append(Side.of([packed, tails[index], first[index], *buffers], tables, text, _PAGE))
        pages = Pages(sides[0], sides[1], packed, (first[0], first[1]), _PAGE)
        nbytes = sum(b.nbytes for side in sides for b in side.buffers)
        step = step_at(place, batch, count * _PAGE, heads.width)
        q = place.normal(batch, heads.queries, 1, heads.width)
        return cls(q, (tails[0], tails[1]), pages, step, nbytes)

    def run(self) -> torch.Tensor:
        """Our attention, ``[B, 1, H, E]``."""
        return Attention(self.q, *self.tails, self.step, self.pages).run()


def _content(place: Place, size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.uint8:
        return torch.empty(size, dtype=dtype, device=place.device).random_(0, 256)
    if dtype.itemsize == 1:  # 8-bit floats: any byte but those that are not a number
        return torch.empty(size, dtype=torch.uint8, device=place.device).random_(0, 120).view(dtype)
    # The numbers of a cache as they are, or scales: one for many numbers.
    made = torch.empty(size, dtype=dtype, device=place.device)
    return made.normal_() if len(size) == 5 else made.uniform_(0.5, 1.5)


@dataclass
class Selected:
    """Attention over the best pages of a dense cache; the selection included."""

    dense: Dense
    summary: torch.Tensor
    share: int

    @classmethod
    def make(cls, place: Place, heads: Heads, batch: int, context: int, share: int = 16) -> Selected:
        """The best ``1 / share`` of the pages."""
        count = context // _PAGE
        dense = Dense.make(place, heads, batch, count * _PAGE)
        by_page = dense.keys.unflatten(2, (count, _PAGE))
        summary = torch.stack((by_page.amin(3), by_page.amax(3)), 3).transpose(1, 2).contiguous()
        return cls(dense, summary, share)

    @property
    def nbytes(self) -> float:
        """What a step must read: all summaries, and the chosen pages."""
        return self.summary.nbytes + self.dense.nbytes / self.share

    def run(self) -> torch.Tensor:
        """Score, choose, attend."""
        q, step = self.dense.q, self.dense.step
        where = (step.positions, step.lengths, step.counts, torch.zeros_like(step.lengths))
        pages = (_PAGE, 0, _PAGE, 0)  # the newest page is always read
        groups = self.summary.shape[2]
        scores = score_pages(q, [self.summary], [], *where, "bounds", groups, *pages, step.scale)
        listed = choose_pages(scores, *where, *pages, sinks=1, keep=1 / self.share, share=0.0)
        lists = Lists(*listed, _PAGE, 0)
        return ListedAttention(q, self.dense.keys, self.dense.values, step, lists=lists).run()


# --- relative errors -------------------------------------------------------------------------------


def codec_errors(place: Place, heads: Heads, context: int, codecs: tuple[str, str]) -> dict[str, float]:
    """Relative errors of one attention over really packed pages against float64.

    Returns:
        ``kernel``: against attention over what the pages decode to; ``total``: against attention over what
        was packed, which is what the codec loses.
    """
    made = Packed.make(place, heads, 1, context, codecs)
    shape = PageShape(heads.groups, _PAGE, heads.width)
    originals: list[torch.Tensor] = []
    decoded: list[torch.Tensor] = []
    for side, text, tail in zip((made.pages.keys, made.pages.values), codecs, made.tails, strict=True):
        codec = parse_codec(text)
        count = side.buffers[0].shape[1]
        # Channels of unequal size, as keys have them.
        scale = torch.linspace(0.5, 2.0, heads.width, device=place.device)
        numbers = (place.normal(count, heads.groups, _PAGE, heads.width, dtype=torch.float32) * scale).to(
            place.dtype
        )
        tables = dict(zip(codec.constant_names(shape), side.constants, strict=True))
        for buffer, new in zip(side.buffers, codec.encode(numbers, tables).values(), strict=True):
            buffer[0] = new.view(buffer.dtype) if new.dtype != buffer.dtype else new
        kept = {
            name: buffer[0].view(kind) if buffer.dtype != kind else buffer[0]
            for (name, (_, kind)), buffer in zip(codec.layout(shape).items(), side.buffers, strict=True)
        }
        newest = tail[0, :, count * _PAGE % _TAIL][:, None]  # the step's own token, [G, 1, D]
        for found, pages in ((originals, numbers), (decoded, codec.decode(kept, tables, shape))):
            found.append(torch.cat((pages.double().transpose(0, 1).flatten(1, 2), newest.double()), 1))
    mine = made.run()[0, 0].double()
    return {
        name: float((mine - expected).norm() / expected.norm())
        for name, (k, v) in (("kernel", decoded), ("total", originals))
        for expected in (_exact(made.q[0, :, 0].double(), k, v, made.step.scale),)
    }


def dense_error(place: Place, heads: Heads, context: int) -> float:
    """Of our attention over a dense cache, against float64."""
    made = Dense.make(place, heads, 1, context)
    keys, values = (t[0].double() for t in (made.keys, made.values))
    expected = _exact(made.q[0, :, 0].double(), keys, values, made.step.scale)
    return float((made.run()[0, 0].double() - expected).norm() / expected.norm())


def _exact(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """``q [H, D]`` over ``keys``, ``values`` ``[G, S, D]`` in float64."""
    grouped = q.view(keys.shape[0], -1, q.shape[1])
    weights = (torch.einsum("ghd,gsd->ghs", grouped, keys) * scale).softmax(-1)
    return torch.einsum("ghs,gsd->ghd", weights, values).flatten(0, 1)


Maker = Callable[[Place], "Dense | Packed | Selected"]
