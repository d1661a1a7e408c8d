"""Device functions for packed codes: bytes in planes to levels (see ``ir/codecs/packing.py``)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_codes(
    codes,
    row,
    t,
    d,
    BITS: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    PAGE: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Codes of features ``PART * FEATURES / PARTS + d`` of tokens ``t``; uint8, shaped like ``t + d``.

    The widest plane has one byte for a feature of every part, so that its codes come with a shift that is
    the same for the whole tile; narrower planes are read at ``feature % stride`` with a shift by feature.
    Features past the end of a part (padding of the tile) read as 0.
    """
    # Bytes of a token in each plane: planes are padded to whole bytes and follow one another.
    EIGHT: tl.constexpr = FEATURES if BITS & 8 else 0
    FOUR: tl.constexpr = (FEATURES + 1) // 2 if BITS & 4 else 0
    TWO: tl.constexpr = (FEATURES + 3) // 4 if BITS & 2 else 0
    ONE: tl.constexpr = (FEATURES + 7) // 8 if BITS & 1 else 0
    token = codes + (row * PAGE + t) * (EIGHT + FOUR + TWO + ONE)
    found = (d * 0).to(tl.uint8)
    if BITS & 8:
        found = load_plane(token, d, 8, PART, PARTS, FEATURES)
    if BITS & 4:
        found = found | load_plane(token + EIGHT, d, 4, PART, PARTS, FEATURES)
    if BITS & 2:
        found = found | load_plane(token + EIGHT + FOUR, d, 2, PART, PARTS, FEATURES) << (BITS & 12)
    if BITS & 1:
        found = found | load_plane(token + EIGHT + FOUR + TWO, d, 1, PART, PARTS, FEATURES) << (BITS & 14)
    return found


@triton.jit
def load_plane(
    token, d, PLANE: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, FEATURES: tl.constexpr
):
    """What a plane of ``PLANE`` bits has of the codes of a part's features, uint8."""
    RUN: tl.constexpr = FEATURES // PARTS
    STRIDE: tl.constexpr = (FEATURES * PLANE + 7) // 8
    if STRIDE == RUN:
        shifted = load_bytes(token + d, d, RUN) >> (PART * PLANE)
    else:
        feature = PART * RUN + d
        shift = (feature // STRIDE * PLANE).to(tl.uint8)
        shifted = load_bytes(token + feature % STRIDE, d, RUN) >> shift
    return shifted & ((1 << PLANE) - 1)


@triton.jit
def load_bytes(pointers, d, RUN: tl.constexpr):
    """Bytes of a tile; 0 where ``d`` is past ``RUN``."""
    if d.numel == RUN:
        found = tl.load(pointers)
    else:
        found = tl.load(pointers, mask=d < RUN, other=0)
    return found


@triton.jit
def centred(codes, BITS: tl.constexpr, HALF: tl.constexpr):
    """Codes minus ``2**(BITS - 1)``, exactly, as float16 (``HALF``) or float32.

    For float16 the code becomes the mantissa of 1024 + code: no conversion from integers is needed.
    """
    CENTRE: tl.constexpr = 1 << (BITS - 1)
    if HALF:
        level = (codes.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - (1024.0 + CENTRE)
    else:
        level = codes.to(tl.float32) - CENTRE
    return level
