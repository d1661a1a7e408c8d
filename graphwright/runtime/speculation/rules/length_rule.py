"""Length rules: how many tokens a row may draft in the next cycle, and which are worth verifying."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeVar

from graphwright.runtime.speculation.parts import Part, Registry


class LengthRule(Part, ABC):
    """Gives each row a budget of draft tokens; sees what became of the last draft.

    A rule may use anything known before the step. It never looks at the tokens that the target will
    choose, so the output's distribution does not depend on it. A dataclass; its fields are its options.
    """

    #: Has an option ``costs``: what a step takes by its tokens, relative to a plain one, ``1:1.0+4:1.45``.
    weighs_costs: ClassVar[bool] = False

    @abstractmethod
    def begin(self, rows: int) -> None:
        """Start a generation of ``rows`` rows."""

    @abstractmethod
    def budget(self, row: int) -> int:
        """Most tokens that ``row`` may draft now; 0 for a plain step."""

    def floor(self, row: int) -> float:
        """The least estimated chance to be accepted, path included, of a token worth drafting. Default: 0."""
        return 0.0

    def keep(self, row: int, chances: Sequence[float]) -> int:
        """Of a complete draft that was not drawn, how many tokens to verify, likeliest first. Default: all.

        Args:
            row: in the batch.
            chances: of each token to be accepted, path included, falling.
        """
        return len(chances)

    @abstractmethod
    def update(self, row: int, proposed: int, accepted: int) -> None:
        """``accepted`` of ``row``'s ``proposed`` draft tokens were kept."""


RULES: Registry[LengthRule] = Registry(
    "length rule", "graphwright.runtime.speculation.rules", "fixed or adaptive(high=16)",
    "graphwright.length_rules",
)  # fmt: skip
_L = TypeVar("_L", bound=type[LengthRule])


def length_rule(name: str) -> Callable[[_L], _L]:
    """Register a length rule's dataclass under ``name``."""
    return RULES.register(name)
