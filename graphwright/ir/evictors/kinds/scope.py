"""``scope``: the prompt and what was generated are budgets of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from graphwright.ir.errors import PassError
from graphwright.ir.evictors.evictor import Evictor, Seen, register_evictor


@register_evictor
@dataclass(frozen=True)
class Scope(Evictor):
    """Once the prompt has run, what it kept stays; heavy hitters are chosen among generated tokens only.

    Source: Wu et al., "SCOPE: Optimizing Key-Value Cache Compression in Long-context Generation" (ACL
    2025): the prefill and the decoding phase apart, and heavy hitters of the decoding phase by sliding,
    that is, by what a window of the newest queries attends to. The paper's adaptive growth of the second
    budget is not here: slots are allocated once. Attention of the newest window counts in full, that of
    each window before it half as much as of the next.

    Options:
        decode: share of the budget for generated tokens. A prompt that is longer than the rest is cut
            down to it when it has run (``when=prompt``, or as it runs with ``when=always``).
    """

    name: ClassVar[str] = "scope"
    summary: ClassVar[str] = "what the prompt kept stays; heavy hitters among generated tokens, sliding"
    source: ClassVar[str] = "SCOPE, Wu et al. 2025"
    accumulates: ClassVar[bool] = True

    decode: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.decode < 1:
            raise PassError(
                f"decode={self.decode} is not a share of the budget",
                hint="decode=0.25 leaves 3/4 to the prompt",
            )

    def note(self, seen: Seen) -> torch.Tensor:
        """Half of what was noted, and the attention of this window."""
        return seen.accumulated / 2 + seen.attention()

    def score(self, seen: Seen) -> torch.Tensor:
        """What was noted, this window included."""
        return seen.accumulated

    def anchored(self, budget: int) -> int:
        """The prompt's share."""
        return budget - math.ceil(self.decode * budget)
