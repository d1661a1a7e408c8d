"""Inputs of ``observe_queries``: short steps, ragged long ones, rings that come round."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tests.numerics.inputs import Case, randn

STEPS = {
    "one-token": (1, 80, [5, 0], [1, 1]),
    "comes-round": (9, 70, [66, 139], [9, 3]),
    "step-of-the-limit": (64, 96, [1000, 40], [64, 64]),
    "prefill": (100, 80, [30, 0], [100, 77]),
    "longer-than-the-ring": (300, 72, [0, 500], [300, 12]),
    "small-ring": (30, 20, [3, 7], [30, 0]),
}


def eviction_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Heads and features that differ from the other sizes."""
    for name, (tokens, slots, lengths, counts) in STEPS.items():
        yield (
            name,
            dict(
                ring=randn(2, 6, slots, 10, dtype=dtype),
                q=randn(2, tokens, 6, 10, dtype=dtype).transpose(1, 2),
                lengths=torch.tensor(lengths),
                counts=torch.tensor(counts),
            ),
        )
