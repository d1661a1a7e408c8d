"""``float`` and ``fp8`` in a kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from graphwright.ir.codecs import PageShape
from graphwright.ir.codecs.parts.floats import Float, Float8
from graphwright.kernels.triton.codes import load_bytes
from graphwright.kernels.triton.packing import bfloat16_near, nearest_integer, store_bfloat16
from graphwright.kernels.triton.tiles import LevelTile, level_tile


@triton.jit
def decode_float(
    buffers, constants, row, t, d,
    OPTION: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, PAGE: tl.constexpr, FEATURES: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """Numbers as they are stored; features past the end read as 0."""
    pointers = buffers[0] + (row * PAGE + t) * FEATURES + d
    if d.numel == FEATURES:
        values = tl.load(pointers)
    else:
        values = tl.load(pointers, mask=(d < FEATURES) & (t >= 0), other=0.0)
    return values


@triton.jit
def decode_float8(
    buffers, constants, row, t, d,
    OPTION: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, PAGE: tl.constexpr, FEATURES: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """Bytes moved to where float16 has the same bits: no card needs instructions for 8-bit floats.

    ``OPTION`` is the width of the mantissa. e5m2 is the upper half of a float16; e4m3 has another bias, so
    that what is read is the number times 2**-8, which the tile's ``unit`` makes good; NaN is put back.
    """
    code = load_bytes(buffers[0] + (row * PAGE + t) * FEATURES + d, d, FEATURES).to(tl.uint16)
    if OPTION == 2:
        number = (code << 8).to(tl.float16, bitcast=True)
    else:
        number = ((code & 0x80) << 8 | (code & 0x7F) << 7).to(tl.float16, bitcast=True)
        number = tl.where((code & 0x7F) == 0x7F, float("nan"), number)
    if HALF:
        result = number
    else:
        result = number.to(tl.float32)
    return result


@triton.jit
def encode_float(
    y, buffers, constants, row, t, d,
    OPTION: tl.constexpr, PAGE: tl.constexpr, FEATURES: tl.constexpr, RUNS: tl.constexpr, GAIN: tl.constexpr,
):  # fmt: skip
    """Numbers as they are, ``OPTION`` bits each."""
    pointers = buffers[0] + row * (PAGE * FEATURES) + (t * FEATURES + d)
    inside = (t < PAGE) & (d < FEATURES)
    if OPTION == 16:
        store_bfloat16(pointers, bfloat16_near(y), inside)
    else:
        tl.store(pointers, y, mask=inside)


@triton.jit
def encode_e4m3(
    y, buffers, constants, row, t, d,
    OPTION: tl.constexpr, PAGE: tl.constexpr, FEATURES: tl.constexpr, RUNS: tl.constexpr, GAIN: tl.constexpr,
):  # fmt: skip
    """8-bit floats with 3 bits of mantissa; 448 is the largest."""
    pointers = buffers[0] + row * (PAGE * FEATURES) + (t * FEATURES + d)
    tl.store(pointers, float8_bits(y, GAIN, 448.0, 3, 7), mask=(t < PAGE) & (d < FEATURES))


@triton.jit
def encode_e5m2(
    y, buffers, constants, row, t, d,
    OPTION: tl.constexpr, PAGE: tl.constexpr, FEATURES: tl.constexpr, RUNS: tl.constexpr, GAIN: tl.constexpr,
):  # fmt: skip
    """8-bit floats with 2 bits of mantissa; 57344 is the largest."""
    pointers = buffers[0] + row * (PAGE * FEATURES) + (t * FEATURES + d)
    tl.store(pointers, float8_bits(y, GAIN, 57344.0, 2, 15), mask=(t < PAGE) & (d < FEATURES))


@triton.jit
def float8_bits(
    y, GAIN: tl.constexpr, LARGEST: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr
):  # fmt: skip
    """``y * GAIN`` in 8 bits, nearest, ties to even, held to ``LARGEST``; NaN and infinity become NaN."""
    DROPPED: tl.constexpr = 23 - MANTISSA
    size = tl.minimum(tl.abs(y * GAIN), LARGEST)
    bits = size.to(tl.int32, bitcast=True)
    # Half a unit less one, and one more where the last bit that stays is odd; then the other bias.
    normal = (bits + ((1 << (DROPPED - 1)) - 1) + ((bits >> DROPPED) & 1)) >> DROPPED
    normal -= (127 - BIAS) << MANTISSA
    # Below the least normal number they are evenly spaced.
    even = nearest_integer(tl.minimum(size, 1.0) * (2.0 ** (BIAS - 1 + MANTISSA))).to(tl.int32)
    found = tl.where(size < 2.0 ** (1 - BIAS), even, normal)
    found = tl.where((y == y) & (tl.abs(y) != float("inf")), found, 0x7F)
    sign = (y.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (found | sign).to(tl.uint8)


@level_tile("float")
def as_they_are(part: Float, shape: PageShape) -> LevelTile:
    """bfloat16 or float32."""
    return LevelTile(decode_float, encode_float, option=part.bits, is_float=True)


@level_tile("fp8")
def float8(part: Float8, shape: PageShape) -> LevelTile:
    """Both formats are exact in float16, e4m3 scaled by 2**-8."""
    mantissa, bias = (3, 256.0) if part.format == "e4m3" else (2, 1.0)
    largest = torch.finfo({"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[part.format]).max
    return LevelTile(
        decode_float8,
        encode_e4m3 if part.format == "e4m3" else encode_e5m2,
        option=mantissa,
        unit=bias * (part.top / largest if part.top else 1.0),
        scaled=False,
        gain=part.gain,
    )
