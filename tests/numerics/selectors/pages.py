"""Pages of keys, their summaries and scores, for the tests of selectors."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from graphwright.ir.codecs.part import PageShape
from graphwright.ir.selectors import Selector, parse_selector
from graphwright.ir.selectors.selector import Samples, Tensors

SHAPE = PageShape(groups=2, tokens=8, features=16)
HEADS, VOCAB = 4, 50
SCALE = 1 / math.sqrt(SHAPE.features)


def normal(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal numbers."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some_samples(seed: int = 7) -> Samples:
    """Keys and queries at random, and every tenth token ends a sentence."""
    keys, queries = normal(SHAPE.groups, 64, SHAPE.features, seed=seed), normal(HEADS, 64, SHAPE.features)
    return Samples(keys, queries, torch.arange(VOCAB) % 10 == 0)


class Summarized(NamedTuple):
    """Pages ``[B, N, G, P, D]`` as a selector keeps them."""

    selector: Selector
    shape: PageShape
    summary: Tensors
    constants: Tensors

    def score(self, q: torch.Tensor, closed: torch.Tensor | None = None) -> torch.Tensor:
        """``[B, H, T, N]``, with every page a candidate unless ``closed [B, T]`` is given."""
        pages = next(iter(self.summary.values())).shape[1]
        if closed is None:
            closed = torch.full((q.shape[0], q.shape[2]), pages)
        return self.selector.score(q, self.summary, self.constants, self.shape, SCALE, closed)


def summarize(
    text: str,
    keys: torch.Tensor,
    tokens: torch.Tensor | None = None,
    samples: Samples | None = None,
    heads: int = HEADS,
) -> Summarized:
    """Summaries of pages ``[B, N, G, P, D]`` with tokens ``[B, N, P]``, written as a runtime writes them.

    Spans that are not whole are zeros.
    """
    selector, shape = parse_selector(text), PageShape(*keys.shape[2:])
    batch, pages = keys.shape[:2]
    constants = selector.constants(shape, heads, some_samples() if samples is None else samples)
    if tokens is None:
        tokens = torch.arange(batch * pages * shape.tokens).view(batch, pages, -1) % VOCAB
    given = tokens.flatten(0, 1) if selector.needs_tokens else None
    made = selector.summarize(keys.flatten(0, 1), constants, given)
    summary = {name: content.unflatten(0, (batch, pages)) for name, content in made.items()}
    for name, (size, dtype, span) in selector.layout(shape, keys.dtype).items():
        if span > 1:
            whole = pages // span
            own = {n: s[:, : whole * span].reshape(-1, span, *s.shape[2:]) for n, s in summary.items()}
            entries = torch.zeros((batch, -(-pages // span), *size), dtype=dtype)
            if whole:
                entries[:, :whole] = selector.summarize_span(own)[name].unflatten(0, (batch, whole))
            summary[name] = entries
    ordered = {name: summary[name] for name in selector.layout(shape, keys.dtype)}
    return Summarized(selector, shape, ordered, constants)


def exact_mass(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """``[B, H, T, N]`` float64, the logarithm of each page's mass, key by key."""
    repeated = keys.double().repeat_interleave(q.shape[1] // keys.shape[2], dim=2)  # [B, N, H, P, D]
    return torch.einsum("bhtd,bnhpd->bhtnp", q.double() * SCALE, repeated).logsumexp(-1)
