"""Speculative decoding: drafter x tree x verifier x length rule, all exact."""

from __future__ import annotations

from graphwright.runtime.speculation import ngram as _ngram  # registers the drafter
from graphwright.runtime.speculation.drafter import Draft, Drafter, drafter, drafters, make_drafter
from graphwright.runtime.speculation.length_rule import AdaptiveLength, FixedLength, LengthRule

NgramDrafter = _ngram.NgramDrafter


class Speculation:
    """How a program speculates; the verifier follows from the request (greedy or sampling).

    Args:
        drafter: who guesses.
        rule: how many tokens; by default the drafter's own length in every cycle.
    """

    def __init__(self, drafter: Drafter, rule: LengthRule | None = None) -> None:
        self.drafter = drafter
        self.rule = FixedLength(drafter.default_length()) if rule is None else rule

    def __repr__(self) -> str:
        return f"Speculation({self.drafter}, {type(self.rule).__name__})"


__all__ = [
    "AdaptiveLength",
    "Draft",
    "Drafter",
    "FixedLength",
    "LengthRule",
    "NgramDrafter",
    "Speculation",
    "drafter",
    "drafters",
    "make_drafter",
]
