"""What one step of a program costs: the expressions, and their values at one batch and context."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from graphwright.optimizer.plain_data import number
from graphwright.optimizer.quantities import clean, label, quantity

# Key of the expression, key of its value, and the words for both.
_PARTS = (
    ("flops", "flops", "arithmetic"),
    ("read", "bytes_read", "bytes read"),
    ("written", "bytes_written", "bytes written"),
    ("launches", "launches", "launches"),
)


@dataclass(frozen=True)
class PhaseCost:
    """The cost of one step, as expressions in B, C and T and as numbers; ``str()`` prints both.

    Attributes:
        phase: ``decode``, ``verify`` or ``prefill``.
        expression: ``flops`` by dtype, ``read`` and ``written`` (bytes) by kind, ``launches``. B is the
            batch, C the tokens per sequence in the cache before the step, T the new tokens per sequence.
        at: ``batch``, ``context`` and ``tokens`` that the values hold for.
        value: ``flops``, ``bytes_read``, ``bytes_written``, ``launches`` and ``seconds`` of that step.
    """

    phase: str
    expression: Mapping[str, Any] = field(default_factory=dict)
    at: Mapping[str, Any] = field(default_factory=dict)
    value: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self, width: int = 100) -> Iterator[str]:
        """The text line by line; long expressions wrap at ``width`` columns."""
        where = ", ".join(f"{label(key)} {quantity(key, value)}" for key, value in self.at.items())
        yield clean(f"{self.phase} step" + (f" at {where}" if where else ""))
        for key, total, words in _PARTS:
            if key in self.expression or total in self.value:
                yield f"{words}: {self._total(total)}"
                yield from _expressions(self.expression.get(key), width)
        if "seconds" in self.value:
            yield f"time: {quantity('seconds', self.value['seconds'])}"

    def _total(self, key: str) -> str:
        found = self.value.get(key)
        if isinstance(found, Mapping):  # by dtype or by kind
            found = sum(number(part) or 0.0 for part in found.values())
        return quantity(key, found)


def _expressions(expression: object, width: int) -> Iterator[str]:
    """One expression, or several by name in two columns."""
    if expression is None:
        return
    named = expression if isinstance(expression, Mapping) else {"": expression}
    column = max((len(clean(name)) for name in named), default=0)
    for name, one in named.items():
        lead = f"  {clean(name):<{column}}  " if column else "  "
        yield from textwrap.wrap(
            f"{lead}{clean(one)}", width, subsequent_indent=" " * len(lead), break_long_words=False,
            drop_whitespace=True, break_on_hyphens=False,
        )  # fmt: skip
