"""``chunked``: everything of a query's own chunk, and the best blocks of earlier ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch

from graphwright.ir.errors import MaskError
from graphwright.ir.prefill_masks.mask import LongStep, Mask, Work, causal_tokens, register_mask


@register_mask
@dataclass(frozen=True)
class Chunked(Mask):
    """Full attention within chunks of the text, sparse attention across them, per key/value head.

    An earlier block's score is the inner product of the mean query of a query block (over the heads of the
    group too) and the block's mean key.

    Options:
        chunk: tokens of a chunk; chunks are counted from the start of the text, whatever the steps are.
        keep: the share of the blocks before a query's chunk that it attends to, rounded up.
    """

    name: ClassVar[str] = "chunked"
    summary: ClassVar[str] = "all of a query's own chunk, and the best blocks of earlier chunks"
    source: ClassVar[str] = (
        'Qin et al. 2025, "Video-XL-2: Towards Very Long-Video Understanding Through Task-Aware KV '
        'Sparsification", chunk-based pre-filling; blocks ranked by means as in Lu et al. 2025, "MoBA"'
    )

    chunk: int = 512
    keep: float = 0.25

    def check(self) -> None:
        self.check_tokens("chunk", self.chunk, self.block)
        if not 0 < self.keep <= 1:
            raise MaskError(f"keep={self.keep} is not a share", where=self.name, hint="above 0, at most 1")

    def keeps(self, step: LongStep) -> torch.Tensor:
        number = torch.arange(step.key_blocks, device=step.q.device)
        own = torch.div(step.first, self.chunk, rounding_mode="floor") * (self.chunk // self.block)  # [B, Q]
        earlier = number < own[..., None]
        scores = self._scores(step).masked_fill(~earlier[:, None], float("-inf"))
        rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        budget = torch.ceil(own * self.keep - 1e-9)[:, None, :, None]
        return (rank < budget) | ~earlier[:, None]

    def _scores(self, step: LongStep) -> torch.Tensor:
        """``[B, G, Q, N]`` float64, so that other rows and more padding change no choice."""
        batch, heads, tokens, features = step.q.shape
        groups, slots = step.keys.shape[1], step.keys.shape[2]
        whole = slots // self.block
        means = (
            step.keys[:, :, : whole * self.block]
            .unflatten(2, (whole, self.block))
            .mean(3, dtype=torch.float64)
        )
        valid = torch.arange(tokens, device=step.q.device) < step.counts[:, None]
        queries = torch.where(valid[:, None, :, None], step.q, 0).double()
        queries = torch.nn.functional.pad(queries, (0, 0, 0, step.query_blocks * self.block - tokens))
        # A query block's sum ranks blocks as its mean does.
        queries = queries.view(batch, groups, heads // groups, step.query_blocks, self.block, features).sum(
            (2, 4)
        )
        scores = queries @ means.transpose(2, 3)
        return torch.nn.functional.pad(scores, (0, step.key_blocks - whole), value=float("-inf"))

    def work(self, tokens: Any, past: Any, heads: int, groups: int, features: int) -> Work:
        dense = causal_tokens(tokens, past, self.block)
        own = (self.chunk + self.block) / sympy.Integer(2)
        kept = sympy.Rational(str(self.keep))
        # Before the first whole chunk everything is a query's own.
        earlier = sympy.Max(0, dense - own)
        seen = dense - (1 - kept) * earlier
        flops = 2 * groups * features * (past + tokens) * (1 + tokens / sympy.Integer(self.block**2))
        return Work(seen, flops, reads_keys=True)
