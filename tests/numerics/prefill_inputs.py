"""Inputs of ``prefill_attention``: every mask, ragged rows, and the steps that attend to everything."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tests.numerics.inputs import Case, after_append, step

#: Masks of small blocks, one of each kind.
MASKS = (
    "a_shape(block=16, sinks=16, recent=48)",
    "vertical_slash(block=16, verticals=32, slashes=32)",
    "chunked(block=16, chunk=32, keep=0.3)",
)
#: By name: rows that begin in the middle of a block, that are shorter than the step, and that have so few
#: tokens that they attend to everything.
LONG_STEPS: dict[str, dict[str, Any]] = {
    "one-row": dict(tokens=100, lengths=[160], heads=(2, 1), dims=(16, 16)),
    "ragged": dict(tokens=90, lengths=[75, 0, 130], counts=[90, 70, 20], heads=(4, 2), dims=(16, 24)),
    "softcap": dict(tokens=70, lengths=[100, 41], softcap=3.0, heads=(4, 2), dims=(16, 16)),
    "sinks": dict(tokens=80, lengths=[100, 41], counts=[80, 66], sinks=True, heads=(4, 2), dims=(16, 16)),
}


def long_step(dtype: torch.dtype, name: str, mask: str) -> dict[str, Any]:
    """Arguments of ``prefill_attention``; slots that hold no token are 50, which everyone would notice."""
    arguments = after_append(step(dtype, **LONG_STEPS[name]))
    stores = {store: arguments[store].nan_to_num(50.0) for store in ("keys", "values")}
    return {**arguments, **stores, "mask": mask}


def prefill_cases(dtype: torch.dtype) -> Iterator[Case]:
    """All of them, and short steps."""
    for name in LONG_STEPS:
        for mask in MASKS:
            yield f"{name}-{mask.split('(')[0]}", long_step(dtype, name, mask)
    short = after_append(step(dtype, tokens=64, lengths=[100, 3], counts=[64, 9], heads=(2, 1)))
    yield "short", {**short, "mask": MASKS[0]}
    tree = after_append(step(dtype, tokens=7, lengths=[100], tree=True, sinks=True))
    yield "tree", {**tree, "mask": MASKS[0]}
