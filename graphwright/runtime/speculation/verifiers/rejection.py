"""Rejection sampling of one draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from graphwright.runtime.speculation.verifiers.sampling_rule import (
    SamplingRule,
    accepts,
    draw,
    residual,
    verifier,
)


@verifier("rejection")
@dataclass(frozen=True)
class Rejection(SamplingRule):
    """Keeps a drawn token x with probability min(1, p(x) / q(x)), else draws from max(p - q, 0).

    Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", section 2.3;
    Chen et al. 2023, "Accelerating Large Language Model Decoding with Speculative Sampling".
    """

    single: ClassVar[bool] = True

    def pick(self, p: torch.Tensor, q: torch.Tensor | None, drawn: Sequence[int]) -> int:
        assert q is not None
        (token,) = drawn
        return token if accepts(p[token] / q[token]) else draw(residual(p, q))
