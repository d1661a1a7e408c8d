"""``ems``: evict what nobody attends to, merge what is alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from graphwright.ir.errors import PassError
from graphwright.ir.evictors.evictor import (
    Evictor,
    Kept,
    Seen,
    leaving,
    merge_into,
    places,
    register_evictor,
)
from graphwright.ir.evictors.similar import most_similar


@register_evictor
@dataclass(frozen=True)
class EMS(Evictor):
    """Global and local attention together choose what stays; of the rest, the better part is merged.

    Source: Li et al., "EMS: Adaptive Evict-then-Merge Strategy for Head-wise KV Cache Compression Based on
    Global-Local Importance" (2024): the Global-Local score, and evict-then-merge with a zero class. What
    of it is ours: the global score is what the observation windows of earlier evictions gave, each scaled
    so that both scores have the same mean; every head keeps as many tokens, as they share a store.

    Options:
        merged: of the tokens that leave, the fraction that is merged, best scored first.
        threshold: least cosine of keys for that; below, a token belongs to the zero class and is dropped.
    """

    name: ClassVar[str] = "ems"
    summary: ClassVar[str] = "global and local attention; what leaves and is alike is merged"
    source: ClassVar[str] = "EMS, Li et al. 2024"
    accumulates: ClassVar[bool] = True

    merged: float = 0.5
    threshold: float = 0.6

    def __post_init__(self) -> None:
        if not (0 <= self.merged <= 1 and -1 <= self.threshold <= 1):
            raise PassError(
                f"merged={self.merged}, threshold={self.threshold} are no fraction and cosine",
                hint="merged=0.5 and threshold=0.6 are usual",
            )

    def note(self, seen: Seen) -> torch.Tensor:
        """The sum of what earlier observation windows gave, and this one."""
        return seen.accumulated + seen.attention()

    def score(self, seen: Seen) -> torch.Tensor:
        """Both in units of their mean over the tokens."""
        local = seen.attention()
        return _in_means(local) + _in_means(seen.accumulated)

    def merge(self, seen: Seen, kept: torch.Tensor) -> Kept:
        """Means weighted by what attention each token had."""
        tokens = seen.keys.shape[2]
        gone = leaving(kept, tokens)
        into, cosine = most_similar(seen.keys, seen.keys.gather(2, _index(kept, seen.keys)))
        ranked = seen.accumulated.masked_fill(~gone, float("-inf"))
        many = int(self.merged * (tokens - kept.shape[2]))
        better = torch.zeros_like(gone)
        better.scatter_(2, ranked.sort(dim=2, descending=True, stable=True).indices[:, :, :many], True)
        own = places(kept, tokens)
        nowhere = kept.shape[2]
        into = torch.where(gone & better & (cosine >= self.threshold), into, nowhere)
        # A floor, since a token that nobody attends to keeps its place.
        weights = seen.accumulated.clamp(min=1e-6)
        found = merge_into(seen, kept, torch.where(gone, into, own), weights)
        return found._replace(accumulated=seen.accumulated.gather(2, kept))


def _in_means(x: torch.Tensor) -> torch.Tensor:
    return x / x.mean(-1, keepdim=True).clamp(min=1e-12)


def _index(kept: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return kept[..., None].expand(-1, -1, -1, x.shape[3])
