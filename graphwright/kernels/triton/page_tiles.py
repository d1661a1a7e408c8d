"""Scores and weighted values of a tile of tokens whose codes are decoded in registers.

Scales never touch elements: those by token multiply scores and probabilities, those by channel multiply
the query and the result of a tile. Codes are multiplied in float16, which holds 8 bits and more exactly:
queries, probabilities and scales are brought near 1 for it, by factors that are taken out in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(pointers, inside, PARTS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """``PARTS`` equal runs of the features of a tile of rows, each padded to ``TILE`` with zeros."""
    RUN: tl.constexpr = WIDTH // PARTS
    d = tl.arange(0, TILE)[None, :]
    parts = ()
    for i in tl.static_range(PARTS):
        parts = parts + (tl.load(pointers + i * RUN + d, mask=inside & (d < RUN), other=0.0),)
    return parts


@triton.jit
def zeros_like_parts(PARTS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """One accumulator a part."""
    parts = ()
    for _ in tl.static_range(PARTS):
        parts = parts + (tl.zeros([ROWS, TILE], tl.float32),)
    return parts


@triton.jit
def as_float(parts, PARTS: tl.constexpr):
    """Parts in float32."""
    wide = ()
    for i in tl.static_range(PARTS):
        wide = wide + (parts[i].to(tl.float32),)
    return wide


@triton.jit
def near_one(parts, PARTS: tl.constexpr, HALF: tl.constexpr):
    """Query parts over their row's largest magnitude, that magnitude, and the row's sum after rounding."""
    peak = tl.max(tl.abs(parts[0]), 1)
    for i in tl.static_range(1, PARTS):
        peak = tl.maximum(peak, tl.max(tl.abs(parts[i]), 1))
    peak = tl.where(peak > 0, peak, 1.0)
    scaled = ()
    total = peak * 0.0
    for i in tl.static_range(PARTS):
        own = parts[i] / peak[:, None]
        own = own.to(tl.float16) if HALF else own
        total += tl.sum(own.to(tl.float32), 1)
        scaled = scaled + (own,)
    return scaled, peak, total


@triton.jit
def largest(x):
    """The largest magnitude of a vector, 1 where there is none; NaN and infinity become 1 too."""
    top = tl.max(tl.abs(x), 0)
    return tl.where((top > 0) & (top < float("inf")), top, 1.0)


@triton.jit
def code_scores(
    query, total, buffers, constants, scales, scale_constants, row, g, t,
    LEVEL: tl.constexpr, OPTION: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr, SHIFT: tl.constexpr,
    SCALE: tl.constexpr, AXIS: tl.constexpr, SCALE_OPTION: tl.constexpr, PAGE: tl.constexpr,
    WIDTH: tl.constexpr, TILE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Inner products of a tile of queries with the tokens ``t`` of a page that lies in codes.

    ``query`` and ``total`` are :func:`near_one`'s; float32 ``[rows, tokens]``.
    """
    RUN: tl.constexpr = WIDTH // PARTS
    d = tl.arange(0, TILE)
    if AXIS == "token":
        scale, middle = SCALE(scales, scale_constants, row, g, t, d, SCALE_OPTION, PAGE, WIDTH)
    scores = tl.zeros([query[0].shape[0], t.shape[0]], tl.float32)
    for i in tl.static_range(PARTS):
        level = LEVEL(buffers, constants, row, t[None, :], d[:, None], OPTION, i, PARTS, PAGE, WIDTH, HALF)
        if AXIS == "channel":
            own, middle = SCALE(scales, scale_constants, row, g, t, i * RUN + d, SCALE_OPTION, PAGE, WIDTH)
            own = tl.where(d < RUN, own * UNIT, 0.0)
            middle = tl.where(d < RUN, middle + own * SHIFT, 0.0)
            top = largest(own)
            q = query[i].to(tl.float32)
            turned = (q * (own / top)[None, :]).to(query[i].dtype)
            scores += (
                tl.dot(turned, level, input_precision="ieee") * top + tl.sum(q * middle[None, :], 1)[:, None]
            )
        elif AXIS == "group":
            at = (i * RUN + d)[:, None]
            own, middle = SCALE(scales, scale_constants, row, g, t[None, :], at, SCALE_OPTION, PAGE, WIDTH)
            x = (level.to(tl.float32) + SHIFT) * (own * UNIT) + middle
            x = tl.where((d < RUN)[:, None], x, 0.0)
            top = tl.max(tl.abs(x), 0)
            top = tl.where(top > 0, top, 1.0)
            scores += (
                tl.dot(query[i], (x / top[None, :]).to(level.dtype), input_precision="ieee") * top[None, :]
            )
        else:
            scores += tl.dot(query[i], level, input_precision="ieee")
    if AXIS == "token":
        scale = scale * UNIT
        scores = scores * scale[None, :] + total[:, None] * (scale * SHIFT + middle)[None, :]
    elif AXIS == "none":
        scores = (scores + total[:, None] * SHIFT) * UNIT
    return scores


@triton.jit
def code_values(
    p, decay, out, buffers, constants, scales, scale_constants, row, g, t,
    LEVEL: tl.constexpr, OPTION: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr, SHIFT: tl.constexpr,
    SCALE: tl.constexpr, AXIS: tl.constexpr, SCALE_OPTION: tl.constexpr, PAGE: tl.constexpr,
    WIDTH: tl.constexpr, TILE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Add the values of tokens ``t`` of a page, weighted by ``p [rows, tokens]``, to ``out * decay``."""
    RUN: tl.constexpr = WIDTH // PARTS
    d = tl.arange(0, TILE)
    weights = p
    if AXIS == "token":
        scale, middle = SCALE(scales, scale_constants, row, g, t, d, SCALE_OPTION, PAGE, WIDTH)
        scale = scale * UNIT
        top = largest(scale)
        weights = p * (scale / top)[None, :]
        offset = tl.sum(p * (middle + scale * SHIFT)[None, :], 1)
    else:
        offset = tl.sum(p, 1)
    weights = weights.to(tl.float16) if HALF else weights
    added = ()
    for i in tl.static_range(PARTS):
        level = LEVEL(buffers, constants, row, t[:, None], d[None, :], OPTION, i, PARTS, PAGE, WIDTH, HALF)
        if AXIS == "group":
            at = (i * RUN + d)[None, :]
            own, middle = SCALE(scales, scale_constants, row, g, t[:, None], at, SCALE_OPTION, PAGE, WIDTH)
            x = (level.to(tl.float32) + SHIFT) * (own * UNIT) + middle
            x = tl.where((d < RUN)[None, :], x, 0.0)
            size = tl.max(tl.abs(x), 1)
            most = largest(size)
            size = tl.where(size > 0, size, 1.0)
            shares = p * (size / most)[None, :]
            shares = shares.to(tl.float16) if HALF else shares
            new = tl.dot(shares, (x / size[:, None]).to(level.dtype), input_precision="ieee") * most
        else:
            new = tl.dot(weights, level, input_precision="ieee")
            if AXIS == "token":
                new = new * top + offset[:, None]
            elif AXIS == "channel":
                own, middle = SCALE(
                    scales, scale_constants, row, g, t, i * RUN + d, SCALE_OPTION, PAGE, WIDTH
                )
                own = own * UNIT
                new = new * own[None, :] + offset[:, None] * (middle + own * SHIFT)[None, :]
            else:
                new = (new + offset[:, None] * SHIFT) * UNIT
        added = added + (out[i] * decay[:, None] + new,)
    return added
