"""The attention template: one decode, verification or prefill step over a cache, split along the keys.

A program owns a tile of queries (the heads of a group and the tokens of the step, packed into rows for the
tensor cores) of one sequence and one key/value head, and reads one *split* of the cache: a run of pages, or
a run of slots of a dense ring. It leaves the softmax-weighted values of its split with their log-sum-exp;
:func:`combine` merges the splits (Dao et al. 2023, "Flash-Decoding"; Milakov and Gimelshein 2018).

Specialized by device functions (``tiles.py``): what a quantizer's codes mean and what a scaling scales, both
folded in ``page_tiles.py``. Rotations do not appear at all: pages are read with queries that were turned, and
what they give is turned back when splits are combined.

A row's result depends on its own query and on what it sees: not on the other rows of the tile, nor on how
many tokens the step has. Splits and tiles lie at fixed slots, and the tile's matrix instruction is the same
for 16 and 32 rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphwright.kernels.triton.page_tiles import (
    as_float,
    code_scores,
    code_values,
    load_rows,
    near_one,
    zeros_like_parts,
)

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def weigh(scores, seen, top, total, lift, SOFTCAP: tl.constexpr, scale, softcap):
    """One step of the running softmax, base 2.

    Returns probabilities times ``2**lift``, the factor on what was summed so far, the new maximum and sum.
    """
    scores = scores * scale
    if SOFTCAP:
        scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
    scores = tl.where(seen, scores * LOG2E, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    anchor = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen nothing yet
    p = tl.exp2(scores - (anchor - lift)[:, None])
    decay = tl.exp2(top - anchor)
    return p, decay, new_top, total * decay + tl.sum(p, 1)


@triton.jit
def attend_pages(
    query, peak, query_sum, page_number, t, row_seen, position, top, total, out,
    key_codes, key_constants, key_scales, key_scale_constants,
    value_codes, value_constants, value_scales, value_scale_constants, row, g, scale, softcap,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, FIRST: tl.constexpr, PAGE: tl.constexpr,
    LIFTED: tl.constexpr,
    HALF: tl.constexpr, NUMBER: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    KEY_TILE: tl.constexpr, VALUE_TILE: tl.constexpr,
    K_LEVEL: tl.constexpr, K_OPTION: tl.constexpr, K_PARTS: tl.constexpr, K_UNIT: tl.constexpr,
    K_SHIFT: tl.constexpr, K_SCALE: tl.constexpr, K_AXIS: tl.constexpr, K_SCALE_OPTION: tl.constexpr,
    K_FLOAT: tl.constexpr,
    V_LEVEL: tl.constexpr, V_OPTION: tl.constexpr, V_PARTS: tl.constexpr, V_UNIT: tl.constexpr,
    V_SHIFT: tl.constexpr, V_SCALE: tl.constexpr, V_AXIS: tl.constexpr, V_SCALE_OPTION: tl.constexpr,
    V_FLOAT: tl.constexpr,
):  # fmt: skip
    """One tile of tokens of one page; ``NUMBER`` is the dtype in which stored floats are multiplied."""
    if K_FLOAT:
        d = tl.arange(0, KEY_TILE)
        keys = K_LEVEL(
            key_codes, key_constants, row, t[None, :], d[:, None], K_OPTION, 0, 1, PAGE, KEY_WIDTH, HALF
        )
        scores = tl.dot(query[0], keys.to(NUMBER), input_precision="ieee")
    else:
        scores = code_scores(
            query, query_sum, key_codes, key_constants, key_scales, key_scale_constants, row, g, t,
            K_LEVEL, K_OPTION, K_PARTS, K_UNIT, K_SHIFT, K_SCALE, K_AXIS, K_SCALE_OPTION, PAGE,
            KEY_WIDTH, KEY_TILE, HALF,
        ) * peak[:, None]  # fmt: skip
    seen = row_seen[:, None] & (t >= 0)[None, :]
    if WINDOW:
        number = FIRST + page_number * PAGE + t
        seen = seen & (number[None, :] > position[:, None] - WINDOW)
    p, decay, top, total = weigh(scores, seen, top, total, LIFTED, SOFTCAP, scale, softcap)
    if V_FLOAT:
        d = tl.arange(0, VALUE_TILE)
        values = V_LEVEL(
            value_codes, value_constants, row, t[:, None], d[None, :], V_OPTION, 0, 1, PAGE, VALUE_WIDTH, HALF
        )
        new = tl.dot(p.to(NUMBER), values.to(NUMBER), input_precision="ieee")
        out = (out[0] * decay[:, None] + new,)
    else:
        out = code_values(
            p, decay, out, value_codes, value_constants, value_scales, value_scale_constants, row, g, t,
            V_LEVEL, V_OPTION, V_PARTS, V_UNIT, V_SHIFT, V_SCALE, V_AXIS, V_SCALE_OPTION, PAGE,
            VALUE_WIDTH, VALUE_TILE, HALF,
        )  # fmt: skip
    return top, total, out


@triton.jit
def attend_slots(
    query, keys, values, slot, held, number, step_token, row_token, row_seen, position, positions, tree,
    top, total, out, scale, softcap,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, TREE: tl.constexpr, KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, KEY_TILE: tl.constexpr, VALUE_TILE: tl.constexpr, K_PARTS: tl.constexpr,
    V_PARTS: tl.constexpr,
):  # fmt: skip
    """One tile of slots that hold tokens as they were computed."""
    RUN: tl.constexpr = KEY_WIDTH // K_PARTS
    d = tl.arange(0, KEY_TILE)[:, None]
    scores = tl.zeros([query[0].shape[0], slot.shape[0]], tl.float32)
    for i in tl.static_range(K_PARTS):
        pointers = keys + slot[None, :] * KEY_WIDTH + i * RUN + d
        tile = tl.load(pointers, mask=held[None, :] & (d < RUN), other=0.0)
        scores += tl.dot(query[i], tile, input_precision="ieee")
    seen = row_seen[:, None] & held[None, :]
    committed = (step_token < 0)[None, :]
    if TREE:
        bit = (tree[:, None] >> tl.maximum(step_token, 0)[None, :]) & 1
        seen = seen & (committed | (bit != 0))
    else:
        seen = seen & (committed | (step_token[None, :] <= row_token[:, None]))
    if WINDOW:
        inside = held & (step_token >= 0)
        at = tl.load(positions + step_token, mask=inside, other=0)
        at = tl.where(step_token >= 0, at, number)
        seen = seen & (at[None, :] > position[:, None] - WINDOW)
    p, decay, top, total = weigh(scores, seen, top, total, 0.0, SOFTCAP, scale, softcap)
    VALUES: tl.constexpr = VALUE_WIDTH // V_PARTS
    e = tl.arange(0, VALUE_TILE)[None, :]
    added = ()
    for i in tl.static_range(V_PARTS):
        pointers = values + slot[:, None] * VALUE_WIDTH + i * VALUES + e
        tile = tl.load(pointers, mask=held[:, None] & (e < VALUES), other=0.0)
        new = tl.dot(p.to(tile.dtype), tile, input_precision="ieee")
        added = added + (out[i] * decay[:, None] + new,)
    return top, total, added


@triton.jit
def leave_split(
    out, lse, at, inside, top, total, sums, lift, WIDTH: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Write the results of a tile of rows to places ``at`` with the base-2 logarithms of their sums."""
    summed = total > 0
    tl.store(
        lse + at,
        tl.where(summed, top - lift + tl.log2(tl.where(summed, total, 1.0)), float("-inf")),
        mask=inside,
    )
    RUN: tl.constexpr = WIDTH // PARTS
    e = tl.arange(0, TILE)[None, :]
    for i in tl.static_range(PARTS):
        share = sums[i] / tl.where(summed, total, 1.0)[:, None]
        pointers = out + at[:, None] * WIDTH + i * RUN + e
        tl.store(pointers, share, mask=inside[:, None] & (e < RUN))


