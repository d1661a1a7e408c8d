"""Several independent draws, each kept with a share of what it may be kept with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from graphwright.runtime.speculation.verifiers.sampling_rule import SamplingRule, accepts, draw, verifier

# Halvings of [1, k]: rho to 1e-9, below what float32 probabilities carry.
_HALVINGS = 30


@verifier("k_seq")
@dataclass(frozen=True)
class KSequential(SamplingRule):
    """Tries independent draws one after the other, all by the same test: SpecTr's k-sequential rule.

    Each of k draws x is kept with probability min(1, p(x) / (rho q(x))). With ``beta = sum min(q, p / rho)``
    one is kept with ``kept = 1 - (1 - beta)^k``; a token that no draw gave comes from what is left of p,
    ``p - min(q, p / rho) kept / beta``. The smallest rho that leaves nothing negative accepts most: it solves
    ``kept = rho beta``. At least 1 - (1 - 1/k)^k of the best possible acceptance (the paper's bound).

    Draws are with replacement and their number is settled before, which not every tree does.

    Source: Sun et al. 2023, "SpecTr: Fast Speculative Decoding via Optimal Transport", algorithm 2.
    """

    replacement: ClassVar[bool] = True

    def pick(self, p: torch.Tensor, q: torch.Tensor | None, drawn: Sequence[int]) -> int:
        assert q is not None
        rho = division(p, q, len(drawn))
        for token in drawn:
            if accepts(p[token] / (rho * q[token])):
                return token
        return draw(left_over(p, q, len(drawn), rho))


def division(p: torch.Tensor, q: torch.Tensor, draws: int) -> float:
    """The smallest rho for which :func:`left_over` is a distribution, from 1 to ``draws``; from above."""
    if draws == 1:
        return 1.0
    p, q = p.double(), q.double()
    # min(q, p / rho) is q wherever p >= draws * q, and p / rho wherever p <= q: only what is between depends
    # on rho by itself.
    above, below = p >= draws * q, p <= q
    always, share = float(q[above].sum()), float(p[below].sum())
    between = ~(above | below)
    p, q = p[between], q[between]
    low, high = 1.0, float(draws)
    for _ in range(_HALVINGS):
        rho = (low + high) / 2
        beta = always + share / rho + float(torch.minimum(q, p / rho).sum())
        if 1 - (1 - beta) ** draws > rho * beta:
            low = rho
        else:
            high = rho
    return high


def left_over(p: torch.Tensor, q: torch.Tensor, draws: int, rho: float) -> torch.Tensor:
    """What p has beyond what the draws are kept with, ``[V]``, not normalized; p if that is nothing."""
    taken = torch.minimum(q.double(), p.double() / rho)
    beta = float(taken.sum())
    if not beta:
        return p
    left = (p - taken * ((1 - (1 - beta) ** draws) / beta)).clamp_(min=0.0)
    return left if bool(left.sum() > 0) else p
