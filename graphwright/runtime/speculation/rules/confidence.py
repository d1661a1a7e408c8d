"""Stop where the draft has probably gone wrong."""

from __future__ import annotations

from dataclasses import dataclass

from graphwright.ir.errors import InputError
from graphwright.runtime.speculation.rules.length_rule import LengthRule, length_rule
from graphwright.runtime.speculation.tree import MAX_TREE_TOKENS


@length_rule("confidence")
@dataclass
class Confidence(LengthRule):
    """Drafts on as long as the whole path so far is accepted with at least a given probability.

    The probability is the product of the drafter's own chances, where SpecDec++ trains a head for it.
    Drafters that give whole drafts state none; theirs have ``tokens`` tokens.

    Options:
        threshold: the least probability that a token and all before it are accepted.
        tokens: the budget.

    Source: Huang et al. 2024, "SpecDec++" (the threshold policy).
    """

    threshold: float = 0.4
    tokens: int = MAX_TREE_TOKENS - 1

    def __post_init__(self) -> None:
        if not (0 <= self.threshold <= 1 and self.tokens >= 0):
            raise InputError(
                f"threshold={self.threshold} and tokens={self.tokens} are not a rule",
                where="rule=confidence",
                hint="threshold from 0 to 1, tokens >= 0",
            )

    def begin(self, rows: int) -> None:
        """Nothing to reset."""

    def budget(self, row: int) -> int:
        return self.tokens

    def floor(self, row: int) -> float:
        return self.threshold

    def update(self, row: int, proposed: int, accepted: int) -> None:
        """Nothing to learn."""