@triton.jit(
    do_not_specialize=[
        "batch_stride", "head_stride", "token_stride", "turned_batch_stride", "turned_head_stride",
        "turned_token_stride", "scale", "softcap", "tokens", "slots", "places", "page_splits", "chunk_pages",
        "chunk_slots",
    ]
)  # fmt: skip
def attend(
    q, turned, keys, values, first_keys, first_values,
    key_codes, key_constants, key_scales, key_scale_constants,
    value_codes, value_constants, value_scales, value_scale_constants,
    packed, positions, lengths, counts, tree, out, lse,
    batch_stride, head_stride, token_stride, turned_batch_stride, turned_head_stride, turned_token_stride,
    scale, softcap, tokens, slots, places, page_splits, chunk_pages, chunk_slots,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    KEY_TILE: tl.constexpr, VALUE_TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, TREE: tl.constexpr, PAGED: tl.constexpr,
    FIRST: tl.constexpr, PAGE: tl.constexpr, HALF: tl.constexpr, LIFTED: tl.constexpr,
    K_LEVEL: tl.constexpr, K_OPTION: tl.constexpr, K_PARTS: tl.constexpr, K_UNIT: tl.constexpr,
    K_SHIFT: tl.constexpr, K_SCALE: tl.constexpr, K_AXIS: tl.constexpr, K_SCALE_OPTION: tl.constexpr,
    K_FLOAT: tl.constexpr,
    V_LEVEL: tl.constexpr, V_OPTION: tl.constexpr, V_PARTS: tl.constexpr, V_UNIT: tl.constexpr,
    V_SHIFT: tl.constexpr, V_SCALE: tl.constexpr, V_AXIS: tl.constexpr, V_SCALE_OPTION: tl.constexpr,
    V_FLOAT: tl.constexpr,
):  # fmt: skip
    """One split of the attention of a tile of rows; grid (splits, tiles of rows x G, B).

    Args:
        q, turned: ``[B, H, T, D]`` with these strides: queries, and as pages are read with.
        keys, values: dense rings ``[B, G, S, D]`` and ``[B, G, S, E]``, token p in slot p % S.
        first_keys, first_values: ``[B, G, FIRST, D or E]``, the first tokens of rows that have pages.
        key_codes .. value_scale_constants: tuples of the parts' buffers and constants (``tiles.py``).
        packed: ``[B]`` tokens that are in pages, the first included.
        positions, lengths, counts, tree: as in ``cache_attention``.
        out, lse: ``[B, H, T, splits, E]`` and ``[B, H, T, splits]`` float32; lse is base 2.
        tokens: T. slots: S. places: pages of a row (N). page_splits: splits that read pages.
        chunk_pages, chunk_slots: of a split.
        LIFTED: base-2 exponent by which probabilities are raised, so that small ones keep their digits in
            float16.
    """
    split = tl.program_id(0)
    g = tl.program_id(1) % GROUPS
    m = tl.program_id(1) // GROUPS * BLOCK_M + tl.arange(0, BLOCK_M)
    b = tl.program_id(2)
    splits = tl.num_programs(0)
    t_row = m // GROUP
    head = g * GROUP + m % GROUP
    inside = t_row < tokens
    length = tl.load(lengths + b)
    count = tl.load(counts + b)
    row_seen = t_row < count
    position = tl.zeros([BLOCK_M], tl.int64)
    if WINDOW:
        position = tl.load(positions + b * tokens + t_row, mask=inside, other=0)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = zeros_like_parts(V_PARTS, BLOCK_M, VALUE_TILE)
    lift = 0.0
    done = length * 0
    if PAGED:
        done = tl.load(packed + b)
    if PAGED and split < page_splits:
        lift = LIFTED
        rows = b.to(tl.int64) * turned_batch_stride + head * turned_head_stride + t_row * turned_token_stride
        query = load_rows(turned + rows[:, None], inside[:, None], K_PARTS, KEY_WIDTH, KEY_TILE)
        peak = total
        query_sum = total
        if K_FLOAT:
            query = (query[0].to(q.dtype.element_ty),)
        else:
            query, peak, query_sum = near_one(as_float(query, K_PARTS), K_PARTS, HALF)
        filled = (tl.maximum(done - FIRST, 0) // PAGE).to(tl.int32)
        available = tl.minimum(filled, places)
        BLOCKS: tl.constexpr = PAGE // BLOCK_N
        stop = tl.minimum((split + 1) * chunk_pages, available)
        for block in range(split * chunk_pages * BLOCKS, stop * BLOCKS):
            place = block // BLOCKS
            # The newest page is number filled - 1; older ones lie before it in the ring.
            number = filled - 1 - (filled - 1 - place + places) % places
            row = (b.to(tl.int64) * places + place) * GROUPS + g
            t = block % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
            top, total, sums = attend_pages(
                query, peak, query_sum, number, t, row_seen, position, top, total, sums,
                key_codes, key_constants, key_scales, key_scale_constants,
                value_codes, value_constants, value_scales, value_scale_constants, row, g, scale, softcap,
                SOFTCAP, WINDOW, FIRST, PAGE, LIFTED, HALF, q.dtype.element_ty,
                KEY_WIDTH, VALUE_WIDTH, KEY_TILE, VALUE_TILE,
                K_LEVEL, K_OPTION, K_PARTS, K_UNIT, K_SHIFT, K_SCALE, K_AXIS, K_SCALE_OPTION, K_FLOAT,
                V_LEVEL, V_OPTION, V_PARTS, V_UNIT, V_SHIFT, V_SCALE, V_AXIS, V_SCALE_OPTION, V_FLOAT,
            )  # fmt: skip
    else:
        plain_rows = b.to(tl.int64) * batch_stride + head * head_stride + t_row * token_stride
        plain = load_rows(q + plain_rows[:, None], inside[:, None], K_PARTS, KEY_WIDTH, KEY_TILE)
        visible = tl.zeros([BLOCK_M], tl.int64)
        if TREE:
            visible = tl.load(tree + b * tokens + t_row, mask=inside, other=0)
        store = (b * GROUPS + g).to(tl.int64)
        own_positions = positions + b * tokens
        if FIRST > 0:
            early = tl.minimum(done, FIRST).to(tl.int32)
            for start in tl.range(0, early, BLOCK_N, num_stages=1):
                slot = start + tl.arange(0, BLOCK_N)
                top, total, sums = attend_slots(
                    plain, first_keys + store * FIRST * KEY_WIDTH, first_values + store * FIRST * VALUE_WIDTH,
                    slot, slot < early, slot.to(tl.int64), slot.to(tl.int64) - FIRST, t_row, row_seen,
                    position, own_positions, visible, top, total, sums, scale, softcap,
                    SOFTCAP, WINDOW, TREE, KEY_WIDTH, VALUE_WIDTH, KEY_TILE, VALUE_TILE, K_PARTS, V_PARTS,
                )  # fmt: skip
        whole = length + count
        used = tl.minimum(whole, slots).to(tl.int32)
        start_slot = (split - page_splits) * chunk_slots
        # Beside pages this loop is short: stages for it would cost the pages' loop shared memory.
        STAGES: tl.constexpr = 1 if PAGED else None
        for start in tl.range(
            start_slot, tl.minimum(start_slot + chunk_slots, used), BLOCK_N, num_stages=STAGES
        ):
            slot = start + tl.arange(0, BLOCK_N)
            # The newest token that a slot can hold; slots below `used` hold one.
            number = whole - 1 - (whole - 1 - slot + slots) % slots
            held = (slot < used) & (number >= done)
            top, total, sums = attend_slots(
                plain, keys + store * slots * KEY_WIDTH, values + store * slots * VALUE_WIDTH,
                slot, held, number, number - length, t_row, row_seen, position,
                own_positions, visible, top, total, sums, scale, softcap,
                SOFTCAP, WINDOW, TREE, KEY_WIDTH, VALUE_WIDTH, KEY_TILE, VALUE_TILE, K_PARTS, V_PARTS,
            )  # fmt: skip
    at = ((b * GROUPS * GROUP + head).to(tl.int64) * tokens + t_row) * splits + split
    leave_split(out, lse, at, inside, top, total, sums, lift, VALUE_WIDTH, VALUE_TILE, V_PARTS)
