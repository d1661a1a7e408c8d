"""The share of attention that pages are estimated to have: ``score_pages`` for two selectors.

``bounds`` (Tang et al. 2024, "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference"): no key
of a page gives more than ``sum_d max(q_d * low_d, q_d * high_d)``. As ``low_d <= high_d``, that is
``max(q, 0) . high + min(q, 0) . low``: two products of matrices, so that many heads and tokens cost no more
time than one. ``mean`` is one product with the mean key.

The first launch leaves every query head's scores and, of each block of pages, their maximum and sum of
exponentials; the second makes shares of them and averages those of a group's heads. A query's bits depend on
nothing else that the step has: rows of a tile are multiplied alike, and blocks lie at fixed pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from graphwright.ir.selectors import parse_selector
from graphwright.ir.sparse_ops import SPARSE_TOKENS
from graphwright.kernels.registry import implements
from graphwright.kernels.triton.launch import Launch

PROVIDER = "triton"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_WIDTH = 256
# Selectors with a kernel; whether each page has two rows of extremes.
_BOUNDS = {"bounds": True, "mean": False}
_ROWS = 16
# Scores that a program of the second launch holds, of all heads of a group.
_SHARES = 2048


@triton.jit
def candidates(positions, length, t, inside, page, first, recent, settled):
    """M of the queries ``t`` of a row: how many pages may be chosen from (``ir/sparse_ops.py``)."""
    position = tl.load(positions + t, mask=inside, other=-1)
    closed = tl.minimum(position + 1 - recent, length - settled) - first
    return (tl.maximum(closed, 0) // page).to(tl.int32)


@triton.jit(
    do_not_specialize=[
        "stride_b", "stride_h", "stride_t", "scale", "tokens", "limit", "groups", "page", "first", "recent",
        "settled",
    ]
)  # fmt: skip
def score_pages_kernel(
    q, stride_b, stride_h, stride_t, summary, positions, lengths, scores, tops, totals, scale, tokens, limit,
    groups, page, first, recent, settled,
    GROUP: tl.constexpr, FEATURES: tl.constexpr, BOUNDS: tl.constexpr, MOST_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores of ``BLOCK_N`` pages for all queries of one (b, g); grid (blocks of pages, B * G).

    Args:
        summary: ``[B, N, G, 2, D]``, or ``[B, N, G, D]`` without ``BOUNDS``; limit: N.
        scores: ``[B, G, T, H/G, N]`` float32; only those of blocks with candidates are written.
        tops, totals: ``[B, G, T, H/G, blocks]`` float32, likewise: each block's maximum, and its sum of
            exponentials of what is below it.
    """
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    head = tl.program_id(1).to(tl.int64)
    b = head // groups
    g = head % groups
    positions += b * tokens
    length = tl.load(lengths + b)
    every = tl.arange(0, MOST_TOKENS)
    most = tl.max(candidates(positions, length, every, every < tokens, page, first, recent, settled), 0)
    if block * BLOCK_N < most:
        number = block * BLOCK_N + tl.arange(0, BLOCK_N)
        d = tl.arange(0, BLOCK_D)
        WIDTH: tl.constexpr = 2 * FEATURES if BOUNDS else FEATURES
        pointers = summary + (((b * limit + number) * groups + g) * WIDTH)[None, :] + d[:, None]
        there = (number < most)[None, :] & (d < FEATURES)[:, None]
        low = tl.load(pointers, mask=there, other=0.0)  # or the mean
        if BOUNDS:
            high = tl.load(pointers + FEATURES, mask=there, other=0.0)
        q += b * stride_b + g * GROUP * stride_h
        rows = tokens * GROUP
        for start in range(0, rows, BLOCK_M):
            r = start + tl.arange(0, BLOCK_M)
            t = r // GROUP
            line = (r % GROUP).to(tl.int64) * stride_h + t.to(tl.int64) * stride_t
            within = (r < rows)[:, None] & (d < FEATURES)[None, :]
            query = tl.load(q + line[:, None] + d[None, :], mask=within, other=0.0)
            if BOUNDS:
                score = tl.dot(tl.maximum(query, 0.0).to(low.dtype), high, input_precision="ieee")
                score = tl.dot(tl.minimum(query, 0.0).to(low.dtype), low, score, input_precision="ieee")
            else:
                score = tl.dot(query, low, input_precision="ieee")
            closed = candidates(positions, length, t, r < rows, page, first, recent, settled)
            score = tl.where(number[None, :] < closed[:, None], score * scale, float("-inf"))
            top = tl.max(score, 1)
            weights = tl.exp(score - tl.where(top == float("-inf"), 0.0, top)[:, None])
            row = head * rows + r
            inside = (r < rows)[:, None] & (number < limit)[None, :]
            tl.store(scores + row[:, None] * limit + number[None, :], score, mask=inside)
            tl.store(tops + row * blocks + block, top, mask=r < rows)
            tl.store(totals + row * blocks + block, tl.sum(weights, 1), mask=r < rows)


