"""Recursive rejection sampling of several draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graphwright.runtime.speculation.verifiers.sampling_rule import (
    SamplingRule,
    accepts,
    draw,
    residual,
    verifier,
)


@verifier("recursive")
@dataclass(frozen=True)
class Recursive(SamplingRule):
    """Tries siblings in the order they were drawn, each against what the ones before left of the target.

    The draws are without replacement: after x the next one comes from q without x, renormalized. Draw x is
    kept with probability min(1, p(x) / q(x)); otherwise p becomes the normalized max(p - q, 0). The last p is
    drawn from where none is kept. With one draw this is rejection sampling.

    Source: Jeon et al. 2024, "Recursive Speculative Decoding"; Chen et al. 2024, "Sequoia" (its
    verification); Yang et al. 2024, "Multi-Candidate Speculative Decoding".
    """

    def pick(self, p: torch.Tensor, q: torch.Tensor | None, drawn: Sequence[int]) -> int:
        assert q is not None
        left = q.clone()
        for token in drawn:
            left /= left.sum()
            if accepts(p[token] / left[token]):
                return token
            p = residual(p, left)
            left[token] = 0.0
        return draw(p)
