"""Comparing shapes, strides and dtypes of fake tensors without adding guards."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are equal as expressions; never adds a guard."""
    left = a.node.expr if isinstance(a, torch.SymInt) else a
    right = b.node.expr if isinstance(b, torch.SymInt) else b
    return bool(left == right)


def same_shape(a: Sequence[int | torch.SymInt], b: Sequence[int | torch.SymInt]) -> bool:
    """Whether two shapes (or strides) are equal as expressions."""
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same shape, strides, dtype and device."""
    return (
        a.dtype == b.dtype
        and a.device == b.device
        and same_shape(a.shape, b.shape)
        and same_shape(a.stride(), b.stride())
    )


def same_type(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same shape, dtype and device."""
    return a.dtype == b.dtype and a.device == b.device and same_shape(a.shape, b.shape)
