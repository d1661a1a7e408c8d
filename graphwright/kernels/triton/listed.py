"""The attention template over lists of pages: every query of a step reads its own.

A program owns one query token of one key/value head and a *split* of what its list holds. The rows of its
tile are the heads of the group, so that a token does the same whatever else the step has. Splits share a
list evenly: how much is read is known to the device only. A list has its pages in ascending order; the last
entries are of pages that are not packed yet, whose tokens lie in the tail.

Tokens are counted along the list: those before the first page, those of listed pages one after the other,
and, in trees and for queries that read everything, those after the last listed page.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphwright.kernels.triton.attend import attend_pages, attend_slots, leave_split
from graphwright.kernels.triton.page_tiles import as_float, load_rows, near_one, zeros_like_parts


@triton.jit
def entries_past(pages, entries, filled, MOST: tl.constexpr):
    """How many of the last ``MOST`` entries of a list are pages from ``filled`` on."""
    place = entries - 1 - tl.arange(0, MOST)
    number = tl.load(pages + place, mask=place >= 0, other=-1)
    return tl.sum((number >= filled).to(tl.int32))


@triton.jit
def numbers_along(i, pages, entries, first_number, head, FIRST: tl.constexpr, PAGE: tl.constexpr):
    """The numbers of the tokens at ``i`` of a list of ``entries`` pages, ``head`` tokens before them.

    Past the list its last page goes on; without entries ``first_number`` comes after the head.
    """
    n = i - head
    entry = tl.maximum(tl.minimum(n // PAGE, entries - 1), 0)
    listed = tl.load(pages + entry, mask=entry < entries, other=0) * PAGE + FIRST
    start = tl.where(entries > 0, listed, first_number)
    return tl.where(n < 0, i, start + n - entry * PAGE)


@triton.jit(
    do_not_specialize=[
        "batch_stride", "head_stride", "token_stride", "turned_batch_stride", "turned_head_stride",
        "turned_token_stride", "scale", "softcap", "tokens", "slots", "places", "page_splits", "splits",
        "limit",
    ]
)  # fmt: skip
def attend_listed(
    q, turned, keys, values, first_keys, first_values,
    key_codes, key_constants, key_scales, key_scale_constants,
    value_codes, value_constants, value_scales, value_scale_constants,
    packed, positions, lengths, counts, tree, out, lse,
    batch_stride, head_stride, token_stride, turned_batch_stride, turned_head_stride, turned_token_stride,
    scale, softcap, tokens, slots, places, page_splits, pages, chosen, splits, limit,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    KEY_TILE: tl.constexpr, VALUE_TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr, TREE: tl.constexpr, PAGED: tl.constexpr, MOST_PAST: tl.constexpr,
    FIRST: tl.constexpr, PAGE: tl.constexpr, HALF: tl.constexpr, LIFTED: tl.constexpr,
    K_LEVEL: tl.constexpr, K_OPTION: tl.constexpr, K_PARTS: tl.constexpr, K_UNIT: tl.constexpr,
    K_SHIFT: tl.constexpr, K_SCALE: tl.constexpr, K_AXIS: tl.constexpr, K_SCALE_OPTION: tl.constexpr,
    K_FLOAT: tl.constexpr,
    V_LEVEL: tl.constexpr, V_OPTION: tl.constexpr, V_PARTS: tl.constexpr, V_UNIT: tl.constexpr,
    V_SHIFT: tl.constexpr, V_SCALE: tl.constexpr, V_AXIS: tl.constexpr, V_SCALE_OPTION: tl.constexpr,
    V_FLOAT: tl.constexpr,
):  # fmt: skip
    """One split of one query token's list; grid (splits * T, tiles of the group's heads x G, B).

    Args:
        pages, chosen: ``[B, T, G, limit]`` and ``[B, T, G]`` int32, as in ``cache_attention``.
        splits, page_splits: of a token, those that read packed pages first. Of the others, a cache without
            packed pages has several, and the tail of one with pages has one.
        MOST_PAST: a power of two, at least the pages that the tail can hold a part of.
        The others as in :func:`~graphwright.kernels.triton.attend.attend`.
    """
    split = tl.program_id(0) % splits
    t = tl.program_id(0) // splits
    g = tl.program_id(1) % GROUPS
    m = tl.program_id(1) // GROUPS * BLOCK_M + tl.arange(0, BLOCK_M)
    b = tl.program_id(2)
    head = g * GROUP + m
    inside = m < GROUP
    length = tl.load(lengths + b)
    count = tl.load(counts + b)
    live = t < count
    query_row = ((b * tokens + t) * GROUPS + g).to(tl.int64)
    own = tl.load(chosen + query_row)
    everything = own < 0
    entries = tl.where(live, tl.maximum(own, 0), 0)
    pages += query_row * limit
    row_seen = inside & live
    row_token = m * 0 + t
    position = tl.zeros([BLOCK_M], tl.int64)  # for windows, which lists do not go with
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = zeros_like_parts(V_PARTS, BLOCK_M, VALUE_TILE)
    lift = 0.0
    done = length * 0
    filled = 0
    past = entries
    if PAGED:
        done = tl.load(packed + b)
        filled = (tl.maximum(done - FIRST, 0) // PAGE).to(tl.int32)
        past = entries_past(pages, entries, filled, MOST_PAST)
    if PAGED and split < page_splits:
        lift = LIFTED
        rows = b.to(tl.int64) * turned_batch_stride + head * turned_head_stride + t * turned_token_stride
        query = load_rows(turned + rows[:, None], inside[:, None], K_PARTS, KEY_WIDTH, KEY_TILE)
        peak = total
        query_sum = total
        if K_FLOAT:
            query = (query[0].to(q.dtype.element_ty),)
        else:
            query, peak, query_sum = near_one(as_float(query, K_PARTS), K_PARTS, HALF)
        available = tl.where(everything & live, filled, entries - past)
        share = tl.cdiv(available, page_splits)
        BLOCKS: tl.constexpr = PAGE // BLOCK_N
        stop = tl.minimum((split + 1) * share, available)
        for block in range(split * share * BLOCKS, stop * BLOCKS):
            place = block // BLOCKS
            number = tl.load(pages + place, mask=place < entries, other=0)
            number = tl.where(everything, place, number)
            row = (b.to(tl.int64) * places + number % places) * GROUPS + g
            tile = block % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
            top, total, sums = attend_pages(
                query, peak, query_sum, number, tile, row_seen, position, top, total, sums,
                key_codes, key_constants, key_scales, key_scale_constants,
                value_codes, value_constants, value_scales, value_scale_constants, row, g, scale, softcap,
                SOFTCAP, 0, FIRST, PAGE, LIFTED, HALF, q.dtype.element_ty,
                KEY_WIDTH, VALUE_WIDTH, KEY_TILE, VALUE_TILE,
                K_LEVEL, K_OPTION, K_PARTS, K_UNIT, K_SHIFT, K_SCALE, K_AXIS, K_SCALE_OPTION, K_FLOAT,
                V_LEVEL, V_OPTION, V_PARTS, V_UNIT, V_SHIFT, V_SCALE, V_AXIS, V_SCALE_OPTION, V_FLOAT,
            )  # fmt: skip
    else:
        plain_rows = b.to(tl.int64) * batch_stride + head * head_stride + t * token_stride
        plain = load_rows(q + plain_rows[:, None], inside[:, None], K_PARTS, KEY_WIDTH, KEY_TILE)
        visible = tl.zeros([BLOCK_M], tl.int64)
        if TREE:
            visible = tl.load(tree + b * tokens + row_token, mask=inside, other=0)
        store = (b * GROUPS + g).to(tl.int64)
        own_positions = positions + b * tokens
        before = FIRST  # tokens before the first page that are in slots
        if PAGED and FIRST > 0:
            early = tl.minimum(done, FIRST).to(tl.int32)
            before = FIRST - early
            for start in tl.range(0, tl.where(live, early, 0), BLOCK_N, num_stages=1):
                slot = start + tl.arange(0, BLOCK_N)
                top, total, sums = attend_slots(
                    plain, first_keys + store * FIRST * KEY_WIDTH, first_values + store * FIRST * VALUE_WIDTH,
                    slot, slot < early, slot.to(tl.int64), slot.to(tl.int64) - FIRST, row_token, row_seen,
                    position, own_positions, visible, top, total, sums, scale, softcap,
                    SOFTCAP, 0, TREE, KEY_WIDTH, VALUE_WIDTH, KEY_TILE, VALUE_TILE, K_PARTS, V_PARTS,
                )  # fmt: skip
        whole = length + count
        unpacked = FIRST + filled * PAGE  # the first number after the packed pages
        listed = before + past * PAGE
        end = numbers_along(listed - 1, pages + entries - past, past, unpacked, before, FIRST, PAGE) + 1
        end = tl.where(past > 0, end, unpacked)
        # A tree's tokens may lie beyond the page of their position; no list has them.
        reach = whole if TREE else length + t + 1
        more = tl.maximum(reach - end, 0).to(tl.int32)
        if not TREE:
            more = tl.where(everything, more, 0)
        along = tl.where(live, listed + more, 0)
        # Even shares, in whole tiles: they depend on nothing but the list.
        share = tl.cdiv(tl.cdiv(along, splits - page_splits), BLOCK_N) * BLOCK_N
        begin = (split - page_splits) * share
        # Beside pages this loop is short: stages for it would cost the pages' loop shared memory.
        STAGES: tl.constexpr = 1 if PAGED else None
        for start in tl.range(begin, tl.minimum(begin + share, along), BLOCK_N, num_stages=STAGES):
            i = start + tl.arange(0, BLOCK_N)
            number = numbers_along(i, pages + entries - past, past, unpacked, before, FIRST, PAGE)
            held = (i < along) & (number < whole)
            slot = number % slots
            number = number.to(tl.int64)
            top, total, sums = attend_slots(
                plain, keys + store * slots * KEY_WIDTH, values + store * slots * VALUE_WIDTH,
                slot, held, number, number - length, row_token, row_seen, position,
                own_positions, visible, top, total, sums, scale, softcap,
                SOFTCAP, 0, TREE, KEY_WIDTH, VALUE_WIDTH, KEY_TILE, VALUE_TILE, K_PARTS, V_PARTS,
            )  # fmt: skip
    at = ((b * GROUPS * GROUP + head).to(tl.int64) * tokens + t) * splits + split
    leave_split(out, lse, at, inside, top, total, sums, lift, VALUE_WIDTH, VALUE_TILE, V_PARTS)
