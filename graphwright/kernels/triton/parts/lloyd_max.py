"""``lloyd_max`` in a kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from graphwright.ir.codecs import PageShape
from graphwright.ir.codecs.parts.lloyd_max import LloydMax
from graphwright.kernels.triton.codes import centred, load_codes
from graphwright.kernels.triton.packing import store_codes
from graphwright.kernels.triton.tiles import LevelTile, code_parts, code_runs, level_tile


@triton.jit
def decode_lloyd_max(
    buffers, constants, row, t, d,
    OPTION: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, PAGE: tl.constexpr, FEATURES: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """Levels of codes.

    They are symmetric, so up to 3 bits an odd polynomial goes through all of them, which is cheaper than a
    table; 4 bits and more look the level up.
    """
    codes = load_codes(buffers[0], row, t, d, OPTION, PART, PARTS, PAGE, FEATURES)
    if OPTION <= 3:
        level = odd_levels(centred(codes, OPTION, False) + 0.5, constants[0], OPTION)
    else:
        level = tl.load(constants[0] + codes.to(tl.int32))
    if HALF:
        result = level.to(tl.float16)
    else:
        result = level
    return result


@triton.jit
def odd_levels(x, levels, BITS: tl.constexpr):
    """The odd polynomial through ``levels[2**BITS]`` at x = c + 1/2 - 2**(BITS - 1), for 1 to 3 bits.

    In Newton's form over the squares of x: 1/4, 9/4, 25/4, 49/4 (divided differences of level / x).
    """
    MIDDLE: tl.constexpr = 1 << (BITS - 1)
    # Newton's coefficients; those above the degree are 0.
    first = tl.load(levels + MIDDLE) * 2.0
    second = 0.0
    third = 0.0
    fourth = 0.0
    if BITS >= 2:
        r1 = tl.load(levels + MIDDLE + 1) / 1.5
        second = (r1 - first) / 2.0
    if BITS >= 3:
        r2 = tl.load(levels + MIDDLE + 2) / 2.5
        r3 = tl.load(levels + MIDDLE + 3) / 3.5
        upper = (r2 - r1) / 4.0
        third = (upper - second) / 6.0
        fourth = (((r3 - r2) / 6.0 - upper) / 10.0 - third) / 12.0
    s = x * x
    if BITS == 1:
        level = x * first
    elif BITS == 2:
        level = x * (first + (s - 0.25) * second)
    else:
        level = x * (first + (s - 0.25) * (second + (s - 2.25) * (third + (s - 6.25) * fourth)))
    return level


@triton.jit
def encode_lloyd_max(
    y, buffers, constants, row, t, d,
    OPTION: tl.constexpr, PAGE: tl.constexpr, FEATURES: tl.constexpr, RUNS: tl.constexpr, GAIN: tl.constexpr,
):  # fmt: skip
    """The nearest level: as many as lie below the middle between neighbours; a NaN gets the last."""
    codes = tl.where(y == y, 0, (1 << OPTION) - 1)
    for i in range((1 << OPTION) - 1):
        middle = (tl.load(constants[0] + i) + tl.load(constants[0] + i + 1)) / 2.0
        codes += (y > middle).to(tl.int32)
    store_codes(buffers[0], codes, row, t, OPTION, PAGE, FEATURES, RUNS)


@level_tile("lloyd_max")
def lloyd_max(part: LloydMax, shape: PageShape) -> LevelTile:
    """Levels as the codec's constants have them."""
    return LevelTile(
        decode_lloyd_max,
        encode_lloyd_max,
        option=part.bits,
        parts=code_parts(part.bits),
        runs=code_runs(part.bits),
    )
