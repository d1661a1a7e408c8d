"""The same shape every time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from graphwright.runtime.speculation.options import counts
from graphwright.runtime.speculation.trees.shape import ShapedTree
from graphwright.runtime.speculation.trees.tree import tree


@tree("fixed")
@dataclass(frozen=True)
class Fixed(ShapedTree):
    """So many candidates below every token of a level, whatever their chances.

    Where candidates are drawn without replacement, and verified recursively, this is RSD-C.

    Options:
        widths: candidates below the last committed token, below each of those, and so on: ``3+2+1`` is a
            tree of 3 + 6 + 6 tokens. Breadth first, as many as the budget allows.

    Source: Miao et al. 2023, "SpecInfer" (expansion configurations); Jeon et al. 2024, "Recursive
    Speculative Decoding" (constant branching factors).
    """

    widths: str = "3+2+1"

    def __post_init__(self) -> None:
        counts(self.widths, "tree=fixed(widths=...)")

    def shape(self, budget: int) -> Sequence[int]:
        return _regular(counts(self.widths, "tree=fixed(widths=...)"), budget)


@lru_cache(maxsize=256)
def _regular(widths: tuple[int, ...], budget: int) -> tuple[int, ...]:
    """Parents of the first ``budget`` places of a regular tree, breadth first."""
    parents: list[int] = []
    level = [-1]
    for width in widths:
        start = len(parents)
        parents += [parent for parent in level for _ in range(width)][: budget - start]
        level = list(range(start, len(parents)))
    return tuple(parents)
