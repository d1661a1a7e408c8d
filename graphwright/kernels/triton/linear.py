"""Linear layers of decode steps: weights are streamed once, and a row's bits do not depend on its company.

Up to 64 rows share a program's tile of weights (``skinny.py`` says how, and why bits are the same): a token
has the same logits in a step of one token and in the verification of eight. A library that picks its kernel
by the number of rows does not give that. Prompts (more than 64 tokens a row) are bound by arithmetic and go
to the library.
"""

# Kernels are not Python: their arguments have no Python types, and tuples of tiles grow.
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from graphwright.ir.errors import InputError
from graphwright.kernels.registry import implements
from graphwright.kernels.triton.configs import MAX_STEP, device_facts
from graphwright.kernels.triton.launch import Launch
from graphwright.kernels.triton.skinny import ROWS, linear_config, multiply, row_tiles_of

PROVIDER = "triton"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def find_weight(tile, weights, strides, columns, biases, outs, BIASED: tl.constexpr, TILE_N: tl.constexpr):
    """Of the weight that the tile is part of: itself, its row stride, columns, bias, whether it has one, its
    result, the tile's first column in it, and how many columns the weights before it have."""
    w, bias, out = weights[0], biases[0], outs[0]
    stride, width, biased = tl.cast(strides[0], tl.int32), tl.cast(columns[0], tl.int32), BIASED & 1 != 0
    column, before = tile * TILE_N, tile * 0
    tiles, passed = tl.cdiv(width, TILE_N), width
    for i in tl.static_range(1, len(weights)):
        if tile >= tiles:
            w, bias, out = weights[i], biases[i], outs[i]
            stride, width = tl.cast(strides[i], tl.int32), tl.cast(columns[i], tl.int32)
            biased = (BIASED >> i) & 1 != 0
            column, before = (tile - tiles) * TILE_N, passed
        tiles += tl.cdiv(tl.cast(columns[i], tl.int32), TILE_N)
        passed += tl.cast(columns[i], tl.int32)
    return w, stride, width, bias, biased, out, column, before


@triton.jit(do_not_specialize=["rows", "total"])
def linear_kernel(
    x, weights, biases, outs, sums, x_stride, strides, columns, rows, total,
    K: tl.constexpr, SPAN: tl.constexpr, SPLIT: tl.constexpr, BIASED: tl.constexpr, TILES: tl.constexpr,
    TILE_N: tl.constexpr, TILE_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program: up to ``16 * TILES`` rows, TILE_N columns of one weight, one split of K.

    ``x [rows, K]``; weights, biases, outs: tuples of ``[N_i, K]``, ``[N_i]``, ``[rows, N_i]``, with
    ``strides`` of the weights' rows and ``columns`` N_i. Bit i of BIASED: weight i has a bias (else anything
    may stand in its place). With SPLIT > 1 nothing goes to outs but float32 sums to
    ``sums [SPLIT, rows, total]``, the columns of all weights side by side.
    """
    blocks = tl.cdiv(rows, 16 * TILES)
    # Programs that read the same weights follow each other: all but the first find them in L2.
    start = (tl.program_id(0) % blocks) * 16 * TILES
    w, stride, width, bias, biased, out, column, before = find_weight(
        tl.program_id(0) // blocks, weights, strides, columns, biases, outs, BIASED, TILE_N
    )
    begin = tl.program_id(1) * SPAN
    x += start.to(tl.int64) * x_stride
    w += column.to(tl.int64) * stride
    left = rows - start
    offsets = ()
    for i in tl.static_range(TILES):
        offsets += ((i * 16 + tl.arange(0, 16)) * x_stride,)
    tiles = multiply(
        x, offsets, left, w, stride, width - column, begin, tl.minimum(begin + SPAN, K),
        TILES, TILE_N, TILE_K, K % (2 * TILE_K) == 0, False, STAGES,
    )  # fmt: skip
    at = column + tl.arange(0, TILE_N)
    inside = at < width
    for i in tl.static_range(TILES):
        own = i * 16 + tl.arange(0, 16)
        row = (start + own).to(tl.int64)
        mask = (own < left)[:, None] & inside[None, :]
        if SPLIT == 1:
            result = tiles[i]
            if BIASED:
                result += tl.load(bias + at, mask=inside & biased, other=0.0).to(tl.float32)[None, :]
            tl.store(out + row[:, None] * width + at[None, :], result.to(out.dtype.element_ty), mask=mask)
        else:
            row += tl.program_id(1).to(tl.int64) * rows
            tl.store(sums + row[:, None] * total + (before + at)[None, :], tiles[i], mask=mask)


@triton.jit(do_not_specialize=["rows", "total"])
def add_splits_kernel(
    sums, biases, outs, columns, rows, total,
    SPLIT: tl.constexpr, BIASED: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """A program: TILE_N columns of one row; the splits' sums are added in their order."""
    row = tl.program_id(1).to(tl.int64)
    _, _, width, bias, biased, out, column, before = find_weight(
        tl.program_id(0), outs, columns, columns, biases, outs, BIASED, TILE_N
    )
    at = column + tl.arange(0, TILE_N)
    inside = at < width
    result = tl.zeros((TILE_N,), tl.float32)
    for part in tl.static_range(SPLIT):
        result += tl.load(sums + (part * rows + row) * total + before + at, mask=inside, other=0.0)
    if BIASED:
        result += tl.load(bias + at, mask=inside & biased, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, result.to(out.dtype.element_ty), mask=inside)


