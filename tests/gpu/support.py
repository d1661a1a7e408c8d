"""What the tests on a GPU share: its dtypes, inputs that move there, and comparisons with references.

``GRAPHWRIGHT_GPU_TESTS=cpu`` runs the same tests in Triton's interpreter, bfloat16 left out.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.utils._pytree import tree_map

from graphwright.ir.ops import SEMANTIC_OPS
from graphwright.kernels import registry

DEVICE = torch.device(os.environ.get("GRAPHWRIGHT_GPU_TESTS", "cuda:0"))
REHEARSED = DEVICE.type == "cpu"
BF16, HALF, SINGLE = torch.bfloat16, torch.float16, torch.float32
DTYPES = (HALF, SINGLE) if REHEARSED else (BF16, HALF, SINGLE)
#: What most tests of layouts and options use: what caches are in.
USUAL = HALF if REHEARSED else BF16
#: Relative error (norms). Probabilities and results are rounded to the dtype, codes' levels to float16;
#: float32 sums in another order, with the approximate exponential of the chip.
TOLERANCE = {BF16: 6e-3, HALF: 1e-3, SINGLE: 2e-5}


def moved(value: Any) -> Any:
    """The same on the device: strides, offsets and what lies between the numbers stay."""

    def move(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).clone().to(DEVICE)
        return whole.as_strided(x.shape, x.stride(), x.storage_offset())

    return tree_map(move, value)


def wide(value: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The same numbers in a wider dtype; NaN, which marks what is not to be read, becomes zero."""

    def widen(x: Any) -> Any:
        return x.to(dtype).nan_to_num() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return tree_map(widen, value)


def kernel(op_name: str, arguments: dict[str, Any]) -> Any:
    """The Triton kernel for these arguments; fails where another would run."""
    found = registry.select(op_name, DEVICE, ("triton",), **arguments)
    assert found.provider == "triton", found.reason
    return found.op


def reference(op_name: str, arguments: dict[str, Any]) -> Any:
    """The op's reference body, on the CPU."""
    return SEMANTIC_OPS[op_name].overload(**arguments)


def assert_near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Close by the norm of the difference; everything written, nothing that is no number."""
    assert found.is_contiguous() and not found.isnan().any()
    mine, wanted = found.cpu().double(), expected.double()
    error = float((mine - wanted).norm() / wanted.norm().clamp(min=1e-30))
    assert error < TOLERANCE[dtype], error


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal, NaN included."""
    one, other = one.cpu().contiguous(), other.cpu().contiguous()
    if one.is_floating_point():
        one, other = one.view(torch.uint8), other.view(torch.uint8)
    return torch.equal(one, other)
