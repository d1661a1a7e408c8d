"""The best paths of each level."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import torch

from graphwright.ir.errors import InputError
from graphwright.runtime.speculation.growing import Growing, Growth
from graphwright.runtime.speculation.successors import Successors
from graphwright.runtime.speculation.tree import MAX_TREE_TOKENS
from graphwright.runtime.speculation.trees.tree import Tree, tree


@tree("beam")
@dataclass(frozen=True)
class Beam(Tree):
    """Goes on with the best paths of each level: beam search, stochastic where candidates are drawn (RSD-S).

    Listed candidates are taken by the chance of their path. Drawn ones are taken so that the paths of a level
    are a sample without replacement of all paths of its length: stochastic beam search. There every path of
    probability P has a perturbed log-probability, a Gumbel variable, and the largest of a level stay. Here
    these are arrival times, exp(-Gumbel), exponential variables of rate P, and the earliest stay. The first
    arrival below a token is the token's own, and after n draws the next one comes after an exponential wait
    of rate P times the mass that is left. Which candidate it is does not depend on when it comes. So times
    are drawn first, and candidates only for those that stay: what is left out was never drawn, whether there
    is an n-th draw below a token does not depend on its outcome, and recursive rejection stays exact.

    Options:
        width: paths of each level.
        depth: levels; the budget may end it before.

    Source: Jeon et al. 2024, "Recursive Speculative Decoding" (RSD-S); Kool, van Hoof and
    Welling 2019, "Stochastic Beams and Where to Find Them".
    """

    width: int = 3
    depth: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.width < MAX_TREE_TOKENS or not 1 <= self.depth < MAX_TREE_TOKENS:
            raise InputError(
                f"width={self.width} and depth={self.depth} do not fit a step",
                where="tree=beam",
                hint=f"1 to {MAX_TREE_TOKENS - 1} of both",
            )

    def grow(self, growing: Growing, budget: int, floor: float) -> Growth:
        times = {0: 0.0}  # of the paths of this level, by their last step token
        for _ in range(self.depth):
            asked = [node for node in times if growing.chance(node) >= floor]
            if not asked or len(growing) >= budget:
                return
            answers = yield asked
            queue: list[tuple[float, int, Successors]] = []
            for node, successors in zip(asked, answers, strict=True):
                _queue_next(queue, growing, node, successors, times[node], floor)
            times = {}
            while queue and len(times) < self.width and len(growing) < budget:
                key, node, successors = heapq.heappop(queue)
                child = growing.add(node, successors)
                if child is not None:
                    times[child] = key
                wait = 0.0 if successors.law is None else _wait(growing.chance(node) * successors.ahead())
                _queue_next(queue, growing, node, successors, key + wait, floor)


def _queue_next(
    queue: list[tuple[float, int, Successors]],
    growing: Growing,
    node: int,
    successors: Successors,
    time: float,
    floor: float,
) -> None:
    """Queue the next candidate below ``node``: a drawn one by its arrival, a listed one by its chance."""
    chance = growing.chance(node) * successors.ahead()
    if chance > 0 and chance >= floor:
        heapq.heappush(queue, (-chance if successors.law is None else time, node, successors))


def _wait(rate: float) -> float:
    """An exponential variable; without end at rate 0."""
    return float(torch.empty((), dtype=torch.float64).exponential_()) / rate if rate > 0 else float("inf")
