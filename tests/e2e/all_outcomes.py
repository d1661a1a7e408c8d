"""Runs a random function once for every course that its draws may take, and adds up how likely each is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import pytest
import torch

R = TypeVar("R", bound=Hashable)


class _Course:
    """The draws of one run: those given, then the first possible one of each.

    ``options`` has for every draw so far the outcomes and their probabilities, ``at`` which one was taken.
    """

    def __init__(self, given: list[int]) -> None:
        self.at = given
        self.options: list[list[tuple[int, float]]] = []

    def _next(self, options: list[tuple[int, float]]) -> int:
        place = len(self.options)
        if place == len(self.at):
            self.at.append(0)
        self.options.append(options)
        return options[self.at[place]][0]

    def multinomial(self, law: torch.Tensor, count: int) -> torch.Tensor:
        assert count == 1 and law.numel() == law.shape[-1], "one draw from one law"
        weights = law.double().flatten()
        shares = (weights / weights.sum()).tolist()
        picked = self._next([(index, share) for index, share in enumerate(shares) if share > 0])
        return torch.full((*law.shape[:-1], 1), picked)

    def bernoulli(self, chance: torch.Tensor) -> torch.Tensor:
        yes = float(chance)
        picked = self._next([(value, share) for value, share in ((1, yes), (0, 1 - yes)) if share > 0])
        return torch.tensor(float(picked))

    def chance(self) -> float:
        found = 1.0
        for place, options in enumerate(self.options):
            found *= options[self.at[place]][1]
        return found

    def following(self) -> list[int] | None:
        """The next course in order; None after the last."""
        for place in reversed(range(len(self.options))):
            if self.at[place] + 1 < len(self.options[place]):
                return [*self.at[:place], self.at[place] + 1]
        return None


def law_of(run: Callable[[], R]) -> dict[R, float]:
    """The exact distribution of what ``run`` returns.

    Draws by ``torch.multinomial`` (one from one law) and ``torch.bernoulli`` (one) are followed in every way.
    Other randomness comes from a generator that is set alike before every run: the law is the one given it.
    """
    found: defaultdict[R, float] = defaultdict(float)
    given: list[int] | None = []
    while given is not None:
        course = _Course(given)
        torch.manual_seed(3)
        with pytest.MonkeyPatch.context() as patch:
            patched: dict[str, Any] = {"multinomial": course.multinomial, "bernoulli": course.bernoulli}
            for name, stand_in in patched.items():
                patch.setattr(torch, name, stand_in)
            result = run()
        found[result] += course.chance()
        given = course.following()
    return dict(found)
