"""What speculative decoding is expected to give.

A cycle drafts n tokens and runs the model once over n + 1: the last token and the drafts. Drafts are
accepted up to the first wrong one, and the model's own token follows.
Source: Leviathan, Kalman and Matias 2023, "Fast Inference from Transformers via Speculative Decoding".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from graphwright.cost_model.cost import Cost
from graphwright.cost_model.graph_cost import GraphCost
from graphwright.cost_model.prediction import predict
from graphwright.cost_model.target import Target
from graphwright.ir.errors import InputError

Acceptance = float | Sequence[float]


def expected_tokens(acceptance: Acceptance, drafts: int) -> float:
    """Tokens that one cycle yields on average, the model's own token included.

    Args:
        acceptance: probability that a draft is accepted if those before it were: one number, which gives
            equation 1 of the paper, ``(1 - a^(n+1)) / (1 - a)``, or one for each position.
        drafts: tokens drafted per cycle, n.

    Raises:
        InputError: a probability outside of 0 to 1, fewer positions than drafts, or n below 0.
    """
    chances = [acceptance] * drafts if isinstance(acceptance, (int, float)) else list(acceptance)
    if drafts < 0 or len(chances) < drafts or not all(0 <= chance <= 1 for chance in chances):
        raise InputError(
            f"acceptance {acceptance!r} does not describe {drafts} drafts",
            where="expected_tokens",
            hint="probabilities from 0 to 1, one for all positions or one for each",
        )
    expected, reached = 1.0, 1.0
    for chance in chances[:drafts]:
        reached *= chance
        expected += reached
    return expected


def speculation_speedup(
    acceptance: Acceptance,
    drafts: int,
    *,
    decode_seconds: float,
    verify_seconds: float,
    draft_seconds: float = 0.0,
) -> float:
    """How many times faster than plain decoding; below 1 it is a loss.

    Args:
        acceptance, drafts: as in :func:`expected_tokens`.
        decode_seconds: one step with one token.
        verify_seconds: one step with ``drafts + 1`` tokens.
        draft_seconds: making the drafts of one cycle.
    """
    cycle = verify_seconds + draft_seconds
    return expected_tokens(acceptance, drafts) * decode_seconds / cycle


def predict_speculation(
    cost: GraphCost | Cost,
    target: Target,
    acceptance: Acceptance,
    drafts: int,
    *,
    batch: int = 1,
    context: float = 0,
    draft_seconds: float = 0.0,
) -> dict[str, float]:
    """Speculation's price and gain on a target.

    Returns:
        ``tokens_per_cycle``, ``decode_seconds`` (of a plain step), ``verify_seconds``,
        ``seconds_per_token`` and ``speedup``.
    """

    def step(tokens: int) -> float:
        return predict(cost, target, batch=batch, context=context, tokens=tokens).seconds

    decode, verify = step(1), step(drafts + 1)
    tokens = expected_tokens(acceptance, drafts)
    speedup = speculation_speedup(
        acceptance, drafts, decode_seconds=decode, verify_seconds=verify, draft_seconds=draft_seconds
    )
    return {
        "tokens_per_cycle": tokens,
        "decode_seconds": decode,
        "verify_seconds": verify,
        "seconds_per_token": (verify + draft_seconds) / tokens,
        "speedup": speedup,
    }


def best_drafts(speedup: Callable[[int], float], most: int = 16) -> int:
    """The number of drafts with the largest speedup; 0 if none is above 1."""
    return max(range(most + 1), key=lambda drafts: (speedup(drafts) if drafts else 1.0, -drafts))
