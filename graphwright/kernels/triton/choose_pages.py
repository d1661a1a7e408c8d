"""The pages that each query reads, ``choose_pages``, without sorting.

One program serves one query of one key/value head. Scores become integers of the same order; bisection finds
the largest number that enough pages reach, and one cumulative sum gives the chosen pages their places.
Enough is a number of pages, or with ``share`` less than that, once they have their part of the mass.
Bisection starts between the lowest and the highest score and, without ``share``, stops as soon as exactly as
many pages as are wanted reach its number: about log2(range / gap at the threshold) steps, 32 at most.

Mass is added up in whole numbers of 2**-48, which no order of summation changes.
"""

# (device functions have no types)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from graphwright.ir.sparse_ops import EVERYTHING, SPARSE_TOKENS
from graphwright.kernels.registry import implements
from graphwright.kernels.triton.launch import Launch
from graphwright.kernels.triton.score_pages import PROVIDER, candidates

#: Scores that a program keeps in registers; of more than these, every step of the bisection reads all again.
RESIDENT = 8192
_CHUNK = 4096
# Of no page. The lowest score, -inf, becomes -2**31 + 2**23 - 1; the highest 2**31 - 2**23.
_ABSENT = tl.constexpr(-(2**31))
_ABOVE_ALL = tl.constexpr(2**31 - 1)
_ONE = tl.constexpr(2.0**48)
_SHARE_BITS = 52


@triton.jit
def _keys(scores, start, low, high, BLOCK: tl.constexpr):
    """Scores ``start .. start + BLOCK`` as int32 of the same order, of pages in ``low .. high``.

    NaN is as -inf and -0.0 as 0.0.
    """
    page = start + tl.arange(0, BLOCK)
    there = (page >= low) & (page < high)
    score = tl.load(scores + page, mask=there, other=0.0)
    score = tl.where(score == score, score, float("-inf"))
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.where(there, bits ^ ((bits >> 31) & 0x7FFFFFFF), _ABSENT)


@triton.jit
def _mass(keys):
    """Scores above 0 in units of 2**-48, int64."""
    return (tl.maximum(keys, 0).to(tl.float32, bitcast=True) * _ONE).to(tl.int64)


