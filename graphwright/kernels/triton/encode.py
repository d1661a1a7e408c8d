"""The pack template: complete pages go from the tail into the pages of a store, in one launch.

A program takes a page of one head, or a part of its tokens: from the tail, the codec's orthogonal maps as
one matrix, the scaling, the quantizer, and codes into planes; every buffer is written in place. Without
maps the buffers have the bits that :meth:`~graphwright.ir.codecs.Codec.encode` gives: every operation is
rounded as there, divisions exactly and multiply-adds uncontracted (but for sums: a norm may differ in its
last bit).

Device functions of the parts (``tiles.py``), in ``parts/``:

- of a scaling, ``encode(x, buffers, row, g, t, d, OPTION, PAGE, FEATURES) -> y``, which writes its buffers;
- of a quantizer, ``encode(y, buffers, constants, row, t, d, OPTION, PAGE, FEATURES, RUNS, GAIN)``.

``x`` and ``y`` are float32 ``[tokens, columns]``, ``t`` ``[tokens, 1]`` and ``d`` ``[1, columns]``. Columns
are ``RUNS`` equal runs of the features, each padded. Padding has ``t >= PAGE`` or ``d >= FEATURES``; what
is written must be masked by both. Buffers of bfloat16 come as int16, those of 8-bit floats as uint8.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from graphwright.ir.codecs import PageShape
from graphwright.ir.errors import CodecError
from graphwright.kernels.triton.append import EXACT
from graphwright.kernels.triton.launch import Launch
from graphwright.kernels.triton.sides import Side
from graphwright.kernels.triton.tiles import TileCodec, tile_codec

#: Numbers of a page of one head that a program holds, padded.
MAX_TILE = 32768
_LEAST = 16  # rows and columns that a matrix product takes
_BLOCK = 32  # tokens of a program that needs not see the whole page
# Dtypes whose bits a kernel writes itself.
_AS_BITS = {
    torch.bfloat16: torch.int16,
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e5m2: torch.uint8,
}


@triton.jit
def mapped(
    pointers, stride, matrix, t, d, PAGE: tl.constexpr, FEATURES: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Tokens times ``matrix [D, D]``, features ``d`` of the result; ``CHUNK`` features at a time."""
    y = tl.zeros([t.shape[0], d.shape[1]], tl.float32)
    for start in range(0, FEATURES, CHUNK):
        k = start + tl.arange(0, CHUNK)
        at = k[None, :]
        x = tl.load(pointers + at * stride, mask=(t < PAGE) & (at < FEATURES), other=0.0).to(tl.float32)
        inside = (k[:, None] < FEATURES) & (d < FEATURES)
        part = tl.load(matrix + k[:, None] * FEATURES + d, mask=inside, other=0.0)
        y = tl.dot(x, part, y, input_precision="ieee")
    return y


