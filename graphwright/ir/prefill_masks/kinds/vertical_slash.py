"""``vertical_slash``: the columns and diagonals that a step's last queries attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch

from graphwright.ir.prefill_masks.mask import DENSE_TOKENS, LongStep, Mask, Work, causal_tokens, register_mask


@register_mask
@dataclass(frozen=True)
class VerticalSlash(Mask):
    """Some tokens matter to every query, some distances do: found for each head, in blocks.

    The last :data:`DENSE_TOKENS` valid queries of a row's step attend to everything; the columns and the
    diagonals of blocks that have most of their attention are kept for the whole step.

    Options:
        verticals: tokens in the columns that are kept.
        slashes: tokens in the diagonals that are kept, the queries' own among them.
    """

    name: ClassVar[str] = "vertical_slash"
    summary: ClassVar[str] = "the columns and diagonals that the last queries of a step attend to most"
    source: ClassVar[str] = (
        'Jiang et al. 2024, "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic '
        'Sparse Attention", the vertical-slash pattern'
    )

    verticals: int = 512
    slashes: int = 512

    def check(self) -> None:
        self.check_tokens("verticals", self.verticals, self.block)
        self.check_tokens("slashes", self.slashes, self.block)

    def keeps(self, step: LongStep) -> torch.Tensor:
        number = torch.arange(step.key_blocks, device=step.q.device)
        vertical, slash = self._mass(step)
        columns = _best(vertical, self.verticals // self.block)[:, :, None]  # [B, H, 1, N]
        diagonals = _best(slash, self.slashes // self.block)  # [B, H, N]
        kept = columns
        for edge in (step.first, step.last):  # a query block may lie in two blocks of the cache
            own = torch.div(edge, step.block, rounding_mode="floor")
            distance = own[..., None] - number  # [B, Q, N]
            at = distance.clamp(0, step.key_blocks - 1)[:, None].expand(-1, diagonals.shape[1], -1, -1)
            on = diagonals[:, :, None].expand_as(at).gather(3, at)
            kept = kept | (on & (distance >= 0)[:, None])
        return kept

    def _mass(self, step: LongStep) -> tuple[torch.Tensor, torch.Tensor]:
        """``[B, H, N]`` twice: attention of the last queries by block, and by distance in blocks."""
        column = step.counts[:, None] - DENSE_TOKENS + torch.arange(DENSE_TOKENS, device=step.q.device)
        column = column.clamp(min=0)  # [B, 64]
        at = step.lengths[:, None] + column
        picked = step.q.gather(2, column[:, None, :, None].expand(-1, step.q.shape[1], -1, step.q.shape[3]))
        groups, slots = step.keys.shape[1], step.keys.shape[2]
        hidden = (torch.arange(slots, device=step.q.device) > at[..., None])[:, None]  # [B, 1, 64, S]
        parts = []
        # A head group at a time: of all heads, the scores of a long text would be large.
        for keys, queries in zip(step.keys.unbind(1), picked.chunk(groups, 1), strict=True):
            scores = queries.float() @ keys[:, None].float().transpose(2, 3) * step.scale
            weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1)
            padded = torch.nn.functional.pad(weights, (0, step.key_blocks * step.block - slots))
            parts.append(padded.unflatten(3, (step.key_blocks, step.block)).sum(4))
        mass = torch.cat(parts, 1)  # [B, H, 64, N]
        distance = torch.arange(step.key_blocks, device=step.q.device)
        block = torch.div(at, step.block, rounding_mode="floor")[..., None] - distance  # [B, 64, N]
        found = mass.gather(3, block.clamp(min=0)[:, None].expand_as(mass))
        return mass.sum(2), found.masked_fill((block < 0)[:, None], 0.0).sum(2)

    def work(self, tokens: Any, past: Any, heads: int, groups: int, features: int) -> Work:
        dense = causal_tokens(tokens, past, self.block)
        # Columns and diagonals cross. Steps mostly begin where a block does: a diagonal is then one block.
        both = self.verticals * self.slashes / (past + tokens)
        seen = sympy.Min(dense, self.verticals + self.slashes - both)
        return Work(seen, 2 * DENSE_TOKENS * heads * features * (past + tokens), reads_keys=True)


def _best(mass: torch.Tensor, count: int) -> torch.Tensor:
    """Which entries of the last dimension are among the ``count`` largest; the first one always is."""
    mass = mass.clone()
    mass[..., 0] = float("inf")
    rank = mass.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return rank < count
