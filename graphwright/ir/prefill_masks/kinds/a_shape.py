"""``a_shape``: the first tokens and a window before each query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch

from graphwright.ir.prefill_masks.mask import LongStep, Mask, Work, causal_tokens, register_mask


@register_mask
@dataclass(frozen=True)
class AShape(Mask):
    """Attention sinks and a sliding window, in whole blocks.

    Options:
        sinks: tokens at the start.
        recent: tokens before a query, itself included.
    """

    name: ClassVar[str] = "a_shape"
    summary: ClassVar[str] = "the first tokens and a window before each query"
    source: ClassVar[str] = (
        'Xiao et al. 2024, "Efficient Streaming Language Models with Attention Sinks"; as a pattern of '
        'prefill: Jiang et al. 2024, "MInference 1.0"'
    )

    sinks: int = 128
    recent: int = 1024

    def check(self) -> None:
        self.check_tokens("sinks", self.sinks, self.block)
        self.check_tokens("recent", self.recent, self.block)

    def keeps(self, step: LongStep) -> torch.Tensor:
        number = torch.arange(step.key_blocks, device=step.q.device)
        in_sinks = number * self.block < self.sinks
        in_window = (number + 1) * self.block > step.first[..., None] - self.recent + 1
        return (in_sinks | in_window)[:, None]

    def work(self, tokens: Any, past: Any, heads: int, groups: int, features: int) -> Work:
        # A window begins anywhere in a block: half of one more on average.
        seen = self.sinks + self.recent + self.block
        return Work(sympy.Min(causal_tokens(tokens, past, self.block), seen))
