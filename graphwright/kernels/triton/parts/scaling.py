"""Scalings in a kernel: ``x = scale * y + middle``."""

from __future__ import annotations

import triton
import triton.language as tl

from graphwright.ir.codecs import PageShape
from graphwright.ir.codecs.parts.scaling import ChannelRange, ChannelScale, TokenNorm, TokenRange, TokenScale
from graphwright.kernels.triton.packing import bfloat16_down, bfloat16_near, bfloat16_up, store_bfloat16
from graphwright.kernels.triton.tiles import ScaleTile, scale_tile


@triton.jit
def decode_token_scale(
    buffers, constants, row, g, t, d, OPTION: tl.constexpr, PAGE: tl.constexpr, FEATURES: tl.constexpr
):
    """One scale a token, 0 in the middle."""
    scale = tl.load(buffers[0] + row * PAGE + t).to(tl.float32)
    return scale, scale * 0.0


@triton.jit
def decode_token_range(
    buffers, constants, row, g, t, d, OPTION: tl.constexpr, PAGE: tl.constexpr, FEATURES: tl.constexpr
):
    """The lowest number and the span of a token."""
    half = tl.load(buffers[1] + row * PAGE + t).to(tl.float32) * 0.5
    return half, tl.load(buffers[0] + row * PAGE + t).to(tl.float32) + half


@triton.jit
def decode_token_norm(
    buffers, constants, row, g, t, d, OPTION: tl.constexpr, PAGE: tl.constexpr, FEATURES: tl.constexpr
):
    """The norm of a token, shared by coordinates of unit variance."""
    scale = tl.load(buffers[0] + row * PAGE + t).to(tl.float32) * (FEATURES**-0.5)
    return scale, scale * 0.0


@triton.jit
def decode_channel_scale(
    buffers, constants, row, g, t, d, OPTION: tl.constexpr, PAGE: tl.constexpr, FEATURES: tl.constexpr
):
    """One scale a channel."""
    scale = tl.load(buffers[0] + row * FEATURES + d, mask=d < FEATURES, other=0.0).to(tl.float32)
    return scale, scale * 0.0


@triton.jit
def decode_channel_range(
    buffers, constants, row, g, t, d, OPTION: tl.constexpr, PAGE: tl.constexpr, FEATURES: tl.constexpr
):
    """The lowest number and the span of a channel."""
    inside = d < FEATURES
    half = tl.load(buffers[1] + row * FEATURES + d, mask=inside, other=0.0).to(tl.float32) * 0.5
    return half, tl.load(buffers[0] + row * FEATURES + d, mask=inside, other=0.0).to(tl.float32) + half


