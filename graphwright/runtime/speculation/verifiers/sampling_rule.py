"""How sampling verifies drafts: the next token, given the target's and the drafter's distributions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeVar

import torch

from graphwright.runtime.speculation.parts import Part, Registry


class SamplingRule(Part, ABC):
    """Chooses the next token below one step token. A dataclass; its fields are its options.

    Without draws from a known distribution there is nothing to correct: the verifier draws from the target
    and follows the child that was drawn, if there is one. A rule that sets :attr:`judges_guesses` is asked
    there too.
    """

    #: Tokens follow the target's distribution exactly; otherwise the pass is lossy.
    exact: ClassVar[bool] = True
    #: Siblings have to be drawn with replacement, and their number settled before the first: trees that
    #: are :attr:`~graphwright.runtime.speculation.trees.tree.Tree.settled` only.
    replacement: ClassVar[bool] = False
    #: Verifies one draw below each token: chains only.
    single: ClassVar[bool] = False
    #: Asked about listed candidates too.
    judges_guesses: ClassVar[bool] = False

    @abstractmethod
    def pick(self, p: torch.Tensor, q: torch.Tensor | None, drawn: Sequence[int]) -> int:
        """The next token.

        Args:
            p: ``[V]`` the target's probabilities, float32, summing to 1.
            q: ``[V]`` the distribution that ``drawn`` came from; None where they were listed.
            drawn: the draws in order, at least one; only with :attr:`replacement` may one repeat another.
        """


VERIFIERS: Registry[SamplingRule] = Registry(
    "verifier", "graphwright.runtime.speculation.verifiers", "recursive", "graphwright.verifiers"
)
_R = TypeVar("_R", bound=type[SamplingRule])


def verifier(name: str) -> Callable[[_R], _R]:
    """Register a sampling rule's dataclass under ``name``."""
    return VERIFIERS.register(name)


def accepts(chance: torch.Tensor) -> bool:
    """True with probability ``min(1, chance)``."""
    return bool(torch.bernoulli(chance.clamp(max=1.0)))


def draw(p: torch.Tensor) -> int:
    """A draw from ``p``, which need not be normalized."""
    return int(torch.multinomial(p, 1))


def residual(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """``max(p - q, 0)``, normalized; p if nothing is left (p = q up to rounding)."""
    left = (p - q).clamp_(min=0.0)
    mass = left.sum()
    return left / mass if bool(mass > 0) else p
