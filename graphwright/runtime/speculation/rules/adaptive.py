"""A budget that grows with success."""

from __future__ import annotations

from dataclasses import dataclass, field

from graphwright.ir.errors import InputError
from graphwright.runtime.speculation.rules.length_rule import LengthRule, length_rule


@length_rule("adaptive")
@dataclass
class AdaptiveLength(LengthRule):
    """Grows by two when a whole draft was accepted and shrinks by one when not, row by row.

    Options:
        start, low, high: the first budget, and its bounds.

    Source: the heuristic schedule of transformers' assisted generation (Gante 2023).
    """

    start: int = 4
    low: int = 1
    high: int = 16
    _budgets: list[int] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.start <= self.high:
            raise InputError(
                f"start={self.start}, low={self.low}, high={self.high} is not a range",
                where="rule=adaptive",
                hint="1 <= low <= start <= high",
            )

    def begin(self, rows: int) -> None:
        self._budgets = [self.start] * rows

    def budget(self, row: int) -> int:
        return self._budgets[row]

    def update(self, row: int, proposed: int, accepted: int) -> None:
        if proposed:
            now = self._budgets[row]
            self._budgets[row] = min(self.high, now + 2) if accepted == proposed else max(self.low, now - 1)
