"""Attention over a shared prefix on GPUs: the attention template twice, merged where its splits are.

Over the prefix the rows of the batch take part as heads of one sequence, so that a tile of query rows reads
it for all of them. Source: Juravsky et al. 2024, "Hydragen: High-Throughput LLM Inference with Shared
Prefixes", section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from graphwright.kernels.registry import implements
from graphwright.kernels.triton.attention import Attention, Step
from graphwright.kernels.triton.attention_ops import MAX_TREE_TOKENS, PROVIDER, supports_cache_attention

Splits = tuple[torch.Tensor, torch.Tensor]


@dataclass
class _Kept(Attention):
    """An attention whose splits are handed out instead of merged.

    Attributes:
        splits: ``[B, H, T, splits, E]`` and their log-sum-exp (base 2) ``[B, H, T, splits]``, float32.
    """

    splits: Splits | None = field(init=False, default=None)

    def _combine(self, part: torch.Tensor, lse: torch.Tensor, page_splits: int) -> None:
        self.splits = (part, lse)


@dataclass
class _After(Attention):
    """An attention whose splits are merged with those of what comes before."""

    before: Splits | None = None

    def _combine(self, part: torch.Tensor, lse: torch.Tensor, page_splits: int) -> None:
        if self.before is not None:
            part = torch.cat((self.before[0], part), dim=3)
            lse = torch.cat((self.before[1], lse), dim=3)
        super()._combine(part, lse, page_splits)


def prefix_attention(
    q: torch.Tensor,
    prefix_keys: torch.Tensor,
    prefix_values: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    tree: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The semantic op ``prefix_attention``."""
    q = q if q.stride(3) == 1 or q.shape[3] == 1 else q.contiguous()
    step = Step(positions, lengths, counts, tree, scale, 0, softcap, sinks)
    before = None
    if prefix_keys.shape[2] and q.numel():
        before = _over_prefix(q, prefix_keys, prefix_values, scale, softcap)
    return _After(q, keys, values, step, before=before).run()


def _over_prefix(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, softcap: float
) -> Splits:
    """The splits ``[B, H, T, splits, E]`` of all queries over the prefix."""
    batch, heads, tokens, width = q.shape
    groups, shared = keys.shape[1], keys.shape[2]
    rows = q.reshape(batch, groups, heads // groups, tokens, width).transpose(0, 1)
    rows = rows.reshape(
        1, groups * batch * (heads // groups), tokens, width
    )  # head: of group, of row, of group
    found = []
    for start in range(0, tokens, MAX_TREE_TOKENS):
        part = rows[:, :, start : start + MAX_TREE_TOKENS]
        count = part.shape[2]

        def of_one(number: int) -> torch.Tensor:
            return torch.full((1,), number, dtype=torch.int64, device=q.device)

        # As if the step's own tokens were the last of the prefix, in a tree where each sees all of them.
        everything = torch.full((1, count), -1, dtype=torch.int64, device=q.device)
        step = Step(everything, of_one(shared - count), of_one(count), everything, scale, 0, softcap)
        attention = _Kept(part, keys, values, step)
        attention.run()
        assert attention.splits is not None
        found.append(attention.splits)
    own = (groups, batch, heads // groups, tokens)
    parts, lses = (torch.cat(list(kind), dim=2) for kind in zip(*found, strict=True))
    parts = parts.view(*own, *parts.shape[3:]).transpose(0, 1).reshape(batch, heads, tokens, *parts.shape[3:])
    lses = lses.view(*own, lses.shape[3]).transpose(0, 1).reshape(batch, heads, tokens, lses.shape[3])
    return parts, lses


def supports_prefix_attention(
    q: torch.Tensor,
    prefix_keys: torch.Tensor,
    prefix_values: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tree: torch.Tensor,
    **_: Any,
) -> str | None:
    """None when the template takes these, else the reason."""
    for stores in ((prefix_keys, prefix_values), (keys, values)):
        reason = supports_cache_attention(q, *stores, tree)
        if reason is not None:
            return reason
    return None


implements("prefix_attention", PROVIDER, supports_prefix_attention)(prefix_attention)