@triton.jit
def decode_group_scale(
    buffers, constants, row, g, t, d, OPTION: tl.constexpr, PAGE: tl.constexpr, FEATURES: tl.constexpr
):
    """One scale for every ``OPTION`` features of a token."""
    at = (row * PAGE + t) * (FEATURES // OPTION) + tl.minimum(d, FEATURES - 1) // OPTION
    scale = tl.load(buffers[0] + at).to(tl.float32)
    return scale, scale * 0.0


@triton.jit
def decode_group_range(
    buffers, constants, row, g, t, d, OPTION: tl.constexpr, PAGE: tl.constexpr, FEATURES: tl.constexpr
):
    """The lowest number and the span of every ``OPTION`` features of a token."""
    at = (row * PAGE + t) * (FEATURES // OPTION) + tl.minimum(d, FEATURES - 1) // OPTION
    half = tl.load(buffers[1] + at).to(tl.float32) * 0.5
    return half, tl.load(buffers[0] + at).to(tl.float32) + half


@triton.jit
def peak(x, inside, AXIS: tl.constexpr):
    """The largest magnitude along an axis, which stays; NaN where there is one, whose bits are largest."""
    bits = tl.where(inside, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    return tl.max(bits, AXIS, keep_dims=True).to(tl.float32, bitcast=True)


@triton.jit
def bounds(x, inside, AXIS: tl.constexpr):
    """The lowest number along an axis, which stays, and the span from it, as they are stored."""
    spoilt = tl.max((inside & (x != x)).to(tl.int32), AXIS, keep_dims=True) > 0
    low = tl.min(tl.where(inside, x, float("inf")), AXIS, keep_dims=True)
    high = tl.max(tl.where(inside, x, float("-inf")), AXIS, keep_dims=True)
    low = bfloat16_down(tl.where(spoilt, float("nan"), low))
    return low, bfloat16_up(high - low)


@triton.jit
def over(x, scale):
    """``x / scale``, rounded once; zeros where the scale is 0."""
    return tl.div_rn(x, tl.where(scale == 0, 1.0, scale))


@triton.jit
def over_span(x, low, span):
    """``x`` with ``low`` at -1 and ``low + span`` at 1."""
    return over(x - low, span) * 2.0 - 1.0


@triton.jit
def encode_token_scale(
    x, buffers, row, g, t, d, OPTION: tl.constexpr, PAGE: tl.constexpr, FEATURES: tl.constexpr
):
    """Each token over its largest magnitude."""
    scale = bfloat16_up(peak(x, (t < PAGE) & (d < FEATURES), 1))
    store_bfloat16(buffers[0] + row * PAGE + t, scale, t < PAGE)
    return over(x, scale)


@triton.jit
def encode_token_range(
    x, buffers, row, g, t, d, OPTION: tl.constexpr, PAGE: tl.constexpr, FEATURES: tl.constexpr
):
    """Each token from its lowest to its highest number."""
    low, span = bounds(x, (t < PAGE) & (d < FEATURES), 1)
    store_bfloat16(buffers[0] + row * PAGE + t, low, t < PAGE)
    store_bfloat16(buffers[1] + row * PAGE + t, span, t < PAGE)
    return over_span(x, low, span)


@triton.jit
def encode_channel_scale(
    x, buffers, row, g, t, d, OPTION: tl.constexpr, PAGE: tl.constexpr, FEATURES: tl.constexpr
):
    """Each channel over its largest magnitude."""
    scale = bfloat16_up(peak(x, (t < PAGE) & (d < FEATURES), 0))
    store_bfloat16(buffers[0] + row * FEATURES + d, scale, d < FEATURES)
    return over(x, scale)


@triton.jit
def encode_channel_range(
    x, buffers, row, g, t, d, OPTION: tl.constexpr, PAGE: tl.constexpr, FEATURES: tl.constexpr
):
    """Each channel from its lowest to its highest number."""
    low, span = bounds(x, (t < PAGE) & (d < FEATURES), 0)
    store_bfloat16(buffers[0] + row * FEATURES + d, low, d < FEATURES)
    store_bfloat16(buffers[1] + row * FEATURES + d, span, d < FEATURES)
    return over_span(x, low, span)


@triton.jit
def encode_token_norm(
    x, buffers, row, g, t, d, OPTION: tl.constexpr, PAGE: tl.constexpr, FEATURES: tl.constexpr
):
    """Each token over its length, times sqrt(D)."""
    inside = (t < PAGE) & (d < FEATURES)
    top = peak(x, inside, 1)
    small = over(x, tl.where(top == 0, 1.0, top))
    length = tl.sqrt_rn(tl.sum(tl.where(inside, small * small, 0.0), 1, keep_dims=True))
    norm = bfloat16_near(length * tl.where(top == 0, 1.0, top))
    store_bfloat16(buffers[0] + row * PAGE + t, norm, t < PAGE)
    return over(x, norm) * (FEATURES**0.5)


@triton.jit
def encode_group_scale(
    x, buffers, row, g, t, d, OPTION: tl.constexpr, PAGE: tl.constexpr, FEATURES: tl.constexpr
):
    """Every ``OPTION`` features of a token over their largest magnitude."""
    COUNT: tl.constexpr = FEATURES // OPTION
    y = x
    for i in range(COUNT):
        own = d // OPTION == i
        scale = bfloat16_up(peak(x, own & (t < PAGE), 1))
        store_bfloat16(buffers[0] + (row * PAGE + t) * COUNT + i, scale, t < PAGE)
        y = tl.where(own, over(x, scale), y)
    return y


@triton.jit
def encode_group_range(
    x, buffers, row, g, t, d, OPTION: tl.constexpr, PAGE: tl.constexpr, FEATURES: tl.constexpr
):
    """Every ``OPTION`` features of a token from their lowest to their highest number."""
    COUNT: tl.constexpr = FEATURES // OPTION
    y = x
    for i in range(COUNT):
        own = d // OPTION == i
        low, span = bounds(x, own & (t < PAGE), 1)
        store_bfloat16(buffers[0] + (row * PAGE + t) * COUNT + i, low, t < PAGE)
        store_bfloat16(buffers[1] + (row * PAGE + t) * COUNT + i, span, t < PAGE)
        y = tl.where(own, over_span(x, low, span), y)
    return y


@scale_tile("token_scale")
def token_scale(part: TokenScale, shape: PageShape) -> ScaleTile:
    """By token, or by group of its features."""
    if part.group:
        return ScaleTile(decode_group_scale, encode_group_scale, axis="group", option=part.group)
    return ScaleTile(decode_token_scale, encode_token_scale)


@scale_tile("token_range")
def token_range(part: TokenRange, shape: PageShape) -> ScaleTile:
    """By token, or by group of its features."""
    if part.group:
        return ScaleTile(decode_group_range, encode_group_range, axis="group", option=part.group)
    return ScaleTile(decode_token_range, encode_token_range)


@scale_tile("token_norm")
def token_norm(part: TokenNorm, shape: PageShape) -> ScaleTile:
    """By token."""
    return ScaleTile(decode_token_norm, encode_token_norm)


@scale_tile("channel_scale")
def channel_scale(part: ChannelScale, shape: PageShape) -> ScaleTile:
    """By channel."""
    return ScaleTile(decode_channel_scale, encode_channel_scale, axis="channel")


@scale_tile("channel_range")
def channel_range(part: ChannelRange, shape: PageShape) -> ScaleTile:
    """By channel."""
    return ScaleTile(decode_channel_range, encode_channel_range, axis="channel")
