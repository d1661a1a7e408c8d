"""One path: the likeliest, or a drawn one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphwright.runtime.speculation.growing import Growing, Growth
from graphwright.runtime.speculation.trees.tree import Tree, tree


@tree("chain")
@dataclass(frozen=True)
class Chain(Tree):
    """One path, token after token.

    Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding".
    """

    settled: ClassVar[bool] = True

    def grow(self, growing: Growing, budget: int, floor: float) -> Growth:
        node = 0
        while len(growing) < budget:
            (successors,) = yield [node]
            chance = growing.chance(node) * successors.ahead()
            if chance <= 0 or chance < floor:
                return
            child = growing.add(node, successors)
            assert child is not None, "the first of its siblings"
            node = child
