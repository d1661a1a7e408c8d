"""Keeps what the target finds typical. Lossy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from graphwright.ir.errors import InputError
from graphwright.runtime.speculation.verifiers.sampling_rule import SamplingRule, draw, verifier


@verifier("typical")
@dataclass(frozen=True)
class Typical(SamplingRule):
    """Lossy: keeps the likeliest candidate with more probability than min(epsilon, delta exp(-entropy)).

    Where the target is sure, a candidate has to be likely; where much could follow, less is asked. If there
    is none, the next token is drawn from the target. Tokens therefore do not follow the target's
    distribution: they follow the drafter wherever it is typical. Greedy decoding compares with the likeliest
    token and stays exact. Here the walk takes the likeliest typical child of each token, where the source
    takes the longest typical path.

    Options:
        epsilon: no candidate has to be more likely than this.
        delta: of exp(-entropy), the share that a candidate needs; the source uses the root of epsilon.

    Source: Cai et al. 2024, "Medusa", section 2.3.1 (typical acceptance).
    """

    exact: ClassVar[bool] = False
    judges_guesses: ClassVar[bool] = True

    epsilon: float = 0.09
    delta: float = 0.3

    def __post_init__(self) -> None:
        if not (0 < self.epsilon <= 1 and 0 < self.delta <= 1):
            raise InputError(
                f"epsilon={self.epsilon} and delta={self.delta} are not thresholds",
                where="verifier=typical",
                hint="both above 0 and at most 1",
            )

    def pick(self, p: torch.Tensor, q: torch.Tensor | None, drawn: Sequence[int]) -> int:
        # exp(-entropy) is the product of p^p; 0 log 0 is 0.
        certainty = torch.exp(torch.special.xlogy(p, p).sum())
        best = max(drawn, key=lambda token: float(p[token]))
        return best if bool(p[best] > torch.clamp(self.delta * certainty, max=self.epsilon)) else draw(p)
