"""``prefixkv``: layers that spread their attention keep more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from graphwright.ir.evictors.evictor import Evictor, Seen, register_evictor

_STEPS = 40  # of the binary search: far below one token


@register_evictor
@dataclass(frozen=True)
class PrefixKV(Evictor):
    """One share of attention for all layers: each keeps the best tokens that hold so much of it.

    Source: Wang et al., "PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models
    Need for Efficient Generation" (2024): tokens in the order of their attention, the cumulative share of
    a prefix of them, and a binary search for the share at which all layers together use the budget. It is
    searched on calibration text when the plan is made, so that memory is known.
    """

    name: ClassVar[str] = "prefixkv"
    summary: ClassVar[str] = "what the newest queries attend to; layers keep equal shares of attention"
    source: ClassVar[str] = "PrefixKV, Wang et al. 2024"
    by_layer: ClassVar[bool] = True

    def score(self, seen: Seen) -> torch.Tensor:
        """Attention of the newest queries."""
        return seen.attention()

    def shares(self, attention: Sequence[torch.Tensor], keep: float) -> list[float]:
        """Binary search of the share of attention; the lengths are then scaled to the budget exactly."""
        cumulative = [
            torch.sort(x.double(), dim=-1, descending=True).values.cumsum(-1)
            / x.double().sum(-1, keepdim=True)
            for x in attention
        ]

        def kept(share: float) -> list[float]:
            """The mean length of the prefixes, as a fraction of all tokens."""
            return [float((x < share).double().mean()) for x in cumulative]

        low, high = 0.0, 1.0
        for _ in range(_STEPS):
            middle = (low + high) / 2
            low, high = (low, middle) if sum(kept(middle)) > keep * len(attention) else (middle, high)
        return _with_mean(kept(low), keep)


def _with_mean(shares: list[float], mean: float) -> list[float]:
    """Scaled to this mean, none above 1: what a full layer cannot take goes to the others."""
    total, open_layers = mean * len(shares), list(range(len(shares)))
    found = [0.0] * len(shares)
    while open_layers:
        weight = sum(max(shares[i], 1e-9) for i in open_layers)
        scaled = {i: total * max(shares[i], 1e-9) / weight for i in open_layers}
        full = [i for i, share in scaled.items() if share >= 1]
        if not full:
            for i, share in scaled.items():
                found[i] = share
            return found
        for i in full:
            found[i] = 1.0
            open_layers.remove(i)
        total -= len(full)
    return found
