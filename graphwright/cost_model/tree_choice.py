"""Which tree to draft: the shape that yields most for its size, and the size that yields most for its cost.

Acceptance depends on a child's rank among its siblings only: ``acceptance[r]`` is the probability that the
child of rank r is the one that the target takes, if its parent was taken. A drafted token is then reached
with the product of these along its path, and a tree yields their sum and the model's own token (as in
:func:`graphwright.cost_model.speculation.expected_tree_tokens`).

Source: Chen et al. 2024, "Sequoia", section 3.1 (the recursion over subtree sizes) and section 3.3 (the size
that is best for a machine).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from graphwright.ir.errors import InputError

#: What cannot be: so many tokens do not fit so few levels.
_NEVER = float("-inf")


@dataclass(frozen=True)
class TreeTable:
    """The best trees of every size.

    Attributes:
        value: ``[N + 1]`` expected tokens of a cycle with the best tree of so many draft tokens, the model's
            own token included; never falling.
        parents: for every size, the tree: the index of each token's parent, -1 for the root, breadth first,
            siblings by rank.
    """

    value: tuple[float, ...]
    parents: tuple[tuple[int, ...], ...]


@lru_cache(maxsize=16)
def best_trees(acceptance: tuple[float, ...], most: int, depth: int) -> TreeTable:
    """The best tree of each size up to ``most`` draft tokens.

    F(n, d) is the best yield of n tokens below a token that at most d levels follow. G(n, d, r) is the best
    of n tokens given out to its children of rank r and on, so that F is G at rank 0. A child of rank r with
    m - 1 descendants yields ``a_r (1 + F(m - 1, d - 1))``, and G(n, d, r) is the largest sum of that and
    G(n - m, d, r + 1). There is no child without those of lower rank.

    Args:
        acceptance: by rank; deeper levels are like the first.
        most: tokens of the largest tree.
        depth: levels below the root.

    Raises:
        InputError: no probabilities, or nothing to choose.
    """
    if not acceptance or not all(0 <= a <= 1 for a in acceptance) or sum(acceptance) > 1 + 1e-9:
        raise InputError(
            f"acceptance {acceptance!r} is not one of siblings",
            where="best_trees",
            hint="probabilities from 0 to 1 that sum to at most 1",
        )
    if most < 1 or depth < 1:
        raise InputError(f"a tree of {most} tokens in {depth} levels is none", where="best_trees")
    sizes: list[list[list[int]]] = []  # by levels that follow, rank and n: m of the best
    below = [0.0] + [_NEVER] * most  # F(n, 0): nothing may follow
    for _ in range(min(depth, most)):  # a path is no longer than the tree has tokens
        below, taken = _level(below, acceptance)
        sizes.append(taken)
    fitting = [n for n in range(most + 1) if below[n] > _NEVER]
    return TreeTable(tuple(1.0 + below[n] for n in fitting), tuple(_parents(n, sizes) for n in fitting))


def _level(below: Sequence[float], acceptance: Sequence[float]) -> tuple[list[float], list[list[int]]]:
    """F of one level from F of the level below it; by rank and n, the size of the child in the best split."""
    rest = [0.0] + [_NEVER] * (len(below) - 1)  # ranks beyond the last take nothing
    taken: list[list[int]] = []
    for chance in reversed(acceptance):
        child = [_NEVER, *(_NEVER if more == _NEVER else chance * (1.0 + more) for more in below[:-1])]
        best = [
            max(range(1, n + 1), key=lambda m, n=n: child[m] + rest[n - m])  # type: ignore[misc]
            for n in range(1, len(below))
        ]
        rest = [0.0, *(child[m] + rest[n - m] for n, m in enumerate(best, start=1))]
        taken.append([0, *best])
    return rest, taken[::-1]


def _parents(tokens: int, sizes: Sequence[Sequence[Sequence[int]]]) -> tuple[int, ...]:
    """The best tree of ``tokens`` tokens, breadth first."""
    parents: list[int] = []
    level = [(-1, tokens)]  # a token and how many are below it
    for taken in reversed(sizes):
        following: list[tuple[int, int]] = []
        for node, left in level:
            for by_size in taken:
                if not left:
                    break
                size = by_size[left]
                parents.append(node)
                following.append((len(parents) - 1, size - 1))
                left -= size
        level = following
    return tuple(parents)


def best_tree_size(table: TreeTable, cost: Callable[[int], float], most: int) -> int:
    """The number of draft tokens that yields most tokens for its cost; 0 if a plain step does.

    Args:
        table: the best trees.
        cost: of a step with so many tokens, the root included, in any unit.
        most: draft tokens that a step takes.
    """
    sizes = range(min(most, len(table.value) - 1) + 1)
    return max(sizes, key=lambda size: (table.value[size] / cost(1 + size), -size))
