"""The pages with the highest scores, without sorting.

One program serves one key/value head of one row. Scores become integers of the same order; bisection finds
the largest number that at least ``keep`` pages reach, and one cumulative sum gives the chosen pages their
places. Bisection starts between the lowest and the highest score and stops as soon as exactly ``keep`` pages
reach its number, so that it takes about log2(range / gap at the threshold) steps, 32 at most.
"""

# (device functions have no types)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from graphwright.kernels.triton.launch import Launch

#: Scores that a program keeps in registers; of more than these, every step of the bisection reads all again.
RESIDENT = 8192
_CHUNK = 4096
# Rows of scores start at multiples of this many: 16 bytes are read at a time.
_ALIGNED = 4
# Of no page. The lowest score, -inf, becomes -2**31 + 2**23 - 1; the highest 2**31 - 2**23.
_ABSENT = tl.constexpr(-(2**31))
_ABOVE_ALL = tl.constexpr(2**31 - 1)


@triton.jit
def _keys(scores, start, used, BLOCK: tl.constexpr):
    """Scores ``start .. start + BLOCK`` as int32 of the same order; NaN is as -inf and -0.0 as 0.0."""
    page = start + tl.arange(0, BLOCK)
    # Whole groups of four, so that one instruction reads each; the rest of the last one is not used.
    score = tl.load(scores + page, mask=page // 4 < (used + 3) // 4, other=0.0)
    score = tl.where(score == score, score, float("-inf"))
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.where(page < used, bits ^ ((bits >> 31) & 0x7FFFFFFF), _ABSENT)


@triton.jit
def _reach(scores, keys, threshold, used, BLOCK: tl.constexpr, CHUNKED: tl.constexpr):
    """How many pages have a key of at least ``threshold``."""
    if not CHUNKED:
        return tl.sum((keys >= threshold).to(tl.int32))
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, used, BLOCK):
        count += (_keys(scores, start, used, BLOCK) >= threshold).to(tl.int32)
    return tl.sum(count)


@triton.jit
def _bounds(scores, keys, used, BLOCK: tl.constexpr, CHUNKED: tl.constexpr):
    """The lowest and the highest key, int64; there is at least one page."""
    lowest = tl.where(keys == _ABSENT, _ABOVE_ALL, keys)
    highest = keys
    if CHUNKED:
        for start in range(BLOCK, used, BLOCK):
            more = _keys(scores, start, used, BLOCK)
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


@triton.jit(do_not_specialize=["pitch", "limit", "keep", "groups"])
def select_pages_kernel(
    scores, pages_used, pages, counts, pitch, limit, keep, groups, BLOCK: tl.constexpr, CHUNKED: tl.constexpr
):
    """One program for each (b, g); ``limit`` is N and ``pitch`` the distance of rows of scores."""
    row = tl.program_id(0).to(tl.int64)
    used = tl.minimum(tl.load(pages_used + row // groups), limit).to(tl.int32)
    wanted = tl.minimum(used, keep)
    scores += row * (pitch // 4) * 4
    pages += row * keep
    tl.store(counts + row, wanted)
    for start in range(wanted, keep, BLOCK):
        place = start + tl.arange(0, BLOCK)
        tl.store(pages + place, tl.full([BLOCK], -1, tl.int32), mask=place < keep)
    if wanted > 0:
        keys = _keys(scores, 0, used, BLOCK)
        # At least ``wanted`` pages reach ``low``, fewer reach ``high + 1``; ``reached`` is of the last try.
        low, high = _bounds(scores, keys, used, BLOCK, CHUNKED)
        reached = used
        while (low < high) & (reached != wanted):
            middle = low + ((high - low + 1) >> 1)
            reached = _reach(scores, keys, middle.to(tl.int32), used, BLOCK, CHUNKED)
            enough = reached >= wanted
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle - 1)
        threshold = low.to(tl.int32)
        ties = wanted - _reach(scores, keys, threshold + 1, used, BLOCK, CHUNKED)
        above, equal = _write(pages, keys, 0, threshold, ties, 0, 0, BLOCK)
        if CHUNKED:
            for start in range(BLOCK, used, BLOCK):
                more = _keys(scores, start, used, BLOCK)
                above, equal = _write(pages, more, start, threshold, ties, above, equal, BLOCK)


def select_pages(
    scores: torch.Tensor, pages_used: torch.Tensor, keep: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``keep`` pages with the highest scores for each head, in ascending order.

    Among equal scores the lower page comes first; NaN is as low as -inf.

    Args:
        scores: ``[B, G, N]`` float32.
        pages_used: ``[B]`` int64: only the first ``pages_used[b]`` pages are there.
        keep: how many, at least 1.

    Returns:
        ``pages [B, G, keep]`` int32, -1 after the last one, and ``counts [B, G]`` int32, which are
        ``min(keep, pages_used[b])``.

    Raises:
        ValueError: ``keep`` is below 1.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; at least one page must be kept")
    batch, groups, limit = scores.shape
    pages = scores.new_empty((batch, groups, keep), dtype=torch.int32)
    counts = scores.new_empty((batch, groups), dtype=torch.int32)
    scores = _aligned(scores)
    block = _CHUNK if limit > RESIDENT else max(1024, triton.next_power_of_2(limit))
    arguments = {
        "scores": scores,
        "pages_used": pages_used,
        "pages": pages,
        "counts": counts,
        "pitch": scores.stride(1),
        "limit": limit,
        "keep": keep,
        "groups": groups,
    }
    Launch(
        select_pages_kernel,
        (batch * groups,),
        arguments,
        {"BLOCK": block, "CHUNKED": limit > block},
        num_warps=min(16, block // 256),
        num_stages=1,
        label=f"select_pages {block}{' chunked' if limit > block else ''}",
    ).run()
    return pages, counts


def empty_scores(like: torch.Tensor, batch: int, groups: int, limit: int) -> torch.Tensor:
    """Memory for scores ``[B, G, N]`` whose rows start where :func:`select_pages` wants them."""
    pitch = triton.cdiv(limit, _ALIGNED) * _ALIGNED
    return like.new_empty((batch, groups, pitch), dtype=torch.float32)[..., :limit]


def _aligned(scores: torch.Tensor) -> torch.Tensor:
    """The scores, copied if their rows are not one after the other, each at a multiple of 16 bytes."""
    batch, groups, limit = scores.shape
    pitch = scores.stride(1)
    even = scores.stride(2) == 1 and scores.stride(0) == groups * pitch >= limit
    if even and pitch % _ALIGNED == 0 and scores.storage_offset() % _ALIGNED == 0:
        return scores
    return empty_scores(scores, batch, groups, limit).copy_(scores)
