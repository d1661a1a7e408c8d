"""``random``: any tokens, as a baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from graphwright.ir.evictors.evictor import Evictor, Seen, register_evictor


@register_evictor
@dataclass(frozen=True)
class RandomTokens(Evictor):
    """What is left if tokens are dropped blindly: every other evictor should beat it.

    Options:
        seed: of the choice, which depends on nothing else but how long the row is.
    """

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "any tokens: a baseline"
    observes: ClassVar[bool] = False

    seed: int = 0

    def score(self, seen: Seen) -> torch.Tensor:
        """Uniform numbers, other ones for each head."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + seen.length)
        _, groups, tokens = seen.keys.shape[:3]
        numbers = torch.rand((1, groups, tokens), generator=generator)
        return numbers.expand(seen.keys.shape[0], -1, -1).to(seen.keys.device)
