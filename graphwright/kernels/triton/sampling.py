"""Greedy choice and verification of drafts on the device."""

# (device functions have no types)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from graphwright.kernels.triton.launch import Launch

_LOWEST = tl.constexpr(-(2**63))
# Programs of the first stage: a few waves on the largest devices; more rows take longer parts.
_PROGRAMS, _MOST_PARTS = 1024, 128


@triton.jit
def _order(value, index):
    """int64 whose maximum is the largest value and, among equal ones, the lowest index; NaN is largest."""
    value = value.to(tl.float32)
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    key = tl.where(value == value, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    return (key.to(tl.int64) << 32) | (index ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit(do_not_specialize=["blocks", "parts"])
def argmax_parts_kernel(logits, stride, best, blocks, parts, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr):
    """The best of ``blocks`` blocks of one row: ``best [R, parts]`` int64, see :func:`_order`."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    found = tl.full([BLOCK], _LOWEST, tl.int64)
    for block in range(part * blocks, part * blocks + blocks):
        index = block * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(logits + row * stride + index, mask=index < VOCABULARY, other=0.0)
        found = tl.maximum(found, tl.where(index < VOCABULARY, _order(value, index), _LOWEST))
    tl.store(best + row * parts + part, tl.max(found))


@triton.jit(do_not_specialize=["parts"])
def argmax_merge_kernel(best, chosen, parts, BLOCK: tl.constexpr):
    """The index of the best of all parts: ``chosen [R]`` int64."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    found = tl.max(tl.load(best + row * parts + part, mask=part < parts, other=_LOWEST))
    tl.store(chosen + row, (found & 0xFFFFFFFF) ^ 0x7FFFFFFF)


@triton.jit(do_not_specialize=["positions", "stride_argmax", "stride_tokens"])
def verify_greedy_kernel(
    argmax, tokens, counts, accepted, following, stride_argmax, stride_tokens, positions, BLOCK: tl.constexpr
):
    """One program a row; ``positions`` is T."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    count = tl.minimum(tl.load(counts + row), positions).to(tl.int32)
    draft = (at >= 1) & (at < count)
    token = tl.load(tokens + row * stride_tokens + at, mask=draft, other=0)
    before = tl.load(argmax + row * stride_argmax + at - 1, mask=draft, other=0)
    kept = tl.min(tl.where(draft & (token != before), at, count))
    tl.store(accepted + row, kept.to(tl.int64))
    last = row * stride_argmax + kept - 1
    tl.store(following + row, tl.load(argmax + last, mask=kept > 0, other=-1))


def argmax_rows(logits: torch.Tensor) -> torch.Tensor:
    """The index of the largest logit of each row: the lowest among equal ones, the first NaN if there is one.

    Unlike ``torch.argmax``, which gives a row of up to 130,560 numbers to one block of threads
    (``ATen/native/cuda/Reduce.cuh``: it splits from 256 numbers for each of 512 threads), one row uses the
    whole device.

    Args:
        logits: ``[R, V]`` float32, float16 or bfloat16.

    Returns:
        ``[R]`` int64.
    """
    rows, vocabulary = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    block = 1024
    most = max(1, min(_MOST_PARTS, _PROGRAMS // max(rows, 1)))
    blocks = triton.cdiv(vocabulary, block * most)
    parts = triton.cdiv(vocabulary, block * blocks)
    best = logits.new_empty((rows, parts), dtype=torch.int64)
    chosen = logits.new_empty((rows,), dtype=torch.int64)
    arguments = {"logits": logits, "stride": logits.stride(0), "best": best, "blocks": blocks, "parts": parts}
    constants = {"VOCABULARY": vocabulary, "BLOCK": block}
    Launch(argmax_parts_kernel, (rows, parts), arguments, constants, label="argmax parts").run()
    Launch(
        argmax_merge_kernel,
        (rows,),
        {"best": best, "chosen": chosen, "parts": parts},
        {"BLOCK": _MOST_PARTS},
        num_warps=1,
        label="argmax merge",
    ).run()
    return chosen


def verify_greedy(
    argmax: torch.Tensor, tokens: torch.Tensor, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many tokens of a step stay, when greedy decoding checks a drafted chain.

    A row's step is its newest token and ``counts[b] - 1`` drafted ones. A draft stays if it and all drafts
    before it are what the model chose at the position before. End-of-sequence tokens are the caller's.

    Args:
        argmax: ``[B, T]`` int64, the model's choice after each token of the step.
        tokens: ``[B, T]`` int64, the tokens of the step; those from ``counts[b]`` on are ignored.
        counts: ``[B]`` integers from 0 to T.

    Returns:
        ``accepted [B]`` int64, the tokens of the step that stay (the newest one counts; 0 only where
        ``counts[b]`` is 0), and ``following [B]`` int64, the model's choice after the last of them (-1 where
        there is none).
    """
    batch, positions = tokens.shape
    argmax = argmax if argmax.stride(1) == 1 else argmax.contiguous()
    tokens = tokens if tokens.stride(1) == 1 else tokens.contiguous()
    accepted = tokens.new_empty((batch,), dtype=torch.int64)
    following = tokens.new_empty((batch,), dtype=torch.int64)
    arguments = {
        "argmax": argmax,
        "tokens": tokens,
        "counts": counts,
        "accepted": accepted,
        "following": following,
        "stride_argmax": argmax.stride(0),
        "stride_tokens": tokens.stride(0),
        "positions": positions,
    }
    block = max(16, triton.next_power_of_2(positions))
    label = f"verify_greedy {block}"
    Launch(verify_greedy_kernel, (batch,), arguments, {"BLOCK": block}, num_warps=1, label=label).run()
    return accepted, following
