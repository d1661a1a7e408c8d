"""Options of parts that are lists: ``3+2+1``, and step costs ``1:1.0+4:1.45``."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from graphwright.ir.errors import InputError


@lru_cache(maxsize=64)
def counts(text: str, where: str) -> tuple[int, ...]:
    """``"3+2+1"`` as (3, 2, 1).

    Raises:
        InputError: something is not a number of at least 1.
    """
    parts = text.split("+")
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise InputError(f"{text!r} is not a list of counts", where=where, hint="for example 3+2+1")
    return tuple(map(int, parts))


@lru_cache(maxsize=64)
def shares(text: str, where: str) -> tuple[float, ...]:
    """``"0.6+0.15"`` as (0.6, 0.15).

    Raises:
        InputError: something is not a probability, or they sum to more than 1.
    """
    try:
        found = tuple(map(float, text.split("+")))
    except ValueError:
        found = (-1.0,)
    if not all(0 <= share <= 1 for share in found) or sum(found) > 1 + 1e-9:
        raise InputError(
            f"{text!r} is not a list of probabilities that sum to at most 1",
            where=where,
            hint="for example 0.6+0.15+0.05",
        )
    return found


@dataclass(frozen=True)
class StepCosts:
    """What a step costs by the tokens in it, relative to a plain step: straight between given points.

    Attributes:
        points: (tokens, cost), rising in tokens, from 1 token on.
    """

    points: tuple[tuple[int, float], ...]

    @property
    def most(self) -> int:
        """Tokens of the widest step whose cost is known."""
        return self.points[-1][0]

    def __call__(self, tokens: int) -> float:
        """The cost of a step with ``tokens`` tokens, 1 to :attr:`most`."""
        after = bisect_right(self.points, tokens, key=lambda point: point[0])
        low, cost = self.points[after - 1]
        if low == tokens:
            return cost
        high, above = self.points[after]
        return cost + (above - cost) * (tokens - low) / (high - low)


@lru_cache(maxsize=64)
def step_costs(text: str, where: str) -> StepCosts:
    """``"1:1.0+4:1.45"`` as a curve.

    Raises:
        InputError: it does not start with one token, tokens do not rise, or a cost falls.
    """
    try:
        pairs = [part.split(":") for part in text.split("+")]
        points = tuple((int(tokens), float(cost)) for tokens, cost in pairs)
    except ValueError:
        points = ()
    rising = all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(points))
    if (
        len(points) < 2
        or points[0][0] != 1
        or not 0 < points[0][1] <= points[-1][1] < float("inf")
        or not rising
    ):
        raise InputError(
            f"{text!r} does not say what steps cost",
            where=where,
            hint="tokens:cost from 1 token on, neither falling, for example 1:1.0+4:1.45+8:1.9",
        )
    return StepCosts(points)
