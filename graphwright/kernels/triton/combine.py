"""Merging the splits of an attention, and turning vectors by a codec's rotations."""

from __future__ import annotations

import triton
import triton.language as tl

from graphwright.kernels.triton.attend import LOG2E

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["heads", "tokens", "splits", "page_splits"])
def combine(
    out, lse, sinks, matrix, counts, result, result_lse, heads, tokens, splits, page_splits,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr, SINKS: tl.constexpr,
    TURNED: tl.constexpr, BY_HEAD: tl.constexpr, WITH_LSE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One query's result from its splits; grid (B * H * T).

    Args:
        out, lse: what :func:`~graphwright.kernels.triton.attend.attend` left.
        sinks: ``[H]`` logits that take part in the softmax and carry no value.
        matrix: ``[1 or G, E, E]`` float32, rows of the inverse map of values in pages; with ``TURNED``.
        counts: ``[B]``; results of tokens at and past them are zeros.
        result: ``[B, T, H, E]``; result_lse: ``[B, H, T]`` float32, natural logarithm.
        splits, page_splits: all splits of a query, those of pages first.
        SPLITS: a power of two, splits that are read at once. CHUNK: columns of the matrix at once.
        BY_HEAD: every key/value head has a matrix of its own.
    """
    query = tl.program_id(0).to(tl.int64)
    t = query % tokens
    h = query // tokens % heads
    b = query // tokens // heads
    e = tl.arange(0, TILE)
    inside = e < WIDTH
    top = float("-inf")
    if SINKS:
        top = tl.load(sinks + h).to(tl.float32) * LOG2E
    total = 1.0 if SINKS else 0.0
    plain = tl.zeros([TILE], tl.float32)
    turned = tl.zeros([TILE], tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        there = split < splits
        own = tl.load(lse + query * splits + split, mask=there, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(own, 0))
        anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(own - anchor)
        decay = tl.exp2(top - anchor)
        pointers = out + (query * splits + split)[:, None] * WIDTH + e[None, :]
        part = tl.load(pointers, mask=(there & (weight > 0))[:, None] & inside[None, :], other=0.0)
        if TURNED:
            in_pages = split < page_splits
            turned = turned * decay + tl.sum(part * tl.where(in_pages, weight, 0.0)[:, None], 0)
            weight_here = tl.where(in_pages, 0.0, weight)
            plain = plain * decay + tl.sum(part * weight_here[:, None], 0)
        else:
            plain = plain * decay + tl.sum(part * weight[:, None], 0)
        total = total * decay + tl.sum(weight, 0)
        top = new_top
    total = tl.where(total > 0, total, 1.0)
    if WITH_LSE:
        tl.store(result_lse + query, (top + tl.log2(total)) * LN2)
    valid = t < tl.load(counts + b)
    place = ((b * tokens + t) * heads + h) * WIDTH
    if TURNED:
        if BY_HEAD:
            matrix += (h // GROUP) * WIDTH * WIDTH
        # The result goes through memory chunk by chunk: registers have no index.
        for start in tl.static_range(0, WIDTH, CHUNK):
            column = start + tl.arange(0, CHUNK)
            there = column < WIDTH
            tile = tl.load(
                matrix + column[:, None] * WIDTH + e[None, :],
                mask=there[:, None] & inside[None, :],
                other=0.0,
            )
            back = tl.sum(tile * turned[None, :], 1)
            same = tl.sum(tl.where(column[:, None] == e[None, :], plain[None, :], 0.0), 1)
            tl.store(
                result + place + column,
                tl.where(valid, (back + same) / total, 0.0).to(result.dtype.element_ty),
                mask=there,
            )
    else:
        tl.store(
            result + place + e, tl.where(valid, plain / total, 0.0).to(result.dtype.element_ty), mask=inside
        )


@triton.jit(do_not_specialize=["batch_stride", "head_stride", "token_stride", "heads", "tokens", "rows"])
def turn(
    x, matrix, out, batch_stride, head_stride, token_stride, heads, tokens, rows,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BY_HEAD: tl.constexpr,
):  # fmt: skip
    """``x [B, H, T, D] @ matrix`` of each row's key/value head; grid (tiles of B * T, H, tiles of columns).

    Args:
        matrix: ``[1 or G, D, D]`` float32; out: ``[B, H, T, D]`` float32, contiguous. rows: B * T.
        TILE: features that are multiplied at once.
    """
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    h = tl.program_id(1)
    b = r // tokens
    t = r % tokens
    source = b.to(tl.int64) * batch_stride + h * head_stride + t * token_stride
    if BY_HEAD:
        matrix += (h // GROUP) * WIDTH * WIDTH
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    turned = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, WIDTH, TILE):
        d = start + tl.arange(0, TILE)
        there = (r < rows)[:, None] & (d < WIDTH)[None, :]
        tile = tl.load(x + source[:, None] + d[None, :], mask=there, other=0.0).to(tl.float32)
        square = (d < WIDTH)[:, None] & (column < WIDTH)[None, :]
        map_tile = tl.load(matrix + d[:, None] * WIDTH + column[None, :], mask=square, other=0.0)
        turned += tl.dot(tile, map_tile, input_precision="ieee")
    target = ((b * heads + h).to(tl.int64) * tokens + t) * WIDTH
    tl.store(
        out + target[:, None] + column[None, :], turned, mask=(r < rows)[:, None] & (column < WIDTH)[None, :]
    )
