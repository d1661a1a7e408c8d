"""The same budget in every cycle."""

from __future__ import annotations

from dataclasses import dataclass

from graphwright.ir.errors import InputError
from graphwright.runtime.speculation.rules.length_rule import LengthRule, length_rule
from graphwright.runtime.speculation.tree import MAX_TREE_TOKENS


@length_rule("fixed")
@dataclass
class FixedLength(LengthRule):
    """The same budget for every row in every cycle.

    Options:
        tokens: the budget; by default as many as a step takes.
    """

    tokens: int = MAX_TREE_TOKENS - 1

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise InputError(
                f"a draft cannot have {self.tokens} tokens", where="rule=fixed", hint="tokens >= 0"
            )

    def begin(self, rows: int) -> None:
        """Nothing to reset."""

    def budget(self, row: int) -> int:
        return self.tokens

    def update(self, row: int, proposed: int, accepted: int) -> None:
        """Nothing to learn."""
