"""What may follow a token, one after the other: the children that a tree takes below it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch


class Successors(ABC):
    """The candidates below one step token, best first or in the order they are drawn.

    A *chance* estimates the probability that the target chooses this child here. A tree compares chances to
    spend its budget; exactness does not depend on them.

    Attributes:
        law: the distribution ``[V]`` that :meth:`take` draws from; None where candidates are listed.
        independent: draws do not depend on those before and may repeat one. What verifies them counts on
            their number, which has to be settled before the first.
    """

    law: torch.Tensor | None = None
    independent: bool = False

    @abstractmethod
    def ahead(self) -> float:
        """The chance of the next candidate, as far as it is known before it is taken; 0 if there is none."""

    @abstractmethod
    def take(self) -> tuple[int, float]:
        """The next candidate and its chance; only while :meth:`ahead` is above 0 or draws are independent."""


class Ranked(Successors):
    """Listed candidates.

    Args:
        tokens: distinct, best first.
        chances: of each, not rising.
    """

    def __init__(self, tokens: Sequence[int], chances: Sequence[float]) -> None:
        self._candidates = list(zip(tokens, chances, strict=True))
        self._next = 0

    def ahead(self) -> float:
        return self._candidates[self._next][1] if self._next < len(self._candidates) else 0.0

    def take(self) -> tuple[int, float]:
        self._next += 1
        return self._candidates[self._next - 1]


#: Nothing is known to follow.
NOTHING = Ranked((), ())


class DrawnWithoutReplacement(Successors):
    """Candidates drawn one after the other from what is left of a distribution.

    Before a draw its chance is taken to be the mass that is left, as in DySpec: a drafted token's
    probability estimates that of its acceptance.

    Args:
        law: ``[V]`` the distribution.

    Source: Jeon et al. 2024, "Recursive Speculative Decoding" (sampling without replacement); Chen et al.
    2024, "Sequoia" (its verification).
    """

    def __init__(self, law: torch.Tensor) -> None:
        self.law = law
        self._left = law.clone()
        self._mass = 1.0

    def ahead(self) -> float:
        return self._mass if self._mass > 1e-6 else 0.0

    def take(self) -> tuple[int, float]:
        token = int(torch.multinomial(self._left, 1))
        chance = float(self._left[token])
        self._left[token] = 0.0
        # Summed, not subtracted: what rounding leaves must not be drawn from.
        self._mass = float(self._left.sum())
        return token, chance


class DrawnWithReplacement(Successors):
    """Independent draws from a distribution; one may repeat another.

    Args:
        law: ``[V]`` the distribution.

    Source: Sun et al. 2023, "SpecTr"; Miao et al. 2023, "SpecInfer".
    """

    independent = True

    def __init__(self, law: torch.Tensor) -> None:
        self.law = law
        self._drawn: set[int] = set()
        self._mass = 1.0

    def ahead(self) -> float:
        return self._mass if self._mass > 1e-6 else 0.0

    def take(self) -> tuple[int, float]:
        assert self.law is not None
        token = int(torch.multinomial(self.law, 1))
        chance = 0.0 if token in self._drawn else float(self.law[token])
        self._drawn.add(token)
        self._mass -= chance
        return token, chance


def successors_of(law: torch.Tensor, *, sample: bool, replacement: bool = False, most: int = 8) -> Successors:
    """The candidates of a draft model.

    Args:
        law: ``[V]`` its probabilities.
        sample: draw them, so that sampling can be verified against ``law``; otherwise the likeliest.
        replacement: how to draw.
        most: of the likeliest, how many.
    """
    if sample:
        return DrawnWithReplacement(law) if replacement else DrawnWithoutReplacement(law)
    best = law.topk(min(most, law.shape[-1]))
    return Ranked(best.indices.tolist(), best.values.tolist())
