"""The likeliest tokens, wherever they are in the tree."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from graphwright.ir.errors import InputError
from graphwright.runtime.speculation.growing import Growing, Growth
from graphwright.runtime.speculation.successors import Successors
from graphwright.runtime.speculation.trees.tree import Tree, tree


@tree("greedy")
@dataclass(frozen=True)
class Greedy(Tree):
    """Takes the candidate with the best chance, again and again, wherever in the tree it is.

    What is open is the next candidate below each token that was asked about. Its chance is that of its path
    times what is known of it before it is taken, so that drawn candidates stay exact.

    The candidates of a token are unknown until the drafter was asked about it. Asking after every token gives
    the best tree, but a draft model takes a step for each round of questions. So the best open candidates are
    taken without asking as long as they are at least as likely as what is *expected* below the tokens that
    were not asked about: ``hope`` times the chance of such a token. Then all these are asked about at once.

    Options:
        hope: 1 asks after every token and gives the best tree; for lookups, which answer at once. With a
            half, tables of random laws gave trees of 99.5% of its expected tokens in a half to a sixth of the
            rounds. 0 asks again only where no candidate is left.

    Source: Xiong et al. 2024, "DySpec" (a heap of slots, by estimated chance); Svirschevski et
    al. 2024, "SpecExec" (rounds of several of the likeliest tokens).
    """

    hope: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.hope <= 1:
            raise InputError(f"hope={self.hope} is not a share", where="tree=greedy", hint="hope from 0 to 1")

    def grow(self, growing: Growing, budget: int, floor: float) -> Growth:
        slots: list[tuple[float, int, Successors]] = []  # next candidates: (-chance, node, candidates)

        def open_slot(node: int, successors: Successors) -> None:
            chance = growing.chance(node) * successors.ahead()
            if chance > 0 and chance >= floor:
                heapq.heappush(slots, (-chance, node, successors))  # one slot a node: nodes settle ties

        unasked = [0]
        while unasked and len(growing) < budget:
            answers = yield unasked
            for node, successors in zip(unasked, answers, strict=True):
                open_slot(node, successors)
            unasked, expected = [], 0.0
            while slots and len(growing) < budget and -slots[0][0] >= expected:
                _, node, successors = heapq.heappop(slots)
                child = growing.add(node, successors)
                open_slot(node, successors)
                if child is not None and growing.chance(child) >= floor:
                    unasked.append(child)
                    expected = max(expected, self.hope * growing.chance(child))
