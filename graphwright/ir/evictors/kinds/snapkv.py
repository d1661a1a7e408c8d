"""``snapkv``: what the newest queries attend to, with its surroundings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from graphwright.ir.errors import PassError
from graphwright.ir.evictors.evictor import Evictor, Seen, register_evictor

_OWN = 1e-3  # of a token's own vote, beside the pooled one


@register_evictor
@dataclass(frozen=True)
class SnapKV(Evictor):
    """Attention of an observation window at the end, max-pooled along the tokens.

    Source: Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation" (NeurIPS 2024): the
    votes of the observation window, and their clustering by pooling. The paper evicts once, after the
    prompt (``when=prompt``), and pools votes of query heads; here heads that share a key/value head vote
    together, since they share its tokens.

    Options:
        pool: tokens over which the largest score counts for each, odd; 1 does not pool.
    """

    name: ClassVar[str] = "snapkv"
    summary: ClassVar[str] = "what the newest queries attend to, with the tokens around it"
    source: ClassVar[str] = "SnapKV, Li et al. 2024"

    pool: int = 7

    def __post_init__(self) -> None:
        if self.pool < 1 or self.pool % 2 == 0:
            raise PassError(
                f"pool={self.pool} has no middle", hint="give an odd number of tokens, 7 is usual"
            )

    def score(self, seen: Seen) -> torch.Tensor:
        """Pooled over the tokens before the observation window, as those in it stay anyway."""
        votes = seen.attention()
        before = votes.shape[2] - seen.queries.shape[2]
        if before <= 0:
            return votes
        pooled = F.max_pool1d(votes[:, :, :before], self.pool, stride=1, padding=self.pool // 2)
        # Neighbours share the largest vote among them: the token that got it comes first.
        return torch.cat((pooled, votes[:, :, before:]), dim=2) + _OWN * votes