def _launches(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    outs: Sequence[torch.Tensor],
) -> list[Launch]:
    """The launches of a group: one, and another where K is split. ``x [rows, K]``, outs ``[rows, N_i]``."""
    rows, features = x.shape
    columns = [w.shape[0] for w in weights]
    sizes = (sum(columns), features, x.dtype, device_facts(x.device))
    row_tiles = row_tiles_of(rows, x.dtype, linear_config(*sizes).tile_n)
    config = linear_config(*sizes, row_tiles)
    tiles = sum(triton.cdiv(n, config.tile_n) for n in columns)
    total = sum(columns)
    sums = x.new_empty((config.split, rows, total), dtype=torch.float32) if config.split > 1 else None
    shared = {
        # Where there is no bias, something of its type that is not read.
        "biases": tuple(w if b is None else b.contiguous() for w, b in zip(weights, biases, strict=True)),
        "outs": tuple(outs),
    }
    biased = sum(1 << i for i, b in enumerate(biases) if b is not None)
    label = f"linear x{len(weights)} m{ROWS * row_tiles} n{config.tile_n} k{config.tile_k}"
    main = Launch(
        linear_kernel,
        (triton.cdiv(rows, ROWS * row_tiles) * tiles, config.split),
        {
            "x": x,
            "weights": tuple(weights),
            **shared,
            "sums": sums,
            "x_stride": x.stride(0),
            "strides": tuple(w.stride(0) for w in weights),
            "columns": tuple(columns),
            "rows": rows,
            "total": total,
        },
        {
            "K": features,
            "SPAN": config.span(features),
            "SPLIT": config.split,
            "BIASED": biased,
            "TILES": row_tiles,
            "TILE_N": config.tile_n,
            "TILE_K": config.tile_k,
            "STAGES": config.num_stages,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        label=label if config.split == 1 else f"{label} split{config.split}",
    )
    if sums is None:
        return [main]
    tile = 256
    add = Launch(
        add_splits_kernel,
        (sum(triton.cdiv(n, tile) for n in columns), rows),
        {"sums": sums, **shared, "columns": tuple(columns), "rows": rows, "total": total},
        {"SPLIT": config.split, "BIASED": biased, "TILE_N": tile},
        num_warps=2,
        label=f"linear x{len(weights)} add{config.split}",
    )
    return [main, add]


def row_major_reason(dtype: torch.dtype, *tensors: torch.Tensor | None) -> str | None:
    """Why tensors beside one of ``dtype`` do not suit: another dtype, or a stride in the last dimension."""
    present = [t for t in tensors if t is not None]
    if dtype not in DTYPES:
        return f"{dtype} is not float32, float16 or bfloat16"
    dtypes = {dtype, *(t.dtype for t in present)}
    if len(dtypes) > 1:
        return f"the inputs have several dtypes: {', '.join(sorted(map(str, dtypes)))}"
    if any(t.dim() > 1 and t.shape[-1] > 1 and t.stride(-1) != 1 for t in present):
        return "a last dimension has a stride"
    return None


def supports_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> str | None:
    """None when ``linear`` takes these, else the reason."""
    return row_major_reason(x.dtype, weight, bias)


def supports_linear_group(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> str | None:
    """None when ``linear_group`` takes these, else the reason."""
    return row_major_reason(x.dtype, *weights, *biases)


@implements("linear", PROVIDER, supports_linear)
def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x [..., K] @ weight[N, K].T + bias[N]``; see :func:`linear_group`."""
    return linear_group(x, [weight], [bias])[0]


@implements("linear_group", PROVIDER, supports_linear_group)
def linear_group(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> list[torch.Tensor]:
    """Linears of the same ``x [..., K]`` in one launch (two where K is split): ``[..., N_i]`` each.

    Steps of more than 64 tokens (``x [B, T, K]`` with T > 64) go to the library. The batch does not matter
    for that: a row's bits depend on how many tokens the step has at most by this, never on B.
    """
    wrong = [w.shape for w in weights if w.shape[1] != x.shape[-1]]
    if wrong:
        raise InputError(
            f"a weight {list(wrong[0])} does not take x {list(x.shape)}", where="linear(x, weight)"
        )
    if x.dim() == 3 and x.shape[1] > MAX_STEP:
        return [F.linear(x, w, b).contiguous() for w, b in zip(weights, biases, strict=True)]
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1 and rows.shape[1] != 1:
        rows = rows.contiguous()
    outs = [x.new_empty((*x.shape[:-1], w.shape[0])) for w in weights]
    for launch in _launches(rows, weights, biases, [o.view(rows.shape[0], o.shape[-1]) for o in outs]):
        launch.run()
    return outs
