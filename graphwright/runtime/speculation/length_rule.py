"""Length rules: how many tokens a row may draft in the next cycle."""

from __future__ import annotations

from abc import ABC, abstractmethod

from graphwright.ir.errors import InputError


class LengthRule(ABC):
    """Gives each row a budget of draft tokens; sees what became of the last draft.

    A rule may use anything known before the step. It never looks at the tokens that the target will
    choose, so the output's distribution does not depend on it.
    """

    @abstractmethod
    def begin(self, rows: int) -> None:
        """Start a generation of ``rows`` rows."""

    @abstractmethod
    def budget(self, row: int) -> int:
        """Most tokens that ``row`` may draft now; 0 for a plain step."""

    @abstractmethod
    def update(self, row: int, proposed: int, accepted: int) -> None:
        """``accepted`` of ``row``'s ``proposed`` draft tokens were kept."""


class FixedLength(LengthRule):
    """The same budget for every row in every cycle."""

    def __init__(self, tokens: int) -> None:
        if tokens < 0:
            raise InputError(f"a draft cannot have {tokens} tokens", where="FixedLength", hint="tokens >= 0")
        self.tokens = tokens

    def begin(self, rows: int) -> None:
        """Nothing to reset."""

    def budget(self, row: int) -> int:
        return self.tokens

    def update(self, row: int, proposed: int, accepted: int) -> None:
        """Nothing to learn."""


class AdaptiveLength(LengthRule):
    """Grows by two when a whole draft was accepted and shrinks by one when not, row by row.

    Source: the heuristic schedule of transformers' assisted generation (Gante 2023).
    """

    def __init__(self, start: int = 4, low: int = 1, high: int = 16) -> None:
        if not 1 <= low <= start <= high:
            raise InputError(
                f"start={start}, low={low}, high={high} is not a range",
                where="AdaptiveLength",
                hint="1 <= low <= start <= high",
            )
        self.start, self.low, self.high = start, low, high
        self._budgets: list[int] = []

    def begin(self, rows: int) -> None:
        self._budgets = [self.start] * rows

    def budget(self, row: int) -> int:
        return self._budgets[row]

    def update(self, row: int, proposed: int, accepted: int) -> None:
        if proposed:
            now = self._budgets[row]
            self._budgets[row] = min(self.high, now + 2) if accepted == proposed else max(self.low, now - 1)
