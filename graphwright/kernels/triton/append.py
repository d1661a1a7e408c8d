"""The append template: a step's tokens rotated and written into the cache, in one launch.

A program takes a tile of tokens of one head: rotary embedding in registers, then one write, to the result
(queries) or to the slots of the cache (keys and values). ``cache_append`` is the same without rotation.
Rotated numbers have the bits of the op's reference: products and their sum are rounded one by one to the
dtype that the reference computes in, and multiply-adds are not contracted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from graphwright.kernels.registry import implements
from graphwright.kernels.triton.launch import Launch

PROVIDER = "triton"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
#: No multiply-add: each product is rounded by itself, as in the reference.
EXACT = {"enable_fp_fusion": False}
_FEW = 4  # tokens of a step up to which a program takes one of them


@triton.jit
def step_slots(lengths, counts, b, t, slots):
    """Slots of tokens ``t`` of row ``b``, and which of them are tokens at all."""
    at = tl.load(lengths + b) + t
    return at % slots, t < tl.load(counts + b)


@triton.jit
def copy_rows(
    source, source_strides, store, store_strides, b, g, t, slot, valid,
    WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Rows ``t`` of head ``g`` into their slots; strides are by row, head, token and feature."""
    d = tl.arange(0, TILE)[None, :]
    inside = valid[:, None] & (d < WIDTH)
    rows = source + b * source_strides[0] + g.to(tl.int64) * source_strides[1]
    x = tl.load(rows + t[:, None].to(tl.int64) * source_strides[2] + d * source_strides[3], mask=inside)
    into = store + b * store_strides[0] + g.to(tl.int64) * store_strides[1]
    into += slot[:, None] * store_strides[2] + d * store_strides[3]
    tl.store(into, x.to(store.dtype.element_ty), mask=inside)


@triton.jit
def rotated_rows(
    source, strides, cos, sin, angle_strides, b, h, t, inside,
    WIDTH: tl.constexpr, TILE: tl.constexpr, FULL: tl.constexpr, READ_PAIRS: tl.constexpr,
    WRITE_PAIRS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Both numbers of every pair of rows ``t``, rotated, and the features that they belong to.

    ``FULL``: cos and sin have a number for each feature, else for each pair. ``READ_PAIRS``, ``WRITE_PAIRS``:
    pairs are neighbours, else half the width apart. ``ROUND``: the dtype of each result.
    """
    HALF: tl.constexpr = WIDTH // 2
    i = tl.arange(0, TILE)[None, :]
    inside = inside[:, None] & (i < HALF)
    rows = source + b * strides[0] + h.to(tl.int64) * strides[1] + t[:, None].to(tl.int64) * strides[2]
    first = 2 * i if READ_PAIRS else i
    second = first + 1 if READ_PAIRS else first + HALF
    x = tl.load(rows + first * strides[3], mask=inside).to(tl.float32)
    y = tl.load(rows + second * strides[3], mask=inside).to(tl.float32)
    low = 2 * i if WRITE_PAIRS else i
    high = low + 1 if WRITE_PAIRS else low + HALF
    angles = b * angle_strides[0] + t[:, None].to(tl.int64) * angle_strides[1]
    if FULL:
        at_low = angles + low * angle_strides[2]
        at_high = angles + high * angle_strides[2]
    else:
        at_low = angles + i * angle_strides[2]
        at_high = at_low
    x_cos = _rounded(x * tl.load(cos + at_low, mask=inside).to(tl.float32), ROUND)
    y_sin = _rounded(y * tl.load(sin + at_low, mask=inside).to(tl.float32), ROUND)
    y_cos = _rounded(y * tl.load(cos + at_high, mask=inside).to(tl.float32), ROUND)
    x_sin = _rounded(x * tl.load(sin + at_high, mask=inside).to(tl.float32), ROUND)
    kind = source.dtype.element_ty
    turned_low = _rounded(x_cos - y_sin, ROUND).to(kind)
    turned_high = _rounded(y_cos + x_sin, ROUND).to(kind)
    return turned_low, turned_high, low, high, inside


@triton.jit
def _rounded(x, ROUND: tl.constexpr):
    return x.to(ROUND).to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "slots"])
def append_kernel(
    new, new_strides, store, store_strides, lengths, counts, tokens, slots,
    WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of tokens of one head into a cache."""
    tiles = tl.cdiv(tokens, BLOCK)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    t = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    slot, valid = step_slots(lengths, counts, b, t, slots)
    copy_rows(
        new,
        new_strides,
        store,
        store_strides,
        b,
        tl.program_id(1),
        t,
        slot,
        valid & (t < tokens),
        WIDTH,
        TILE,
    )


@triton.jit(do_not_specialize=["tokens", "key_slots", "value_slots"])
def rotary_append_kernel(
    q, q_strides, k, k_strides, v, v_strides, cos, sin, angle_strides, out, out_strides,
    keys, key_strides, values, value_strides, lengths, counts, tokens, key_slots, value_slots,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, PAIR_TILE: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, VALUE_TILE: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
    READ_PAIRS: tl.constexpr, WRITE_PAIRS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """One tile of tokens of one head: the H query heads come first, then keys, then values."""
    tiles = tl.cdiv(tokens, BLOCK)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    t = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1)
    real = t < tokens
    if head < HEADS:
        x, y, low, high, inside = rotated_rows(
            q, q_strides, cos, sin, angle_strides, b, head, t, real,
            WIDTH, PAIR_TILE, FULL, READ_PAIRS, WRITE_PAIRS, ROUND,
        )  # fmt: skip
        rows = out + b * out_strides[0] + head.to(tl.int64) * out_strides[1]
        rows += t[:, None].to(tl.int64) * out_strides[2]
        tl.store(rows + low, x, mask=inside)
        tl.store(rows + high, y, mask=inside)
    elif head < HEADS + GROUPS:
        g = head - HEADS
        slot, valid = step_slots(lengths, counts, b, t, key_slots)
        x, y, low, high, inside = rotated_rows(
            k, k_strides, cos, sin, angle_strides, b, g, t, real & valid,
            WIDTH, PAIR_TILE, FULL, READ_PAIRS, WRITE_PAIRS, ROUND,
        )  # fmt: skip
        rows = keys + b * key_strides[0] + g.to(tl.int64) * key_strides[1] + slot[:, None] * key_strides[2]
        kind = keys.dtype.element_ty
        tl.store(rows + low * key_strides[3], x.to(kind), mask=inside)
        tl.store(rows + high * key_strides[3], y.to(kind), mask=inside)
    else:
        slot, valid = step_slots(lengths, counts, b, t, value_slots)
        copy_rows(
            v, v_strides, values, value_strides, b, head - HEADS - GROUPS, t, slot, real & valid,
            VALUE_WIDTH, VALUE_TILE,
        )  # fmt: skip


def _dtype_reason(*tensors: torch.Tensor) -> str | None:
    odd = next((t.dtype for t in tensors if t.dtype not in DTYPES), None)
    return None if odd is None else f"{odd} is not float32, float16 or bfloat16"


def supports_cache_append(
    store: torch.Tensor, new: torch.Tensor, lengths: torch.Tensor, counts: torch.Tensor
) -> str | None:
    """None when ``cache_append`` takes these, else the reason."""
    return _dtype_reason(store, new)


def supports_rotary_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    layout: str = "half",
) -> str | None:
    """None when ``rotary_append`` takes these, else the reason."""
    if cos.shape != sin.shape or cos.stride() != sin.stride() or cos.dtype != sin.dtype:
        return "cos and sin do not lie alike"
    if cos.dim() > 2 and cos.shape[-3] != 1:
        return "each head has its own cos and sin"
    if q.dtype != k.dtype:
        return f"queries are {q.dtype} and keys {k.dtype}"
    return _dtype_reason(q, k, v, cos, sin, keys, values)