@triton.jit(do_not_specialize=["tokens", "limit", "groups", "blocks", "page", "first", "recent", "settled"])
def share_pages_kernel(
    scores, tops, totals, positions, lengths, shares, tokens, limit, groups, blocks, page, first, recent,
    settled, GROUP: tl.constexpr, HEADS: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Shares of ``WIDE`` pages for one query, averaged over the heads of a group; grid (B * T * G, ..).

    Args:
        scores, tops, totals: of the first launch, in blocks of ``BLOCK_N`` pages.
        shares: ``[B, T, G, N]`` float32; 0 for pages that are no candidates.
        HEADS: a power of two, the heads of a group at least. STEP: blocks that are read at once.
    """
    query = tl.program_id(0).to(tl.int64)
    g = query % groups
    t = query // groups % tokens
    b = query // groups // tokens
    closed = candidates(
        positions + b * tokens, tl.load(lengths + b), t, t < tokens, page, first, recent, settled
    )
    h = tl.arange(0, HEADS)
    row = ((b * groups + g) * tokens + t) * GROUP + h
    top = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    used = tl.cdiv(closed, BLOCK_N)
    for start in range(0, used, STEP):
        block = start + tl.arange(0, STEP)
        there = (h < GROUP)[:, None] & (block < used)[None, :]
        at = row[:, None] * blocks + block[None, :]
        own = tl.load(tops + at, mask=there, other=float("-inf"))
        sums = tl.load(totals + at, mask=there, other=0.0)
        new_top = tl.maximum(top, tl.max(own, 1))
        anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - anchor) + tl.sum(sums * tl.exp(own - anchor[:, None]), 1)
        top = new_top
    number = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    there = (h < GROUP)[:, None] & (number < closed)[None, :]
    score = tl.load(scores + row[:, None] * limit + number[None, :], mask=there, other=float("-inf"))
    weights = tl.exp(score - tl.where(top == float("-inf"), 0.0, top)[:, None])
    share = tl.sum(weights / tl.where(total > 0, total, 1.0)[:, None], 0) / GROUP
    tl.store(shares + query * limit + number, share, mask=number < limit)


def score_pages(
    q: torch.Tensor,
    summary: Sequence[torch.Tensor],
    constants: Sequence[torch.Tensor],
    positions: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    dense: torch.Tensor,
    selector: str,
    groups: int,
    page: int,
    first: int,
    recent: int,
    settled: int,
    scale: float,
) -> torch.Tensor:
    """The semantic op ``score_pages``."""
    batch, heads, tokens, features = q.shape
    (kept,) = summary
    limit, group = int(kept.shape[1]), heads // groups
    shares = q.new_empty((batch, tokens, groups, limit), dtype=torch.float32)
    if tokens > SPARSE_TOKENS or 0 in shares.shape:
        return shares
    q = q if q.stride(3) == 1 else q.contiguous()
    # The summaries of a program's pages stay in registers while the queries pass.
    width = max(16, triton.next_power_of_2(features))
    block_n = max(16, min(64, 2**14 // (width * q.element_size())))
    blocks = triton.cdiv(limit, block_n)
    scores = q.new_empty((batch, groups, tokens, group, limit), dtype=torch.float32)
    tops, totals = (q.new_empty((batch, groups, tokens, group, blocks), dtype=torch.float32) for _ in "ab")
    step = {"page": page, "first": first, "recent": recent, "settled": settled}
    Launch(
        score_pages_kernel,
        (blocks, batch * groups),
        {
            "q": q,
            "stride_b": q.stride(0),
            "stride_h": q.stride(1),
            "stride_t": q.stride(2),
            "summary": kept,
            "positions": positions.contiguous(),
            "lengths": lengths,
            "scores": scores,
            "tops": tops,
            "totals": totals,
            "scale": scale,
            "tokens": tokens,
            "limit": limit,
            "groups": groups,
            **step,
        },
        {
            "GROUP": group,
            "FEATURES": features,
            "BOUNDS": _BOUNDS[parse_selector(selector).name],
            "MOST_TOKENS": SPARSE_TOKENS,
            "BLOCK_M": _ROWS,
            "BLOCK_N": block_n,
            "BLOCK_D": width,
        },
        num_warps=4,
        num_stages=1,
        label=f"score_pages {selector} d{features} g{group}",
    ).run()
    padded = triton.next_power_of_2(group)
    wide = max(64, _SHARES // padded)
    Launch(
        share_pages_kernel,
        (batch * tokens * groups, triton.cdiv(limit, wide)),
        {
            "scores": scores,
            "tops": tops,
            "totals": totals,
            "positions": positions.contiguous(),
            "lengths": lengths,
            "shares": shares,
            "tokens": tokens,
            "limit": limit,
            "groups": groups,
            "blocks": blocks,
            **step,
        },
        {"GROUP": group, "HEADS": padded, "BLOCK_N": block_n, "WIDE": wide, "STEP": 64},
        num_warps=4,
        num_stages=1,
        label=f"share_pages g{group}",
    ).run()
    return shares


def supports_score_pages(
    q: torch.Tensor, summary: Sequence[torch.Tensor], selector: str, **_: Any
) -> str | None:
    """None when the kernels take these, else the reason."""
    if parse_selector(selector).name not in _BOUNDS:
        return f"no kernel scores pages by {selector}"
    if q.dtype not in DTYPES or summary[0].dtype != q.dtype:
        return f"queries of {q.dtype} and summaries of {summary[0].dtype}"
    if q.shape[3] > MAX_WIDTH:
        return f"a head of {q.shape[3]} features is above {MAX_WIDTH}"
    return None if summary[0].is_contiguous() else "a summary is not contiguous"


implements("score_pages", PROVIDER, supports_score_pages)(score_pages)
