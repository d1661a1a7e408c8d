"""The tree of a draft: which paths are guessed, within a budget of tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, TypeVar

from graphwright.runtime.speculation.growing import Growing, Growth
from graphwright.runtime.speculation.parts import Part, Registry


class Tree(Part, ABC):
    """Decides below which step tokens to ask, and how many of the answers to take.

    A dataclass; its fields are its options. It keeps nothing from one draft to the next.
    """

    #: How many candidates are drawn below a token is settled before the first of them, and does not depend on
    #: what is below them. Rules that want independent draws verify no other trees.
    settled: ClassVar[bool] = False

    @abstractmethod
    def grow(self, growing: Growing, budget: int, floor: float) -> Growth:
        """Grow one row's draft: yield step tokens to ask about, receive their successors, add some of them.

        Args:
            growing: empty; :meth:`Growing.add` takes the next candidate of an answer.
            budget: most draft tokens, at least 1.
            floor: a candidate whose chance to be accepted, its path included, is below this is not worth
                verifying.
        """


TREES: Registry[Tree] = Registry(
    "tree", "graphwright.runtime.speculation.trees", "chain or fixed(widths=2+2+1)", "graphwright.trees"
)
_T = TypeVar("_T", bound=type[Tree])


def tree(name: str) -> Callable[[_T], _T]:
    """Register a tree's dataclass under ``name``."""
    return TREES.register(name)
