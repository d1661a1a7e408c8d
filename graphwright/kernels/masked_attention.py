"""Attention of long steps under a mask of blocks: FlexAttention, and the same without a compiler.

FlexAttention (Dong et al. 2024, "Flex Attention: A Programming Model for Generating Optimized Attention
Kernels") skips the blocks that its ``BlockMask`` leaves out, on GPUs and, compiled by Inductor, on CPUs too.
Measured on two cores of a processor with AVX-512 (512 queries over 8,192 tokens, 9 heads of 64 features):
time is in proportion to the blocks that are kept, whether or not whole ones are named as such, and blocks of
128 tokens take 0.94 of what blocks of 64 take. Without a compiler, what a query block sees is gathered and
multiplied.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from graphwright.ir.prefill_masks import Mask, visible_blocks
from graphwright.ir.prefill_masks.mask import LongStep
from graphwright.ir.prefill_ops import for_heads, masked_attention

#: Kinds of steps (dtypes, one row or several, heads alike or not) that may be compiled: beyond, an error.
_MOST_KINDS = 256


@dataclass(frozen=True)
class LongAttention:
    """A way to run the rows of a step that attend under a mask.

    Attributes:
        flex: by compiled FlexAttention; otherwise block by block.
        mask: the rule.
        scale, softcap: of the scores.
    """

    flex: bool
    mask: Mask
    scale: float
    softcap: float

    def __call__(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        lengths: torch.Tensor,
        counts: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """``[B, T, H, E]`` as ``prefill_attention`` gives it, but for rows of at most 64 valid tokens."""
        step = LongStep(q, keys, lengths, counts, self.scale, self.mask.block)
        run = self._by_flex if self.flex else self._by_blocks
        out = run(step, values, visible_blocks(self.mask, step), sinks).transpose(1, 2)
        padding = torch.arange(q.shape[2], device=q.device) >= counts[:, None]
        return out.masked_fill(padding[:, :, None, None], 0.0).contiguous()

    # --- compiled --------------------------------------------------------------------------------

    def _by_flex(
        self, step: LongStep, values: torch.Tensor, blocks: torch.Tensor, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        tokens, slots = step.q.shape[2], step.keys.shape[2]
        number = torch.arange(step.key_blocks, device=blocks.device)
        # The last of its tokens is one that the first query sees: no need to compare token by token.
        full = ((number + 1) * step.block <= step.first[..., None] + 1) & (step.last >= step.first)[..., None]
        lists = (*_listed(blocks & ~full[:, None]), *_listed(blocks & full[:, None]))
        # For each head, alike or not: one kind of step less to compile.
        given = tuple(for_heads(x, step.q.shape[1]) for x in lists)
        limits = (step.lengths, step.lengths + step.counts - 1)
        mask = _block_mask(given, step.block, _causal(*limits), (tokens, slots))
        # A tensor of its own: dynamo compiles anew for views of other tensors.
        q = step.q.clone(memory_format=torch.contiguous_format)
        options: dict[str, Any] = {"scale": self.scale, "block_mask": mask, "enable_gqa": True}
        if self.softcap:
            options["score_mod"] = _capped(torch.tensor(self.softcap, device=blocks.device))
        if sinks is None:
            out: torch.Tensor = _compiled(q, step.keys, values, **options)
            return out
        from torch.nn.attention.flex_attention import AuxRequest

        out, aux = _compiled(q, step.keys, values, return_aux=AuxRequest(lse=True), **options)
        # A sink takes exp(sink) of the softmax's sum and adds nothing to the result.
        share = torch.sigmoid(aux.lse - sinks.float()[:, None])
        return (out * share[..., None]).to(out.dtype)

    # --- block by block --------------------------------------------------------------------------

    def _by_blocks(
        self, step: LongStep, values: torch.Tensor, blocks: torch.Tensor, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        outs = []
        for index, queries in enumerate(step.q.split(step.block, 2)):
            outs.append(self._query_block(step, queries, values, blocks[:, :, index], index, sinks))
        return torch.cat(outs, 2)

    def _query_block(
        self,
        step: LongStep,
        q: torch.Tensor,
        values: torch.Tensor,
        blocks: torch.Tensor,
        index: int,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """``q [B, H, t, D]`` over the blocks ``[B, M, N]`` that it sees: ``[B, H, t, E]``."""
        slots, groups = step.keys.shape[2], step.keys.shape[1]
        numbers, lists = _listed(blocks)
        lists = lists[..., : int(numbers.max())]
        token = (lists[..., None] * step.block + torch.arange(step.block, device=q.device)).flatten(2)
        listed = torch.arange(lists.shape[2], device=q.device) < numbers[..., None]
        position = step.lengths[:, None] + index * step.block + torch.arange(q.shape[2], device=q.device)
        newest = step.lengths + step.counts - 1
        seen = token[:, :, None] <= torch.minimum(position, newest[:, None])[:, None, :, None]
        seen = seen & listed.repeat_interleave(step.block, 2)[:, :, None]  # [B, M, t, n]
        # What is shared by the heads of a group is gathered once.
        heads = max(groups, blocks.shape[1])
        unused = (token > newest[:, None, None]).expand(-1, heads, -1)[..., None]
        token = token.clamp(max=slots - 1).expand(-1, heads, -1)
        k, v = (_rows(x, token).masked_fill(unused, 0.0) for x in (step.keys, values))
        return masked_attention(
            q, k, v, for_heads(seen, q.shape[1]), self.scale, self.softcap, sinks
        ).transpose(1, 2)


def _rows(store: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Slots ``[B, H, n]`` of ``store [B, G, S, D]``, H a multiple of G: ``[B, H, n, D]``."""
    row = torch.arange(store.shape[0], device=store.device)[:, None, None]
    group = torch.arange(token.shape[1], device=store.device) // (token.shape[1] // store.shape[1])
    return store[row, group[None, :, None], token.long()]


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``[..., N]`` bool as how many and which, in order, the others behind: int32."""
    which = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), which.to(torch.int32)


# --- FlexAttention -------------------------------------------------------------------------------


def _block_mask(
    lists: tuple[torch.Tensor, ...], block: int, rule: Callable[..., torch.Tensor], sizes: tuple[int, int]
) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    # The lists by keys are for gradients.
    takes = inspect.signature(BlockMask.from_kv_blocks).parameters
    options = {"compute_q_blocks": False} if "compute_q_blocks" in takes else {}
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=block, mask_mod=rule, seq_lengths=sizes, **options)


def _causal(lengths: torch.Tensor, newest: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Query t of row b sees the slots up to its position; a padding query those that hold a token."""

    def sees(b: torch.Tensor, h: torch.Tensor, t: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        return slot <= torch.minimum(lengths[b] + t, newest[b])

    return sees


def _capped(softcap: torch.Tensor) -> Callable[..., torch.Tensor]:
    """``softcap []`` float32: as a number it would be a symbol, which Inductor's subgraphs do not take."""

    def capped(score: torch.Tensor, *_where: torch.Tensor) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


@cache
def _flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _compiled(*args: Any, **options: Any) -> Any:
    """FlexAttention, compiled once for each kind of step in the process."""
    import torch._dynamo

    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=_MOST_KINDS):
        return _flex()(*args, **options)