def _block(tokens: int) -> int:
    """Tokens of a program."""
    return 1 if tokens <= _FEW else 16


def _warps(block: int, width: int, each: int = 8) -> int:
    """Warps for a tile of so many numbers a thread."""
    return min(8, max(1, block * triton.next_power_of_2(width) // (32 * each)))


@implements("cache_append", PROVIDER, supports_cache_append)
def cache_append(store: torch.Tensor, new: torch.Tensor, lengths: torch.Tensor, counts: torch.Tensor) -> None:
    """``cache_append`` in one launch."""
    batch, groups, tokens, width = new.shape
    block = _block(tokens)
    Launch(
        append_kernel,
        (batch * triton.cdiv(tokens, block), groups),
        {
            "new": new,
            "new_strides": new.stride(),
            "store": store,
            "store_strides": store.stride(),
            "lengths": lengths.contiguous(),
            "counts": counts.contiguous(),
            "tokens": tokens,
            "slots": store.shape[2],
        },
        {"WIDTH": width, "TILE": triton.next_power_of_2(width), "BLOCK": block},
        num_warps=_warps(block, width),
        label=f"append d{width} t{block}",
    ).run()


@implements("rotary_append", PROVIDER, supports_rotary_append)
def rotary_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    layout: str = "half",
) -> torch.Tensor:
    """``rotary_append`` in one launch."""
    batch, heads, tokens, width = q.shape
    groups, value_width = k.shape[1], v.shape[3]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    angle = cos.expand(batch, 1, tokens, cos.shape[-1]).stride()
    block = _block(tokens)
    Launch(
        rotary_append_kernel,
        (batch * triton.cdiv(tokens, block), heads + 2 * groups),
        {
            "q": q,
            "q_strides": q.stride(),
            "k": k,
            "k_strides": k.stride(),
            "v": v,
            "v_strides": v.stride(),
            "cos": cos,
            "sin": sin,
            "angle_strides": (angle[0], angle[2], angle[3]),
            "out": out,
            "out_strides": out.stride(),
            "keys": keys,
            "key_strides": keys.stride(),
            "values": values,
            "value_strides": values.stride(),
            "lengths": lengths.contiguous(),
            "counts": counts.contiguous(),
            "tokens": tokens,
            "key_slots": keys.shape[2],
            "value_slots": values.shape[2],
        },
        {
            "HEADS": heads,
            "GROUPS": groups,
            "WIDTH": width,
            "PAIR_TILE": triton.next_power_of_2(width // 2),
            "VALUE_WIDTH": value_width,
            "VALUE_TILE": triton.next_power_of_2(value_width),
            "BLOCK": block,
            "FULL": cos.shape[-1] == width,
            "READ_PAIRS": layout != "half",
            "WRITE_PAIRS": layout == "interleaved",
            "ROUND": _TYPES[torch.promote_types(q.dtype, cos.dtype)],
        },
        num_warps=_warps(block, width, each=8 if layout == "half" else 4),  # neighbours are read one by one
        options=EXACT,
        label=f"rotary append d{width} {layout} t{block}",
    ).run()
    return out
