"""Trees whose shape is known before the draft."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar

from graphwright.runtime.speculation.growing import Growing, Growth
from graphwright.runtime.speculation.successors import Successors
from graphwright.runtime.speculation.trees.tree import Tree


class ShapedTree(Tree):
    """Fills a shape level by level, one question a level. A place without a candidate stays empty, with all
    that would be below it.
    """

    settled: ClassVar[bool] = True

    @abstractmethod
    def shape(self, budget: int) -> Sequence[int]:
        """Parents of at most ``budget`` places, -1 for the root; breadth first, siblings best first."""

    def grow(self, growing: Growing, budget: int, floor: float) -> Growth:
        below = _places_below(tuple(self.shape(budget)))
        level = [(0, 0)]  # a step token and its place in the shape, both numbered from the root
        while level := [(node, place) for node, place in level if below[place]]:
            answers = yield [node for node, _ in level]
            following: list[tuple[int, int]] = []
            for (node, place), successors in zip(level, answers, strict=True):
                children = _take(growing, node, successors, len(below[place]), floor)
                following += zip(children, below[place], strict=False)
            level = following


@lru_cache(maxsize=256)
def _places_below(parents: tuple[int, ...]) -> list[list[int]]:
    """For the root and every place of a shape, the places below it, by rank."""
    below: list[list[int]] = [[] for _ in range(len(parents) + 1)]
    for index, parent in enumerate(parents):
        below[parent + 1].append(index + 1)
    return below


def _take(growing: Growing, node: int, successors: Successors, count: int, floor: float) -> list[int]:
    """Take up to ``count`` candidates below ``node``; their step tokens.

    Independent draws are made as often as was settled: whether there is another one may depend neither on
    what was drawn nor on whether it would be new.
    """
    children = []
    for taken in range(count):
        if not (taken and successors.independent):
            chance = growing.chance(node) * successors.ahead()
            if chance <= 0 or chance < floor:
                break
        child = growing.add(node, successors)
        if child is not None:
            children.append(child)
    return children
