"""Products of few rows with large matrices: the tiles that linear and routed layers share.

A tile of 16 rows is the only shape that is ever multiplied: it compiles to ``mma.sync.m16n8k16`` on NVIDIA
(from 64 rows on it would be ``wgmma`` on sm_90 and ``tcgen05`` on sm_100) and to ``mfma 16x16`` on AMD. An
output element is the sum over k in one order, in float32, whatever else is in the tile; what decides that
order (``tile_k`` and the split of K) is chosen from the weights and the device alone. How many rows a program
takes and how deep its pipeline is changes no bit.
"""

# Kernels are not Python: their arguments have no Python types, and tuples of tiles grow.
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from graphwright.kernels.triton.configs import DeviceFacts

ROWS = 16  # of the one tile that is multiplied


@dataclass(frozen=True)
class LinearConfig:
    """How a linear is cut up.

    Attributes:
        tile_n: output features of a program.
        tile_k: input features of a tile; a step of the loop takes two.
        split: programs that share the input features of a tile; their sums are added in a second launch.
        num_warps, num_stages: of the compiled kernel.
    """

    tile_n: int
    tile_k: int
    split: int
    num_warps: int
    num_stages: int

    def span(self, features: int) -> int:
        """Input features of one split: steps of the loop."""
        step = 2 * self.tile_k
        return max(1, triton.cdiv(features, self.split * step)) * step


def linear_config(
    columns: int, features: int, dtype: torch.dtype, device: DeviceFacts, row_tiles: int = 1
) -> LinearConfig:
    """A configuration for ``columns`` output features (of all weights of a group) and ``features`` inputs.

    Memory is saturated by bytes in flight (bandwidth times latency: 3 to 6 MB on an H100 or B200), and a
    multiprocessor can take in about four times its share of the bandwidth: so it is enough that most of them
    have a tile, and evenness is not needed. Wide tiles read ``x`` less often. A tile is as wide as leaves
    three quarters of the multiprocessors one; K is split only where even tiles of 16 leave half of them
    without work and a program's share of K takes longer than the second launch.

    Args:
        row_tiles: of a program. Only the stages depend on it.
    """
    size = dtype.itemsize
    enough = device.multiprocessors * 3 // 4
    tile_n = next((n for n in (64, 32) if triton.cdiv(columns, n) >= enough), 16)
    split = _split(triton.cdiv(columns, tile_n), tile_n * features * size, device)
    if size == 4:  # multiplied without tensor cores on NVIDIA: operands are in registers
        return LinearConfig(tile_n, 32, split, 4, 3)
    warps = 2 if tile_n == 16 else 4
    if features % 8:  # loads of two bytes, which wait in registers
        return LinearConfig(tile_n, 32, split, warps, 2)
    tile_k = 64 if tile_n == 64 else 128
    if device.kind == "rocm":  # loads wait in registers, whatever their size
        return LinearConfig(tile_n, tile_k, split, tile_n // 16, 2)
    resident = 2 if triton.cdiv(columns, tile_n) * split > device.multiprocessors else 1
    stage = 2 * (tile_n + ROWS * row_tiles) * tile_k * size
    stages = max(2, min(6, (device.shared_memory - 1024) // resident // stage))
    return LinearConfig(tile_n, tile_k, split, warps, stages)


def row_tiles_of(rows: int, dtype: torch.dtype, tile_n: int = 32) -> int:
    """Tiles of rows of a program: as few as hold the rows, at most four.

    At most two in float32 and with tiles of 16 columns (of two warps): more spill registers.
    """
    most = 2 if dtype.itemsize == 4 or tile_n == 16 else 4
    return next((n for n in (1, 2, 4) if rows <= ROWS * n or n == most), most)


def _split(tiles: int, tile_bytes: int, device: DeviceFacts) -> int:
    """Splits of K: the power of two with the least estimated time, 1 unless it gains a fifth.

    A program takes in about 50 bytes a nanosecond however idle the others are; a second launch costs about
    two microseconds.
    """
    best, best_time = 1, 0.8 * tile_bytes / 50
    for split in (2, 4, 8, 16):
        time = tile_bytes / split / 50 + 2000
        if tiles * split <= device.multiprocessors and time < best_time:
            best, best_time = split, time
    return best


@triton.jit
def multiply(
    x, offsets, rows, w, w_stride, width, begin, end,
    TILES: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, EVEN: tl.constexpr,
    TRANSPOSED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tiles ``[16, TILE_N]`` float32 of ``x @ w.T`` over input features ``begin`` to ``end``.

    Row r of tile i lies at ``x + offsets[i][r]``; rows from number ``rows`` on are zeros and not read. ``w``
    points to the tile's first of ``width`` columns, in a matrix ``[n, k]`` (``[k, n]`` if TRANSPOSED) with
    ``w_stride``; what the sums of further columns hold has no meaning. EVEN: ``end - begin`` is a multiple of
    ``2 * TILE_K``.

    Runs of TILE_K features go to two sums in turn, added at the end: an instruction waits for the one before
    it on the same sum, and one chain of them would take as long as the weights take to arrive.
    """
    row = tl.arange(0, 16)
    lane = tl.arange(0, TILE_K)
    n = tl.arange(0, TILE_N)
    if not TRANSPOSED:  # no mask across rows of weights: loads stay wide, and the last row is read again
        n = tl.minimum(n, width - 1)
    sums = ()
    for _ in tl.static_range(2 * TILES):
        sums += (tl.zeros((16, TILE_N), tl.float32),)
    for k in tl.range(begin, end, 2 * TILE_K, num_stages=STAGES):
        new = ()
        for chain in tl.static_range(2):
            start = k + chain * TILE_K
            inside = start + lane < end
            if TRANSPOSED:
                address = w + start.to(tl.int64) * w_stride + (lane[:, None] * w_stride + n[None, :])
                mask = (n < width)[None, :]
                if not EVEN:
                    mask = mask & inside[:, None]
                weights = tl.load(address, mask=mask, other=0.0)
            else:
                address = w + start + (n[:, None] * w_stride + lane[None, :])
                weights = tl.load(address) if EVEN else tl.load(address, mask=inside[None, :], other=0.0)
                weights = weights.T
            for i in tl.static_range(TILES):
                mask = (i * 16 + row < rows)[:, None]
                if not EVEN:
                    mask = mask & inside[None, :]
                inputs = tl.load(x + start + (offsets[i][:, None] + lane[None, :]), mask=mask, other=0.0)
                product = tl.dot(inputs, weights, sums[chain * TILES + i], input_precision="ieee")
                new += (product,)
        sums = new
    results = ()
    for i in tl.static_range(TILES):
        results += (sums[i] + sums[TILES + i],)
    return results
