"""Attention over a prefix that all rows of a batch share, and each row's own tokens behind it.

The prefix is stored once and read once a step: the queries of all rows and tokens meet it together, which
turns many products of a matrix and a vector into one of two matrices. Each row then attends over its own
tokens, and the two results are merged by their log-sum-exp. Source: Juravsky et al. 2024, "Hydragen:
High-Throughput LLM Inference with Shared Prefixes", sections 3.1 (decomposition) and 3.2 (inter-sequence
batching).
"""

from __future__ import annotations

import torch

from graphwright.ir.ops import cache_visibility, semantic_op

#: The graph input that says how many tokens of each row are committed after the prefix, ``[B]`` int64.
OWN_LENGTHS = "own_lengths"


def _prefix_attention_fake(q, prefix_keys, prefix_values, keys, values, *rest, **kw):  # type: ignore[no-untyped-def]
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], values.shape[3]))


@semantic_op(
    "prefix_attention(Tensor q, Tensor prefix_keys, Tensor prefix_values, Tensor keys, Tensor values, "
    "Tensor positions, Tensor lengths, Tensor counts, Tensor tree, float scale, float softcap=0.0, "
    "Tensor? sinks=None) -> Tensor",
    fake=_prefix_attention_fake,
)
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
    """``cache_attention`` without a window, over a shared prefix and each row's own cache.

    Args:
        q: ``[B, H, T, D]``.
        prefix_keys: ``[1, G, F, D]``; prefix_values: ``[1, G, F, E]``. Every row sees all F tokens, F >= 0.
        keys: ``[B, G, S, D]``; values: ``[B, G, S, E]``. Token p of a row, p >= F, lives in slot p - F.
        positions: ``[B, T]`` as in ``cache_attention``: absolute.
        lengths: ``[B]`` committed tokens of each row's own, those of the prefix not counted.
        counts, tree, scale, softcap, sinks: as in ``cache_attention``.

    Returns:
        ``[B, T, H, E]``, contiguous; zeros for padding rows t >= counts[b].
    """
    batch, heads, tokens, _ = q.shape
    groups, shared = keys.shape[1], prefix_keys.shape[2]
    # In float64, where the number of rows that a library multiplies together leaves no trace in the result.
    grouped = q.double().view(batch, groups, heads // groups, tokens, -1)
    scores = torch.cat(
        (
            torch.einsum("bghtd,gsd->bghts", grouped, prefix_keys[0].double()),
            torch.einsum("bghtd,bgsd->bghts", grouped, keys.double()),
        ),
        dim=-1,
    )
    scores = scores * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    valid = torch.arange(tokens, device=q.device)[None, :] < counts[:, None]
    own = cache_visibility(positions, lengths, counts, tree, keys.shape[2], 0)
    visible = torch.cat((valid[:, :, None].expand(-1, -1, shared), own), dim=-1)[:, None, None]
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:  # one more score, of a key without a value
        sink = sinks.double().view(1, groups, heads // groups, 1, 1).expand(batch, -1, -1, tokens, 1)
        scores = torch.cat((scores, sink), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : visible.shape[-1]]
    weights = torch.where(visible, weights, 0.0)  # a query that sees nothing gives zeros
    values_seen = torch.where(own.any(1)[:, None, :, None], values.double(), 0.0)
    out = torch.einsum("bghts,gse->btghe", weights[..., :shared], prefix_values[0].double())
    out = out + torch.einsum("bghts,bgse->btghe", weights[..., shared:], values_seen)
    return out.reshape(batch, tokens, heads, values.shape[-1]).to(q.dtype).contiguous()