@triton.jit(do_not_specialize=["slots", "first", "places"])
def encode_kernel(
    tail, tail_strides, slots, rows, starts, matrix, codes, constants, scales, first, places,
    GROUPS: tl.constexpr, PAGE: tl.constexpr, FEATURES: tl.constexpr, TOKENS: tl.constexpr,
    RUNS: tl.constexpr, PADDED: tl.constexpr, MAPS: tl.constexpr, BY_HEAD: tl.constexpr,
    CHUNK: tl.constexpr, LEVEL: tl.constexpr, OPTION: tl.constexpr, GAIN: tl.constexpr,
    SCALE: tl.constexpr, SCALE_OPTION: tl.constexpr,
):  # fmt: skip
    """``TOKENS`` of one page of one head; grid (pages, heads, parts of a page). See :func:`encode_pages`."""
    RUN: tl.constexpr = FEATURES // RUNS
    g = tl.program_id(1).to(tl.int64)
    start = tl.load(starts + tl.program_id(0))
    if start >= first:
        b = tl.load(rows + tl.program_id(0))
        row = (b * places + (start - first) // PAGE % places) * GROUPS + g
        t = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)[:, None]
        c = tl.arange(0, RUNS * PADDED)[None, :]
        d = tl.where(c % PADDED < RUN, c // PADDED * RUN + c % PADDED, FEATURES)
        slot = ((start + t) % slots).to(tl.int32)
        pointers = tail + b * tail_strides[0] + g * tail_strides[1]
        pointers += slot * tail_strides[2]
        if MAPS:
            own = matrix + (g * FEATURES * FEATURES if BY_HEAD else 0)
            x = mapped(pointers, tail_strides[3], own, t, d, PAGE, FEATURES, CHUNK)
        else:
            inside = (t < PAGE) & (d < FEATURES)
            x = tl.load(pointers + d * tail_strides[3], mask=inside, other=0.0).to(tl.float32)
        if SCALE is not None:
            x = SCALE(x, scales, row, g, t, d, SCALE_OPTION, PAGE, FEATURES)
        LEVEL(x, codes, constants, row, t, d, OPTION, PAGE, FEATURES, RUNS, GAIN)


def encode_obstacle(text: str, shape: PageShape) -> str | None:
    """Why no kernel packs pages of this shape by this codec; None if one does."""
    try:
        tile = tile_codec(text, shape)
    except CodecError as error:
        return error.what
    if tile.level.encode is None or (tile.scale is not None and tile.scale.encode is None):
        return f"no kernel packs pages of {text}"
    if shape.features % tile.level.runs:
        return f"{shape.features} features do not fill the bytes of {tile.codec.quantizer}'s codes"
    tokens, padded = _tile(tile, shape)
    if tokens * tile.level.runs * padded > MAX_TILE:
        return f"a page of {shape.tokens} tokens of {shape.features} features is more than a program holds"
    return None


def _tile(tile: TileCodec, shape: PageShape) -> tuple[int, int]:
    """Tokens of a program and features of a run, padded; a matrix product needs 16 of each."""
    least = _LEAST if tile.maps else 1
    padded: int = triton.next_power_of_2(shape.features // tile.level.runs)
    tokens: int = triton.next_power_of_2(shape.tokens)
    if tile.scale is None or tile.scale.axis != "channel":
        tokens = min(tokens, _BLOCK)
    return max(least, tokens), max(least // tile.level.runs, padded)


def encode_pages(
    store: Sequence[torch.Tensor],
    constants: Sequence[torch.Tensor],
    codec: str,
    page: int,
    rows: torch.Tensor,
    starts: torch.Tensor,
) -> None:
    """Pack pages that are complete in the tail; nothing is read back to the host.

    Args:
        store: ``[packed, tail, first, *buffers]`` of :mod:`graphwright.ir.packed_ops`; the buffers are
            written, and contiguous.
        constants: the codec's tables.
        codec: as text; one that :func:`encode_obstacle` has nothing against.
        page: P.
        rows, starts: ``[n]`` int64, each page's row and first token; a start below F is passed over.
    """
    _, tail, first, *buffers = store
    side = Side.of(store, constants, codec, page)
    assert side.tile is not None and side.shape is not None
    tile, matrix = side.tile, side.matrix()
    tokens, padded = _tile(tile, side.shape)
    own = side.arguments("page")
    Launch(
        encode_kernel,
        (rows.shape[0], tail.shape[1], triton.cdiv(page, tokens)),
        {
            "tail": tail,
            "tail_strides": tail.stride(),
            "slots": tail.shape[2],
            "rows": rows,
            "starts": starts,
            "matrix": matrix,
            "codes": _as_bits(own["page_codes"]),
            "constants": own["page_constants"],
            "scales": _as_bits(own["page_scales"]),
            "first": first.shape[2],
            "places": buffers[0].shape[1],
        },
        {
            "GROUPS": tail.shape[1],
            "PAGE": page,
            "FEATURES": tail.shape[3],
            "TOKENS": tokens,
            "RUNS": tile.level.runs,
            "PADDED": padded,
            "MAPS": matrix is not None,
            "BY_HEAD": matrix is not None and matrix.shape[0] > 1,
            "CHUNK": _LEAST,
            "LEVEL": tile.level.encode,
            "OPTION": tile.level.option,
            "GAIN": tile.level.gain,
            "SCALE": tile.scale and tile.scale.encode,
            "SCALE_OPTION": tile.scale.option if tile.scale else 0,
        },
        num_warps=min(16, max(1, tokens * tile.level.runs * padded // 1024)),
        options=EXACT,
        label=f"encode d{tail.shape[3]} p{page} {codec}",
    ).run()


def _as_bits(buffers: tuple[torch.Tensor, ...] | None) -> tuple[torch.Tensor, ...] | None:
    """Views that a kernel writes bits into, where it rounds by itself."""
    if buffers is None:
        return None
    return tuple(b.view(_AS_BITS.get(b.dtype, b.dtype)) for b in buffers)
