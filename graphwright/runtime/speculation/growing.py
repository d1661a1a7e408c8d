"""Growing drafts: a tree asks what follows its tokens, a drafter answers, for all rows round by round."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from graphwright.runtime.speculation.draft import NO_DRAFT, Draft
from graphwright.runtime.speculation.successors import Successors

if TYPE_CHECKING:
    from graphwright.runtime.speculation.drafter import PathDrafter
    from graphwright.runtime.speculation.trees.tree import Tree


class Growing:
    """A draft tree of one row while it grows. Step tokens are numbered from the root, 0.

    Attributes:
        tokens, parents: as in :class:`Draft`.
        chances: of each draft token, the estimated probability that it is accepted, its ancestors included.
        depths: of each draft token, 1 below the root.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.chances: list[float] = []
        self.depths: list[int] = []
        self._laws: dict[int, torch.Tensor] = {}
        self._draws: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def chance(self, node: int) -> float:
        """The estimated probability that step token ``node`` is accepted; 1 for the root."""
        return self.chances[node - 1] if node else 1.0

    def depth(self, node: int) -> int:
        """Distance of step token ``node`` from the root."""
        return self.depths[node - 1] if node else 0

    def path(self, node: int) -> list[int]:
        """The tokens from the root's child down to step token ``node``; empty for the root."""
        found: list[int] = []
        while node:
            found.append(self.tokens[node - 1])
            node = self.parents[node - 1] + 1
        return found[::-1]

    def add(self, node: int, successors: Successors) -> int | None:
        """Take the next candidate below step token ``node``.

        Returns:
            The new step token; None if the candidate was drawn before and is there already.
        """
        token, chance = successors.take()
        if successors.law is not None:
            self._laws[node] = successors.law
            drawn = self._draws.setdefault(node, [])
            drawn.append(token)
            if token in drawn[:-1]:
                return None
        self.tokens.append(token)
        self.parents.append(node - 1)
        self.chances.append(chance * self.chance(node))
        self.depths.append(self.depth(node) + 1)
        return len(self.tokens)

    @property
    def is_drawn(self) -> bool:
        """Whether tokens were drawn, so that none may be left out afterwards."""
        return bool(self._laws)

    def draft(self) -> Draft:
        """The draft as it stands."""
        if not self.tokens:
            return NO_DRAFT
        if not self._laws:
            return Draft(self.tokens, self.parents)
        return Draft(self.tokens, self.parents, self._laws, self._draws)

    def likeliest(self, count: int) -> Draft:
        """The draft without all but its ``count`` likeliest tokens. Not for drawn ones."""
        if count >= len(self):
            return self.draft()
        # A child is no likelier than its parent, and comes after it: ties go to the earlier token.
        order = sorted(range(len(self)), key=lambda i: (-self.chances[i], i))[:count]
        kept = {old: new for new, old in enumerate(sorted(order))}
        parents = [kept[self.parents[old]] if self.parents[old] >= 0 else -1 for old in kept]
        return Draft([self.tokens[old] for old in kept], parents) if kept else NO_DRAFT


@dataclass(frozen=True)
class Ask:
    """A question of a tree: what may follow step token ``node`` of ``row``'s growing draft?

    Attributes:
        row: in the batch.
        growing: the row's draft so far.
        node: step token, 0 for the row's last committed token.
    """

    row: int
    growing: Growing
    node: int

    def path(self) -> list[int]:
        """The draft tokens from the root's child down to :attr:`node`."""
        return self.growing.path(self.node)


#: Yields step tokens to ask about, gets their successors in order, ends when the draft is complete.
Growth = Generator[list[int], list[Successors], None]


def grow(
    tree: Tree,
    drafter: PathDrafter,
    rows: Sequence[int],
    budgets: Sequence[int],
    floors: Sequence[float],
) -> list[Growing]:
    """Grow one draft a row, all rows in step.

    Args:
        tree: which tokens to ask about.
        drafter: what follows them.
        rows: batch rows.
        budgets: most draft tokens of each.
        floors: of each row, the least chance of a token that is worth verifying.
    """
    growing = [Growing() for _ in rows]
    growths = [tree.grow(one, most, floor) for one, most, floor in zip(growing, budgets, floors, strict=True)]
    asking: dict[int, list[int] | None]
    asking = {place: next(growth, None) for place, growth in enumerate(growths)}
    while waiting := {place: nodes for place, nodes in asking.items() if nodes}:
        asked = [Ask(rows[place], growing[place], node) for place, nodes in waiting.items() for node in nodes]
        answers = iter(drafter.look(asked))
        asking = {}
        for place, nodes in waiting.items():
            try:
                asking[place] = growths[place].send([next(answers) for _ in nodes])
            except StopIteration:
                continue
    drafter.settle()
    return growing
