"""``chelsea``: tokens with similar keys become one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

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


@register_evictor
@dataclass(frozen=True)
class Chelsea(Evictor):
    """Chunked soft matching: within chunks, every other token goes to the one that it is most like.

    Source: Hu et al., "Efficient Long-Context LLM Inference via KV Cache Clustering" (2025): chunks, the
    alternating partition, and centroids. The pairs that are most alike are merged first; where half of a
    chunk is not enough, what is left is divided anew. Centroids are means over all tokens that they stand
    for, merged earlier or now; attention counts a centroid as one token.

    Options:
        chunk: tokens of a chunk.
    """

    name: ClassVar[str] = "chelsea"
    summary: ClassVar[str] = "tokens of a chunk with similar keys become their mean"
    source: ClassVar[str] = "Chelsea, Hu et al. 2025"
    observes: ClassVar[bool] = False
    accumulates: ClassVar[bool] = True

    chunk: int = 64

    def __post_init__(self) -> None:
        if self.chunk < 2:
            raise PassError(f"chunk={self.chunk} has no pairs", hint="give 2 tokens or more, 64 is usual")

    def note(self, seen: Seen) -> torch.Tensor:
        """How many tokens each stands for."""
        return seen.accumulated.clamp(min=1)

    def score(self, seen: Seen) -> torch.Tensor:
        """Rounds of matching: what is merged in a later round, or is less like its partner, scores higher."""
        chunks = self._chunks(seen.keys)  # [B, G, c, chunk, D]
        cosine = chunks @ chunks.transpose(3, 4)
        scores = chunks.new_full(chunks.shape[:4], float(chunks.shape[3]))
        left = torch.arange(chunks.shape[3], device=chunks.device)
        lead, size = scores.shape[:3], chunks.shape[3]
        left = left.expand(*lead, size)
        rounds = 0.0
        while left.shape[3] > 1:
            away, stay = left[..., 1::2], left[..., ::2]
            rows = cosine.gather(3, away[..., None].expand(*away.shape, size))
            near = rows.gather(4, stay[..., None, :].expand(*away.shape, stay.shape[3]))
            best = near.amax(-1)  # [B, G, c, away], at most 1
            scores.scatter_(3, away, rounds + (1 - best) / 4)  # below the next round's
            left, rounds = stay, rounds + 1
        return scores.flatten(2)[:, :, : seen.keys.shape[2]]

    def merge(self, seen: Seen, kept: torch.Tensor) -> Kept:
        """Into the kept token of the chunk with the most similar key; dropped if none of it is kept."""
        tokens = seen.keys.shape[2]
        gone, own = leaving(kept, tokens), places(kept, tokens)
        chunks = self._chunks(seen.keys)
        cosine = chunks @ chunks.transpose(3, 4)  # [B, G, c, chunk, chunk]
        stays = F.pad(~gone, (0, chunks.shape[2] * chunks.shape[3] - tokens)).unflatten(2, chunks.shape[2:4])
        best = cosine.masked_fill(~stays[..., None, :], float("-inf")).max(dim=-1)
        start = torch.arange(chunks.shape[2], device=chunks.device)[:, None] * chunks.shape[3]
        partner = (best.indices + start).flatten(2)[:, :, :tokens]
        alone = (best.values == float("-inf")).flatten(2)[:, :, :tokens]
        into = own.gather(2, partner.clamp(max=tokens - 1)).masked_fill(alone, kept.shape[2])
        return merge_into(seen, kept, torch.where(gone, into, own), seen.accumulated)

    def _chunks(self, keys: torch.Tensor) -> torch.Tensor:
        """Unit keys in chunks, padded with zeros: ``[B, G, c, chunk, D]`` float32."""
        unit = F.normalize(keys.float(), dim=-1)
        unit = F.pad(unit, (0, 0, 0, -keys.shape[2] % self.chunk))
        return unit.unflatten(2, (-1, self.chunk))
