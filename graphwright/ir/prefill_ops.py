"""The semantic op of sparse prefill: ``cache_attention`` whose long steps attend under a mask of blocks."""

from __future__ import annotations

import torch

from graphwright.ir.ops import cache_attention, semantic_op
from graphwright.ir.prefill_masks import DENSE_TOKENS, LongStep, parse_mask, visible_blocks


def _fake(q, keys, values, *rest, **kw):  # type: ignore[no-untyped-def]
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], values.shape[3]))


@semantic_op(
    "prefill_attention(Tensor q, Tensor keys, Tensor values, Tensor positions, Tensor lengths, "
    "Tensor counts, Tensor tree, str mask, float scale, int window=0, float softcap=0.0, Tensor? sinks=None, "
    "Tensor? pages=None, Tensor? chosen=None, int page=0, int first=0) -> Tensor",
    fake=_fake,
)
def prefill_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    tree: torch.Tensor,
    mask: str,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    pages: torch.Tensor | None = None,
    chosen: torch.Tensor | None = None,
    page: int = 0,
    first: int = 0,
) -> torch.Tensor:
    """``cache_attention``, but that rows with more than 64 tokens in the step attend under a mask of blocks.

    Args:
        q, keys, values, positions, lengths, counts, tree, scale, softcap, sinks: as in ``cache_attention``.
            Slots that hold no token must be finite.
        mask: which blocks of the cache a block of queries sees (:mod:`graphwright.ir.prefill_masks`).
        window: 0; stores with a window are short already.
        pages, chosen, page, first: what queries of short steps read; rows of long steps ignore them.

    Returns:
        ``[B, T, H, E]``, contiguous; zeros for padding rows t >= counts[b].
    """
    if window:
        raise ValueError("prefill_attention takes no stores with a window")
    options = {} if pages is None else {"pages": pages, "chosen": chosen, "page": page, "first": first}
    short = (positions, lengths, counts, tree, scale, window, softcap, sinks)
    if q.shape[2] <= DENSE_TOKENS:
        return cache_attention(q, keys, values, *short, **options)
    visible = token_visibility(mask, q, keys, lengths, counts, scale)
    return masked_attention(q, keys, values, visible, scale, softcap, sinks)


def token_visibility(
    mask: str, q: torch.Tensor, keys: torch.Tensor, lengths: torch.Tensor, counts: torch.Tensor, scale: float
) -> torch.Tensor:
    """Which slots each query of a long step sees: ``[B, H, T, S]`` bool."""
    rule = parse_mask(mask)
    step = LongStep(q, keys, lengths, counts, scale, rule.block)
    heads, tokens, slots = q.shape[1], q.shape[2], keys.shape[2]
    blocks = for_heads(visible_blocks(rule, step), heads)
    column, slot = torch.arange(tokens, device=q.device), torch.arange(slots, device=q.device)
    kept = blocks[:, :, column // rule.block][..., slot // rule.block]
    kept = kept | (counts <= DENSE_TOKENS)[:, None, None, None]
    causal = slot <= (lengths[:, None] + column)[..., None]
    valid = column < counts[:, None]
    return kept & (causal & valid[..., None])[:, None]


def for_heads(blocks: torch.Tensor, heads: int) -> torch.Tensor:
    """``[B, M, ...]`` of one, of each key/value head or of each query head as ``[B, H, ...]``, new."""
    return blocks.index_select(1, torch.arange(heads, device=blocks.device) // (heads // blocks.shape[1]))


def masked_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Softmax attention in float32; ``visible [B, H, T, S]``. A query that sees nothing gives zeros."""
    group = q.shape[1] // keys.shape[1]
    scores = (q.float() @ keys.float().repeat_interleave(group, 1).transpose(2, 3)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    top = scores.amax(-1, keepdim=True)
    sink = None if sinks is None else sinks.float().view(1, -1, 1, 1)
    if sink is not None:
        top = torch.maximum(top, sink)
    top = top.masked_fill(top == float("-inf"), 0.0)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - top)
    weights = weights / total.masked_fill(total == 0, 1.0)
    out = weights @ values.float().repeat_interleave(group, 1)
    return out.transpose(1, 2).to(q.dtype).contiguous()
