"""Mixture-of-experts projections: every (token, choice) pair through its expert's matrix, without the host.

The tiles are those of ``skinny.py``: a pair's bits do not depend on how many pairs there are or which share
its tile. With few pairs to an expert each is a program's only row, and experts that several pairs chose are
read again from L2. With many, pairs are sorted by expert on the device and up to 64 of one expert share a
program. That choice, made from the sizes alone, changes no bit of a result.
"""

# Kernels are not Python: their arguments have no Python types, and tuples of tiles grow.
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from graphwright.ir.errors import InputError
from graphwright.kernels.registry import implements
from graphwright.kernels.triton.configs import DeviceFacts, device_facts
from graphwright.kernels.triton.launch import Launch
from graphwright.kernels.triton.linear import PROVIDER, row_major_reason
from graphwright.kernels.triton.skinny import ROWS, LinearConfig, multiply, row_tiles_of

#: Pairs of an expert, on average, from which sorting them pays: it is some ten small launches.
SORT_FROM = 4


def routed_config(
    features: int, dtype: torch.dtype, device: DeviceFacts, transposed: bool = False, row_tiles: int = 1
) -> LinearConfig:
    """A configuration; only the stages depend on ``row_tiles``.

    Pairs make programs enough, so K is not split. Transposed weights are contiguous along output features:
    64 of them fill a line of the cache.
    """
    size = dtype.itemsize
    tile_n = 64 if transposed and size == 2 else 32
    tile_k = 32 if size == 4 or features % 8 else 64 if transposed else 128
    if device.kind == "rocm":
        return LinearConfig(tile_n, tile_k, 1, tile_n // 16, 2)
    stage = 2 * (tile_n + ROWS * row_tiles) * tile_k * size
    stages = max(2, min(4, (device.shared_memory - 1024) // 2 // stage))
    return LinearConfig(tile_n, tile_k, 1, 4, stages)


@triton.jit(do_not_specialize=["index_token", "index_choice", "choices", "blocks"])
def routed_kernel(
    x, index, weight, bias, out, order, ends, block_ends,
    x_token, x_choice, index_token, index_choice, w_expert, w_stride, bias_expert, choices, blocks, width,
    K: tl.constexpr, EXPERTS: tl.constexpr, ENDS: tl.constexpr, TRANSPOSED: tl.constexpr,
    SORTED: tl.constexpr, TILES: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A program: TILE_N columns of one expert, for one pair, or up to ``16 * TILES`` if SORTED.

    ``x [M, C, K]``, ``index [M, C]``, ``weight [X, N, K]`` (``[X, K, N]`` if TRANSPOSED), ``bias [X, N]`` or
    None, ``out [M * C, N]``. SORTED: ``order [M * C]`` numbers of pairs by expert, ``ends [ENDS]`` where each
    expert's end in it, ``block_ends [ENDS]`` the same in blocks of ``16 * TILES`` pairs; ENDS is a power of
    two above EXPERTS (X). A pair with an expert that there is not becomes NaN, and no weight is read for it.
    """
    # Programs that read the same weights follow each other: all but the first find them in L2.
    block = tl.program_id(0) % blocks
    column = (tl.program_id(0) // blocks) * TILE_N
    if SORTED:
        e = tl.arange(0, ENDS)
        upto = tl.load(block_ends + e)
        is_before = upto <= block
        expert = tl.sum(is_before.to(tl.int32))
        if expert == ENDS:  # there are fewer blocks than there might have been
            return
        first_block = tl.max(tl.where(is_before, upto, 0))
        pairs_before = tl.max(tl.where(is_before, tl.load(ends + e), 0))
        first = (pairs_before + (block - first_block) * 16 * TILES).to(tl.int32)
        rows = tl.load(ends + expert).to(tl.int32) - first
    else:
        first, rows = block, 1
        expert = tl.load(index + (block // choices) * index_token + (block % choices) * index_choice)
    known = (expert >= 0) & (expert < EXPERTS)
    expert = tl.where(known, expert, 0).to(tl.int64)
    numbers, offsets = (), ()
    for i in tl.static_range(TILES):
        own = i * 16 + tl.arange(0, 16)
        number = first + own
        if SORTED:
            number = tl.load(order + number, mask=own < rows, other=0)
        number = number.to(tl.int64)
        numbers += (number,)
        offsets += ((number // choices) * x_token + (number % choices) * x_choice,)
    start = column if TRANSPOSED else column.to(tl.int64) * w_stride
    results = multiply(
        x, offsets, rows, weight + expert * w_expert + start, w_stride, width - column, 0, K,
        TILES, TILE_N, TILE_K, K % (2 * TILE_K) == 0, TRANSPOSED, STAGES,
    )  # fmt: skip
    at = column + tl.arange(0, TILE_N)
    inside = at < width
    for i in tl.static_range(TILES):
        result = results[i]
        if bias is not None:
            own_bias = tl.load(bias + expert * bias_expert + at, mask=inside, other=0.0)
            result += own_bias.to(tl.float32)[None, :]
        result = tl.where(known, result, float("nan"))
        mask = (i * 16 + tl.arange(0, 16) < rows)[:, None] & inside[None, :]
        address = out + numbers[i][:, None] * width + at[None, :]
        tl.store(address, result.to(out.dtype.element_ty), mask=mask)


def _sorted_pairs(
    index: torch.Tensor, experts: int, slots: int, block: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Order, ends and ends in blocks of ``block`` pairs: see :func:`routed_kernel`; on the device."""
    flat = index.reshape(-1)
    flat = torch.where((flat >= 0) & (flat < experts), flat, experts)  # those that there are not come last
    by_expert, order = torch.sort(flat, stable=True)
    numbers = torch.arange(slots, device=index.device, dtype=index.dtype)
    ends = torch.searchsorted(by_expert, numbers, right=True)
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    return order, ends, torch.cumsum((counts + block - 1) // block, 0)


def _launch(
    x: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    transposed: bool,
    out: torch.Tensor,
) -> Launch:
    """The launch that fills ``out [M, C, N]``; sorts the pairs first where that pays."""
    pairs, experts, features, width = index.numel(), weight.shape[0], x.shape[2], out.shape[2]
    is_sorted = pairs >= SORT_FROM * experts and pairs > 1
    row_tiles = row_tiles_of(triton.cdiv(pairs, experts), x.dtype) if is_sorted else 1
    config = routed_config(features, x.dtype, device_facts(x.device), transposed, row_tiles)
    sorting: dict[str, Any] = dict.fromkeys(("order", "ends", "block_ends"))
    slots, blocks = triton.next_power_of_2(experts + 1), pairs
    if is_sorted:
        rows = ROWS * row_tiles
        sorting = dict(zip(sorting, _sorted_pairs(index, experts, slots, rows), strict=True))
        blocks = (pairs + min(experts + 1, pairs) * (rows - 1)) // rows  # as many as there can be
    arguments = {
        "x": x,
        "index": index,
        "weight": weight,
        "bias": bias,
        "out": out,
        **sorting,
        "x_token": x.stride(0),
        "x_choice": 0 if x.shape[1] == 1 else x.stride(1),
        "index_token": index.stride(0),
        "index_choice": index.stride(1),
        "w_expert": weight.stride(0),
        "w_stride": weight.stride(1),
        "bias_expert": 0 if bias is None else bias.stride(0),
        "choices": index.shape[1],
        "blocks": blocks,
        "width": width,
    }
    constants = {
        "K": features,
        "EXPERTS": experts,
        "ENDS": slots,
        "TRANSPOSED": transposed,
        "SORTED": is_sorted,
        "TILES": row_tiles,
        "TILE_N": config.tile_n,
        "TILE_K": config.tile_k,
        "STAGES": config.num_stages,
    }
    label = f"routed{' sorted' if is_sorted else ''}{' kn' if transposed else ''}"
    return Launch(
        routed_kernel,
        (blocks * triton.cdiv(width, config.tile_n),),
        arguments,
        constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        label=f"{label} m{ROWS * row_tiles} n{config.tile_n} k{config.tile_k}",
    )


def supports_routed_linear(
    x: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    transposed: bool = False,
) -> str | None:
    """None when ``routed_linear`` takes these, else the reason."""
    if index.dtype != torch.int64:
        return f"the experts' numbers are {index.dtype}, not int64"
    return row_major_reason(x.dtype, x, weight, bias)


@implements("routed_linear", PROVIDER, supports_routed_linear)
def routed_linear(
    x: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    transposed: bool = False,
) -> torch.Tensor:
    """``[M, C, N]`` of ``x [M, 1 or C, K]`` through the experts ``index [M, C]``.

    Nothing waits for the GPU, so an expert that there is not cannot be an error: its pair becomes NaN.

    Raises:
        InputError: the shapes do not fit.
    """
    inputs, (tokens, choices) = weight.shape[1 if transposed else 2], index.shape
    if x.shape[2] != inputs or x.shape[0] != tokens or x.shape[1] not in (1, choices):
        raise InputError(
            f"weights of {inputs} inputs and {tokens} x {choices} routes do not take x {list(x.shape)}",
            where="routed_linear(x, index, weight)",
        )
    out = x.new_empty((*index.shape, weight.shape[2] if transposed else weight.shape[1]))
    if out.numel():
        _launch(x, index, weight, bias, transposed, out).run()
    return out
