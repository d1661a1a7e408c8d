"""Scores of pages from the lowest and the highest key of each channel.

Source: Tang et al. 2024, "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference".

No key k of a page gives more than ``sum_d max(q_d * min_d, q_d * max_d)``. As ``min_d <= max_d``, that is
``max(q, 0) . max + min(q, 0) . min``: two products of matrices, so that many heads and tokens cost no more
time than one.
"""

# (device functions have no types)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from graphwright.kernels.triton.launch import Launch
from graphwright.kernels.triton.select_pages import empty_scores


@triton.jit(do_not_specialize=["tokens", "pitch", "limit", "groups"])
def page_scores_kernel(
    q,
    stride_b,
    stride_h,
    stride_t,
    summary,
    pages_used,
    scores,
    tokens,
    pitch,
    limit,
    groups,
    GROUP: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program for BLOCK_N pages of one (b, g); ``limit`` is N, ``pitch`` that of the rows of scores."""
    first = tl.program_id(0) * BLOCK_N
    head = tl.program_id(1).to(tl.int64)
    b = head // groups
    g = head % groups
    used = tl.minimum(tl.load(pages_used + b), limit)
    page = first + tl.arange(0, BLOCK_N)
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    if first < used:
        d = tl.arange(0, BLOCK_D)
        run = ((b * limit + page) * groups + g) * (2 * FEATURES)
        low = summary + run[None, :] + d[:, None]
        there = (page < used)[None, :] & (d < FEATURES)[:, None]
        lowest = tl.load(low, mask=there, other=0.0)
        highest = tl.load(low + FEATURES, mask=there, other=0.0)
        if lowest.dtype != q.dtype.element_ty:
            lowest = lowest.to(tl.float32)
            highest = highest.to(tl.float32)
        q += b * stride_b + g * GROUP * stride_h
        for start in range(0, tokens * GROUP, BLOCK_M):
            r = start + tl.arange(0, BLOCK_M)
            line = (r % GROUP).to(tl.int64) * stride_h + (r // GROUP).to(tl.int64) * stride_t
            within = (r < tokens * GROUP)[:, None] & (d < FEATURES)[None, :]
            query = tl.load(q + line[:, None] + d[None, :], mask=within, other=0.0).to(lowest.dtype)
            score = tl.dot(tl.maximum(query, 0.0).to(lowest.dtype), highest, input_precision="ieee")
            score = tl.dot(tl.minimum(query, 0.0).to(lowest.dtype), lowest, score, input_precision="ieee")
            score = tl.where((r < tokens * GROUP)[:, None], score, float("-inf"))
            best = tl.maximum(best, tl.max(score, axis=0))  # both pass over NaN
        best = tl.where(page < used, best, float("-inf"))
    tl.store(scores + head * pitch + page, best, mask=page < limit)


def page_scores(q: torch.Tensor, summary: torch.Tensor, pages_used: torch.Tensor) -> torch.Tensor:
    """For each page, the highest score that a query of the step can have with any of its keys.

    The maximum goes over the H / G query heads of a key/value head and over the T tokens; products that are
    not a number do not count. Pages at or beyond ``pages_used`` get -inf and are not read.

    Args:
        q: ``[B, H, T, D]`` float32, float16 or bfloat16.
        summary: ``[B, N, G, 2, D]``: the lowest and the highest finite key of each channel of a page.
        pages_used: ``[B]`` int64.

    Returns:
        ``[B, G, N]`` float32, in memory of :func:`empty_scores`.
    """
    batch, heads, tokens, features = q.shape
    limit, groups = summary.shape[1:3]
    group = heads // groups
    if q.stride(-1) != 1:
        q = q.contiguous()
    scores = empty_scores(q, batch, groups, limit)
    arguments = {
        "q": q,
        "stride_b": q.stride(0),
        "stride_h": q.stride(1),
        "stride_t": q.stride(2),
        "summary": summary.contiguous(),
        "pages_used": pages_used,
        "scores": scores,
        "tokens": tokens,
        "pitch": scores.stride(1),
        "limit": limit,
        "groups": groups,
    }
    # Both summaries of a program's pages stay in registers while the queries pass.
    width = max(16, triton.next_power_of_2(features))
    block_n = max(16, min(64, 2**14 // (width * max(q.element_size(), summary.element_size()))))
    constants = {
        "GROUP": group,
        "FEATURES": features,
        "BLOCK_M": 16,
        "BLOCK_N": block_n,
        "BLOCK_D": width,
    }
    Launch(
        page_scores_kernel,
        (triton.cdiv(limit, block_n), batch * groups),
        arguments,
        constants,
        num_warps=4,
        num_stages=1,
        label=f"page_scores d{features} g{group}",
    ).run()
    return scores