@triton.jit
def _reach(
    scores, keys, threshold, low, high, BLOCK: tl.constexpr, CHUNKED: tl.constexpr, SHARED: tl.constexpr
):
    """How many pages have a key of at least ``threshold``, and with ``SHARED`` what mass."""
    mass = threshold.to(tl.int64) * 0
    if not CHUNKED:
        if SHARED:
            mass = tl.sum(tl.where(keys >= threshold, _mass(keys), 0))
        return tl.sum((keys >= threshold).to(tl.int32)), mass
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(low // BLOCK * BLOCK, high, BLOCK):
        own = _keys(scores, start, low, high, BLOCK)
        count += (own >= threshold).to(tl.int32)
        if SHARED:
            mass += tl.sum(tl.where(own >= threshold, _mass(own), 0))
    return tl.sum(count), mass


@triton.jit
def _bounds(scores, keys, low, high, BLOCK: tl.constexpr, CHUNKED: tl.constexpr):
    """The lowest and the highest key, int64; there is at least one page."""
    lowest = tl.where(keys == _ABSENT, _ABOVE_ALL, keys)
    highest = keys
    if CHUNKED:
        for start in range(BLOCK, high, BLOCK):
            more = _keys(scores, start, low, high, BLOCK)
            lowest = tl.minimum(lowest, tl.where(more == _ABSENT, _ABOVE_ALL, more))
            highest = tl.maximum(highest, more)
    return tl.min(lowest).to(tl.int64), tl.max(highest).to(tl.int64)


@triton.jit
def _write(pages, keys, start, threshold, ties, above, equal, BLOCK: tl.constexpr):
    """Write the chosen pages among ``keys``: those above the threshold and the first ``ties`` equal to it.

    ``above`` and ``equal`` count earlier pages of the two kinds; the result counts these as well.
    """
    higher = keys > threshold
    same = keys == threshold
    step = higher.to(tl.int32) | (same.to(tl.int32) << 16)  # both counts in one sum: BLOCK is below 2**15
    earlier = tl.cumsum(step) - step
    tied = equal + (earlier >> 16)
    place = above + (earlier & 0xFFFF) + tl.minimum(tied, ties)
    tl.store(pages + place, start + tl.arange(0, BLOCK), mask=higher | (same & (tied < ties)))
    total = tl.sum(step)
    return above + (total & 0xFFFF), equal + (total >> 16)


@triton.jit
def _write_run(pages, start, stop, BLOCK: tl.constexpr):
    """Write ``start .. stop`` in this order."""
    for done in range(0, stop - start, BLOCK):
        i = done + tl.arange(0, BLOCK)
        tl.store(pages + i, start + i, mask=i < stop - start)


@triton.jit
def _choose(
    scores, pages, low, high, wanted, share, BLOCK: tl.constexpr, CHUNKED: tl.constexpr, SHARED: tl.constexpr
):
    """Write the best of the pages ``low .. high``, at most ``wanted`` of them, which is above 0; how many."""
    keys = _keys(scores, 0, low, high, BLOCK)
    lowest, highest = _bounds(scores, keys, low, high, BLOCK, CHUNKED)
    goal = 0.0
    if SHARED:
        _, mass = _reach(scores, keys, lowest.to(tl.int32), low, high, BLOCK, CHUNKED, SHARED)
        goal = mass.to(tl.float64) * (share.to(tl.float64) * 2.0**-52)
        wanted = tl.where(goal > 0, wanted, 0)
    # Enough pages reach ``lowest``, too few reach ``highest + 1``; ``reached`` is of the last try.
    reached = high - low
    while (lowest < highest) & (SHARED | (reached != wanted)):
        middle = lowest + ((highest - lowest + 1) >> 1)
        reached, mass = _reach(scores, keys, middle.to(tl.int32), low, high, BLOCK, CHUNKED, SHARED)
        enough = reached >= wanted
        if SHARED:
            enough = enough | (mass.to(tl.float64) >= goal)
        lowest = tl.where(enough, middle, lowest)
        highest = tl.where(enough, highest, middle - 1)
    threshold = lowest.to(tl.int32)
    above, mass = _reach(scores, keys, threshold + 1, low, high, BLOCK, CHUNKED, SHARED)
    ties = wanted - above
    if SHARED:
        each = _mass(threshold).to(tl.float64)
        lacking = goal - mass.to(tl.float64)
        needed = tl.ceil(lacking / tl.where(each > 0, each, 1.0))
        ties = tl.where((each > 0) & (needed < ties), needed.to(tl.int32), ties)
    ties = tl.minimum(tl.maximum(ties, 0), high - low)
    before, equal = _write(pages, keys, 0, threshold, ties, 0, 0, BLOCK)
    if CHUNKED:
        for start in range(BLOCK, high, BLOCK):
            more = _keys(scores, start, low, high, BLOCK)
            before, equal = _write(pages, more, start, threshold, ties, before, equal, BLOCK)
    return before + tl.minimum(equal, ties)


@triton.jit(
    do_not_specialize=[
        "tokens", "limit", "groups", "page", "first", "recent", "settled", "sinks", "keep", "share",
    ]
)  # fmt: skip
def choose_pages_kernel(
    scores, positions, lengths, dense, pages, chosen, tokens, limit, groups, page, first, recent, settled,
    sinks, keep, share, BLOCK: tl.constexpr, CHUNKED: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """One program for each (b, t, g); ``limit`` is N, ``share`` in units of 2**-52."""
    row = tl.program_id(0).to(tl.int64)
    t = row // groups % tokens
    b = row // groups // tokens
    if t < tl.load(dense + b):
        tl.store(chosen + row, -1)
    else:
        positions += b * tokens
        so_far = tl.maximum(tl.load(positions + t) + 1 - first, 0) + page - 1
        so_far = (so_far // page).to(tl.int32)
        closed = candidates(positions, tl.load(lengths + b), t, t < tokens, page, first, recent, settled)
        held = tl.minimum(so_far, limit)
        closed = tl.minimum(closed, held)
        low = tl.minimum(sinks, closed)  # pages below it and from ``closed`` on are read in any case
        budget = tl.ceil(so_far.to(tl.float32) * keep).to(tl.int32)
        wanted = tl.minimum(budget - (held - (closed - low)), closed - low)
        scores += row * limit
        pages += row * limit
        _write_run(pages, 0, low, BLOCK)
        taken = 0
        if wanted > 0:
            taken = _choose(scores, pages + low, low, closed, wanted, share, BLOCK, CHUNKED, SHARED)
        _write_run(pages + low + taken, closed, held, BLOCK)
        tl.store(chosen + row, low + taken + held - closed)


def choose_pages(
    scores: torch.Tensor,
    positions: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    dense: torch.Tensor,
    page: int,
    first: int,
    recent: int,
    settled: int,
    sinks: int,
    keep: float,
    share: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The semantic op ``choose_pages``."""
    batch, tokens, groups, limit = scores.shape
    pages = scores.new_empty(scores.shape, dtype=torch.int32)
    if tokens > SPARSE_TOKENS:
        return pages, scores.new_full(scores.shape[:3], EVERYTHING, dtype=torch.int32)
    chosen = scores.new_empty(scores.shape[:3], dtype=torch.int32)
    block = _CHUNK if limit > RESIDENT else max(1024, triton.next_power_of_2(limit))
    Launch(
        choose_pages_kernel,
        (batch * tokens * groups,),
        {
            "scores": scores,
            "positions": positions.contiguous(),
            "lengths": lengths,
            "dense": dense,
            "pages": pages,
            "chosen": chosen,
            "tokens": tokens,
            "limit": limit,
            "groups": groups,
            "page": page,
            "first": first,
            "recent": recent,
            "settled": settled,
            "sinks": sinks,
            "keep": float(keep),
            "share": round(share * 2**_SHARE_BITS),
        },
        {"BLOCK": block, "CHUNKED": limit > block, "SHARED": bool(share)},
        num_warps=min(16, block // 256),
        num_stages=1,
        label=f"choose_pages {block}{' chunked' if limit > block else ''}{' by mass' if share else ''}",
    ).run()
    return pages, chosen


def supports_choose_pages(scores: torch.Tensor, **_: Any) -> str | None:
    """None when the kernel takes these, else the reason."""
    if scores.dtype != torch.float32:
        return f"scores of {scores.dtype}"
    return None if scores.is_contiguous() else "scores are not contiguous"


implements("choose_pages", PROVIDER, supports_choose_pages)(choose_pages)
