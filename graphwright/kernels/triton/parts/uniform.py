"""``uniform`` in a kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from graphwright.ir.codecs import PageShape
from graphwright.ir.codecs.parts.uniform import Uniform
from graphwright.kernels.triton.codes import centred, load_codes
from graphwright.kernels.triton.packing import nearest_integer, store_codes
from graphwright.kernels.triton.tiles import LevelTile, code_parts, code_runs, level_tile


@triton.jit
def decode_uniform(
    buffers, constants, row, t, d,
    OPTION: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, PAGE: tl.constexpr, FEATURES: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """Codes around their centre; the step between levels is the tile's ``unit``."""
    return centred(load_codes(buffers[0], row, t, d, OPTION, PART, PARTS, PAGE, FEATURES), OPTION, HALF)


@triton.jit
def encode_uniform(
    y, buffers, constants, row, t, d,
    OPTION: tl.constexpr, PAGE: tl.constexpr, FEATURES: tl.constexpr, RUNS: tl.constexpr, GAIN: tl.constexpr,
):  # fmt: skip
    """The nearest of evenly spaced codes; a NaN gets 0."""
    TOP: tl.constexpr = (1 << OPTION) - 1
    at = (y + 1.0) * (TOP / 2)
    codes = nearest_integer(tl.minimum(tl.maximum(at, 0.0), TOP * 1.0))
    codes = tl.where(y == y, codes, 0.0).to(tl.int32)
    store_codes(buffers[0], codes, row, t, OPTION, PAGE, FEATURES, RUNS)


@level_tile("uniform")
def uniform(part: Uniform, shape: PageShape) -> LevelTile:
    """Code c stands for ``c * 2 / (2**bits - 1) - 1``."""
    top = 2**part.bits - 1
    centre = 2 ** (part.bits - 1)
    return LevelTile(
        decode_uniform,
        encode_uniform,
        option=part.bits,
        parts=code_parts(part.bits),
        runs=code_runs(part.bits),
        unit=2 / top,
        shift=centre - top / 2,
    )
