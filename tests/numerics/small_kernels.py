"""Triton kernels with every kind of argument, for what compiles ahead of time."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
import triton
import triton.language as tl

from graphwright.kernels.triton.launch import Launch


@triton.jit
def halve(pointer, at, BITS: tl.constexpr):
    return tl.load(pointer + at).to(tl.float32) * BITS


@triton.jit
def double(pointer, at, BITS: tl.constexpr):
    return tl.load(pointer + at).to(tl.float32) * (2 * BITS)


@triton.jit(do_not_specialize=["tokens"])
def mixed(
    x, buffers, strides, out, mask, tokens, rows, scale, wide,
    DECODE: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr, NAMES: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(x + at * rows, mask=at < tokens, other=0.0).to(tl.float32) * scale
    for index in tl.static_range(len(buffers)):
        total += DECODE(buffers[index], at * strides[index], BLOCK)
    if mask is not None:
        total = tl.where(tl.load(mask + at) != 0, total, 0.0)
    if NAMES[0] == "wide":
        total += (wide >> 32).to(tl.float32)
    tl.store(out + at, total.to(DTYPE), mask=at < tokens)


@triton.jit
def product(a, b, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def broken(x, SIZE: tl.constexpr):
    tl.static_assert(SIZE == 0, "SIZE must be 0")


class Unruly:
    """Stands for a kernel whose compiler does not come back."""

    def __init__(self, fn: Any) -> None:
        self.fn = fn

    def run(self, **_: Any) -> None:
        self.fn()


@Unruly
def crashing() -> None:
    print("nonsense on the compiler's own output", flush=True)
    os.abort()


@Unruly
def hanging() -> None:
    time.sleep(600)


def mixed_launch(device: str = "meta", **changes: Any) -> Launch:
    """A launch of :func:`mixed`; ``changes`` replace arguments, constants and fields of the launch."""
    x = torch.zeros(256, dtype=torch.float16, device=device)
    codes = torch.zeros(2, 256, dtype=torch.uint8, device=device)
    arguments = {
        "x": x, "buffers": (codes[0], codes[1, 1:]), "strides": (1, 2), "out": x, "mask": None,
        "tokens": 5, "rows": 7, "scale": 1.25, "wide": 2**40,
    }  # fmt: skip
    constants = {"DECODE": halve, "BLOCK": 128, "DTYPE": tl.float16, "NAMES": ("wide", 8)}
    fields: dict[str, Any] = {"grid": (1,), "num_warps": 4, "label": "mixed"}
    for name, value in changes.items():
        place = next(d for d in (arguments, constants, fields) if name in d)
        place[name] = value
    return Launch(mixed, arguments=arguments, constants=constants, **fields)
