"""Speculative decoding: drafter x tree x verifier x length rule, all exact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphwright.runtime.speculation import ngram as _ngram  # registers the drafter
from graphwright.runtime.speculation.drafter import (
    Draft,
    Drafter,
    drafter,
    drafter_options,
    drafters,
    make_drafter,
)
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


def make_speculation(chosen: Mapping[str, Any]) -> Speculation:
    """A drafter and its length rule from plain options, as the ``speculate`` pass records them.

    Raises:
        InputError: there is no such drafter.
    """
    drafter = make_drafter(chosen["drafter"], **drafter_options(chosen["drafter"], chosen))
    adaptive = chosen["rule"] == "adaptive"
    rule = AdaptiveLength(high=chosen["tokens"]) if adaptive else FixedLength(chosen["tokens"])
    return Speculation(drafter, rule)


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
    "make_speculation",
]
