"""The shape that yields most where acceptance depends on a candidate's rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphwright.cost_model.tree_choice import best_tree_size, best_trees
from graphwright.ir.errors import InputError
from graphwright.runtime.speculation.options import shares, step_costs
from graphwright.runtime.speculation.tree import MAX_TREE_TOKENS
from graphwright.runtime.speculation.trees.shape import ShapedTree
from graphwright.runtime.speculation.trees.tree import tree

_WHERE = "tree=sequoia"


@tree("sequoia")
@dataclass(frozen=True)
class Sequoia(ShapedTree):
    """The shape with the largest expected yield for its size, by dynamic programming.

    Options:
        acceptance: the probability that the target takes the best candidate, the second, and so on, where it
            took their parent: as measured with this drafter. As many ranks as there are candidates.
        depth: most levels; a draft model takes one step for each.
        tokens: most tokens; the budget may be smaller.
        costs: what a step costs by its tokens, ``1:1.0+4:1.45+8:1.9``: if given, the size that yields most
            for its cost is taken, 0 if drafts do not pay; otherwise as many tokens as there may be.

    Source: Chen et al. 2024, "Sequoia" (shape, and size for the hardware).
    """

    acceptance: str = "0.6+0.15+0.05"
    depth: int = 8
    tokens: int = MAX_TREE_TOKENS - 1
    costs: str = ""

    def __post_init__(self) -> None:
        shares(self.acceptance, f"{_WHERE}(acceptance=...)")
        if not 1 <= self.tokens < MAX_TREE_TOKENS or not 1 <= self.depth < MAX_TREE_TOKENS:
            raise InputError(
                f"tokens={self.tokens} in depth={self.depth} levels do not fit a step",
                where=_WHERE,
                hint=f"1 to {MAX_TREE_TOKENS - 1} of both",
            )
        if self.costs:
            step_costs(self.costs, f"{_WHERE}(costs=...)")

    def shape(self, budget: int) -> Sequence[int]:
        acceptance = shares(self.acceptance, f"{_WHERE}(acceptance=...)")
        table = best_trees(acceptance, MAX_TREE_TOKENS - 1, self.depth)
        most = min(budget, self.tokens, len(table.parents) - 1)
        if self.costs:
            curve = step_costs(self.costs, f"{_WHERE}(costs=...)")
            most = best_tree_size(table, curve, min(most, curve.most - 1))
        return table.parents[most]
