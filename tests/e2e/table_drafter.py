"""A draft model that is a table, and speculation that needs no program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphwright.runtime.speculation import Drafter, Generation, Outcome, PathDrafter, Speculation
from graphwright.runtime.speculation.growing import Ask
from graphwright.runtime.speculation.successors import Successors, successors_of
from graphwright.runtime.speculation.trees.tree import TREES
from graphwright.runtime.speculation.verifiers.sampling_rule import VERIFIERS


class TableDrafter(PathDrafter):
    """A Markov chain ``[V, V]``: lists the likeliest followers, or draws them when the generation samples."""

    name = "table"

    def __init__(self, table: torch.Tensor, most: int = 4) -> None:
        self.table, self.most = table, most
        self.rounds = 0

    def begin(self, generation: Generation) -> None:
        self.generation = generation
        self.last = [prompt[-1] for prompt in generation.prompts]

    def look(self, asked: Sequence[Ask]) -> list[Successors]:
        self.rounds += 1
        return [self._after(([self.last[ask.row], *ask.path()])[-1]) for ask in asked]

    def _after(self, token: int) -> Successors:
        sample, replacement = self.generation.sample, self.generation.replacement
        return successors_of(self.table[token], sample=sample, replacement=replacement, most=self.most)

    def observe(self, row: int, outcome: Outcome) -> None:
        self.last[row] = outcome.tokens[-1]


def pairs() -> list[tuple[str, str]]:
    """Every tree with every verifier that keeps the distribution and takes the tree."""
    found = []
    for tree, shape in sorted(TREES.classes().items()):
        for verifier, rule in sorted(VERIFIERS.classes().items()):
            fits = (tree == "chain" or not rule.single) and (shape.settled or not rule.replacement)
            if rule.exact and fits:
                found.append((tree, verifier))
    return found


def speculation(
    drafter: Drafter, tree: str = "chain", verifier: str = "recursive", **rest: Any
) -> Speculation:
    """A speculation of registered parts."""
    return Speculation(drafter, tree=TREES.parse(tree), verifier=VERIFIERS.parse(verifier), **rest)
