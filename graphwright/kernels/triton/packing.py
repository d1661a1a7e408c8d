"""Device functions for packing pages: bfloat16 by its bits, and codes into planes.

The inverse of ``codes.py``. Rounding works on the bits of float32: it is the reference's to the last bit,
also in Triton's interpreter, whose own conversions to bfloat16 truncate.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The bits of a float32 that bfloat16 keeps.
KEPT = tl.constexpr(-65536)
# Added and taken away, it leaves the nearest integer of a float32 below 2**22, ties to even.
TO_INTEGER = tl.constexpr(12582912.0)
NAN_BITS = tl.constexpr(0x7FC00000)


@triton.jit
def _bits(x):
    """The bits of a float32; of a NaN, some that stay a NaN when the lower half is cut off."""
    return tl.where(x == x, x.to(tl.int32, bitcast=True), NAN_BITS)


@triton.jit
def bfloat16_up(x):
    """The least bfloat16 not below ``x``, as float32; ``rounded_up`` of ``ir/codecs/parts/scaling.py``."""
    bits = _bits(x)
    return (tl.where(x > 0, bits + 0xFFFF, bits) & KEPT).to(tl.float32, bitcast=True)


@triton.jit
def bfloat16_down(x):
    """The largest bfloat16 not above ``x``, as float32."""
    bits = _bits(x)
    return (tl.where(x < 0, bits + 0xFFFF, bits) & KEPT).to(tl.float32, bitcast=True)


@triton.jit
def bfloat16_near(x):
    """The nearest bfloat16, ties to even, as float32."""
    bits = _bits(x)
    rounded = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits)
    return (rounded & KEPT).to(tl.float32, bitcast=True)


@triton.jit
def store_bfloat16(pointers, x, mask):
    """Write what one of the functions above gave; ``pointers`` are of the numbers' bits, int16."""
    tl.store(pointers, (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16), mask=mask)


@triton.jit
def nearest_integer(x):
    """Of numbers below 2**22, ties to even."""
    return (x + TO_INTEGER) - TO_INTEGER


@triton.jit
def store_codes(
    pointer, codes, row, t,
    BITS: tl.constexpr, PAGE: tl.constexpr, FEATURES: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """Pack a page of codes into planes (``ir/codecs/packing.py``) and write them.

    Args:
        codes: int32 ``[tokens, RUNS * padded]``, ``RUNS`` equal runs of the features, each padded.
        row: of the page; t: tokens ``[tokens, 1]``, those past ``PAGE`` are padding.
        RUNS: as many as the narrowest plane has codes in a byte: then no byte has two of one run.
    """
    page = pointer + row * (PAGE * (BITS * FEATURES // 8))
    for i in tl.static_range(4):
        if BITS & (8 >> i):
            store_plane(page, codes, t, 8 >> i, BITS, PAGE, FEATURES, RUNS)


@triton.jit
def store_plane(
    page, codes, t, PLANE: tl.constexpr, BITS: tl.constexpr, PAGE: tl.constexpr, FEATURES: tl.constexpr,
    RUNS: tl.constexpr,
):  # fmt: skip
    """The plane of ``PLANE`` bits; wider ones lie before it and hold lower bits."""
    LOW: tl.constexpr = BITS // (2 * PLANE) * (2 * PLANE)
    EACH: tl.constexpr = 8 // PLANE
    REST: tl.constexpr = RUNS // EACH
    RUN: tl.constexpr = FEATURES // RUNS
    PADDED: tl.constexpr = codes.shape[1] // RUNS
    plane = (codes >> LOW) & ((1 << PLANE) - 1)
    plane = tl.reshape(plane, [codes.shape[0], EACH, REST, PADDED])
    shift = tl.reshape(tl.arange(0, EACH) * PLANE, [1, EACH, 1, 1])
    packed = tl.sum(plane << shift, 1).to(tl.uint8)
    j = tl.arange(0, PADDED)[None, None, :]
    at = LOW * FEATURES // 8 + tl.arange(0, REST)[None, :, None] * RUN + j
    token = t[:, :, None]
    tl.store(page + (token * (BITS * FEATURES // 8) + at), packed, mask=(token < PAGE) & (j < RUN))
