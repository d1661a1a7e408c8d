"""Token trees: how a step's draft tokens hang together.

A draft of N tokens is given by ``parents [N]``: the index of each token's parent, -1 for the root (the
last committed token, which the step feeds first). Parents come before their children. In the step
itself the root is token 0 and draft token i is token i + 1. Source of the tree mask: Miao et al. 2023,
"SpecInfer".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from graphwright.ir.errors import InputError
from graphwright.runtime.transfers import upload

if TYPE_CHECKING:
    from graphwright.runtime.speculation.draft import Draft

#: Tokens of a step, root included, that the int64 mask of a tree can describe.
MAX_TREE_TOKENS = 63


def chain(tokens: int) -> list[int]:
    """Parents of a chain of ``tokens`` draft tokens: ``[-1, 0, 1, ...]``."""
    return list(range(-1, tokens - 1))


def is_chain(parents: Sequence[int]) -> bool:
    """Whether every token follows the one before it."""
    return all(parent == index - 1 for index, parent in enumerate(parents))


def check_tree(tokens: Sequence[int], parents: Sequence[int]) -> None:
    """Raise :class:`InputError` unless ``parents`` is a tree of at most 62 tokens with distinct siblings."""
    if len(tokens) != len(parents):
        raise InputError(f"a draft has {len(tokens)} tokens and {len(parents)} parents", where="Draft")
    if len(tokens) >= MAX_TREE_TOKENS:
        raise InputError(
            f"a draft tree has {len(tokens)} tokens; at most {MAX_TREE_TOKENS - 1} fit", where="Draft"
        )
    seen: set[tuple[int, int]] = set()
    for index, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        if not -1 <= parent < index:
            raise InputError(
                f"draft token {index} has parent {parent}, which does not come before it", where="Draft"
            )
        if (parent, token) in seen:
            raise InputError(f"draft token {index} repeats a sibling (token {token})", where="Draft")
        seen.add((parent, token))


def depths(parents: Sequence[int]) -> list[int]:
    """Distance of each draft token from the root: 1 for the root's children."""
    out: list[int] = []
    for parent in parents:
        out.append(1 if parent < 0 else out[parent] + 1)
    return out


def ancestor_masks(parents: Sequence[int]) -> list[int]:
    """For every token of the *step* (root first), the bits of the step tokens that it sees.

    Bit j of entry t says that step token t sees step token j; every token sees the root and itself.
    """
    out = [1]
    for index, parent in enumerate(parents):
        out.append(out[parent + 1] | (1 << (index + 1)))
    return out


def path_to(parents: Sequence[int], node: int) -> list[int]:
    """Draft indices from the root's child down to ``node``; empty for -1, the root."""
    path: list[int] = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


def children(tokens: Sequence[int], parents: Sequence[int]) -> list[dict[int, int]]:
    """For every token of the step (root first), its children as ``{token: draft index}``."""
    out: list[dict[int, int]] = [{} for _ in range(len(tokens) + 1)]
    for index, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        out[parent + 1][token] = index
    return out


@lru_cache(maxsize=256)
def _layout(parents: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Depths and masks of a step's tokens; drafters use the same few shapes again and again."""
    return [0, *depths(parents)], ancestor_masks(parents)


@dataclass(frozen=True)
class StepTokens:
    """A step's input: tokens ``[B, T]``, counts ``[B]``, depth and tree ``[B, T]`` or None (chains).

    All int64 on the program's device; columns t >= counts[b] are padding.
    """

    tokens: torch.Tensor
    counts: torch.Tensor
    depth: torch.Tensor | None
    tree: torch.Tensor | None


def pack(roots: Sequence[int | None], drafts: Sequence[Draft], device: torch.device) -> StepTokens:
    """Lay out each row's root token and draft for one step; a row whose root is None takes no part."""
    rows = [[] if root is None else [root, *draft.tokens] for root, draft in zip(roots, drafts, strict=True)]
    width = max(len(row) for row in rows)

    def padded(lists: list[list[int]]) -> torch.Tensor:
        return upload([row + [0] * (width - len(row)) for row in lists], device)

    tokens = padded(rows)
    counts = upload([len(row) for row in rows], device)
    if all(draft.parents is None for draft in drafts):
        return StepTokens(tokens, counts, None, None)
    depth_rows: list[list[int]] = []
    tree_rows: list[list[int]] = []
    for row, draft in zip(rows, drafts, strict=True):
        depth, mask = _layout(tuple(chain(len(draft.tokens)) if draft.parents is None else draft.parents))
        depth_rows.append(depth if row else [])
        tree_rows.append(mask if row else [])
    return StepTokens(tokens, counts, padded(depth_rows), padded(tree_rows))
