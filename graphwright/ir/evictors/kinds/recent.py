"""``recent``: the first tokens and the newest ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from graphwright.ir.evictors.evictor import Evictor, Seen, register_evictor


@register_evictor
@dataclass(frozen=True)
class Recent(Evictor):
    """A window that moves, and the attention sinks before it.

    Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (ICLR 2024), the section
    on a rolling cache with attention sinks. There positions are counted within the cache; here tokens keep
    the positions that they have in the text.
    """

    name: ClassVar[str] = "recent"
    summary: ClassVar[str] = "the first tokens and the newest ones"
    source: ClassVar[str] = "StreamingLLM, Xiao et al. 2024"
    observes: ClassVar[bool] = False

    def score(self, seen: Seen) -> torch.Tensor:
        """How late a token came."""
        batch, groups, tokens = seen.keys.shape[:3]
        at = torch.arange(tokens, dtype=torch.float32, device=seen.keys.device)
        return at.expand(batch, groups, tokens)
