"""What a selector is: a small summary of each page of keys, and a score of pages for a query.

A page is P consecutive tokens of a cache, ``[G, P, D]``. Its summary is written once, when the tokens are
committed; attention then reads the summaries of all pages and the keys and values of few.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, NamedTuple, TypeVar

import torch

from graphwright.ir.codecs.part import PageShape
from graphwright.ir.errors import SelectorError
from graphwright.ir.spelling import PartParser, spell

Tensors = Mapping[str, torch.Tensor]


class Buffer(NamedTuple):
    """One tensor of a summary, ``[B, N, *size]`` for N pages of a row.

    Attributes:
        size: of one page's part.
        dtype: as it is kept.
        span: pages that share one entry; the tensor is then ``[B, ceil(N / span), *size]``.
    """

    size: tuple[int, ...]
    dtype: torch.dtype
    span: int = 1


class Samples(NamedTuple):
    """What calibration text gives: tokens in order, all rows one after the other.

    Attributes:
        keys: ``[G, n, D]`` float32, as stored.
        queries: ``[H, n, D]`` float32 of the same tokens; None where they are not known.
        ends: ``[V]`` bool, which tokens end a sentence; None without a tokenizer.
    """

    keys: torch.Tensor | None = None
    queries: torch.Tensor | None = None
    ends: torch.Tensor | None = None


@dataclass(frozen=True)
class Selector(ABC):
    """A page summary and a score. Fields of the subclass are its options; prints as ``name(option=value)``.

    Class attributes:
        needs_samples: its constants come from calibration; without samples they are a neutral stand-in
            of the right shapes, good for planning and not for running.
        needs_tokens: summaries are made with the token ids of the page.
        estimates: scores estimate attention, so that their softmax is a share of its mass. Of the others
            only the order means anything.
        in_kernels: kernels score it (``kernels/cpp/page_scores.cpp``, ``kernels/triton/score_pages.py``);
            the others run the op's reference.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str] = ""
    needs_samples: ClassVar[bool] = False
    needs_tokens: ClassVar[bool] = False
    estimates: ClassVar[bool] = True
    in_kernels: ClassVar[bool] = False

    def obstacle(self, shape: PageShape) -> str | None:
        """Why it cannot serve pages of this shape; None if it can."""
        return None

    @abstractmethod
    def layout(self, shape: PageShape, dtype: torch.dtype) -> dict[str, Buffer]:
        """The summary of a page of this shape whose keys have this dtype; the first has ``span`` 1."""

    def constants(self, shape: PageShape, heads: int, samples: Samples) -> dict[str, torch.Tensor]:
        """Tables that summaries and scores read, for H query heads."""
        return {}

    @abstractmethod
    def summarize(
        self, keys: torch.Tensor, constants: Tensors, tokens: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Buffers of ``span`` 1 for whole pages.

        Args:
            keys: ``[n, G, P, D]`` in the cache's dtype.
            constants: tables by name.
            tokens: ``[n, P]`` token ids for selectors that need them.

        Returns:
            ``[n, *size]`` by name.
        """

    def summarize_span(self, pages: Tensors) -> dict[str, torch.Tensor]:
        """Buffers of a longer ``span`` from those of its pages, ``[n, span, *size]``; none by default."""
        return {}

    @abstractmethod
    def score(
        self,
        q: torch.Tensor,
        summary: Tensors,
        constants: Tensors,
        shape: PageShape,
        scale: float,
        closed: torch.Tensor,
    ) -> torch.Tensor:
        """The logarithm of ``sum_k exp(scale * q.k)`` over each page's keys, estimated up to a constant.

        Sums are taken in float64 or in any way that gives a query the same bits whatever else is asked.

        Args:
            q: ``[B, H, T, D]``.
            summary: ``[B, N, *size]`` by name; pages that were never summarized hold anything finite.
            constants: tables by name.
            shape: of a page.
            scale: of attention.
            closed: ``[B, T]`` int64, how many pages are candidates for a query: the first ones. Whole spans
                among them are summarized; scores of other pages are not used.

        Returns:
            ``[B, H, T, N]`` float32 or float64.
        """

    def constant_names(self, shape: PageShape) -> list[str]:
        """Names of :meth:`constants`, in order."""
        return list(self.constants(shape, shape.groups, Samples()))

    def page_bytes(self, shape: PageShape, dtype: torch.dtype) -> float:
        """Bytes of summary of one page of one row."""
        buffers = self.layout(shape, dtype).values()
        return sum(torch.Size(b.size).numel() * b.dtype.itemsize / b.span for b in buffers)

    def __str__(self) -> str:
        return spell(self)


_REGISTRY: dict[str, type[Selector]] = {}
S = TypeVar("S", bound=type[Selector])


def register_selector(cls: S) -> S:
    """Class decorator: make a selector known by its ``name``."""
    _REGISTRY[cls.name] = cls
    return cls


def registered_selectors() -> dict[str, type[Selector]]:
    """All selectors by name."""
    import graphwright.ir.selectors.kinds  # noqa: F401  the package imports its own modules

    return dict(_REGISTRY)


@cache
def parse_selector(text: str) -> Selector:
    """A selector from its text; ``str(parse_selector(text))`` parses to the same one.

    Raises:
        SelectorError: it does not parse; the message points at the character.
    """
    return PartParser(
        text, registered_selectors(), SelectorError, "selector", "bounds or channels(count=16)"
    ).whole()
