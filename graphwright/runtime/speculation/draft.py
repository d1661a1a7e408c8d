"""What a drafter guesses for one row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from graphwright.ir.errors import InputError
from graphwright.runtime.speculation.tree import check_tree, children, is_chain


@dataclass(frozen=True)
class Draft:
    """Guessed tokens for one row, as a tree below the last committed token.

    Tokens of the *step* are numbered from 0, the last committed token (the root); draft token i is step
    token i + 1.

    Args:
        tokens: N token ids.
        parents: ``[N]`` index of each token's parent, -1 for the root; None for a chain.
        q: for the children of step token j, the distribution ``[V]`` that they were *drawn* from: a mapping
            from j, or for a chain a tensor ``[N, V]``. Missing where the children follow from the text so far
            (lookups, the k likeliest tokens of a draft model). Sampling verification is exact only if this is
            true: whether there is an n-th draw may depend on the draws before it, never on its own outcome.
        draws: by step token, what was drawn below it, in order; needed where a token was drawn twice, which
            makes one child only. By default each child once, in order.

    Raises:
        InputError: the parents are not a tree, siblings repeat a token, or q and draws do not fit it.
    """

    tokens: Sequence[int] = ()
    parents: Sequence[int] | None = None
    q: torch.Tensor | Mapping[int, torch.Tensor] | None = None
    draws: Mapping[int, Sequence[int]] | None = None

    def __post_init__(self) -> None:
        if self.parents is not None:
            check_tree(self.tokens, self.parents)
            if is_chain(self.parents):
                object.__setattr__(self, "parents", None)
        if isinstance(self.q, torch.Tensor) and (
            self.parents is not None or self.q.shape[0] != len(self.tokens)
        ):
            raise InputError("q needs a chain and one distribution for each of its tokens", where="Draft")
        for node, drawn in (self.draws or {}).items():
            if set(drawn) != set(self.successors[node]):
                raise InputError(f"what was drawn below step token {node} is not its children", where="Draft")

    @cached_property
    def successors(self) -> list[dict[int, int]]:
        """For every token of the step (root first), its children as ``{token: draft index}``."""
        if self.parents is None:
            return [{token: index} for index, token in enumerate(self.tokens)] + [{}]
        return children(self.tokens, self.parents)

    def law(self, node: int) -> torch.Tensor | None:
        """The distribution ``[V]`` that the children of step token ``node`` were drawn from, if any were."""
        if self.q is None or node >= len(self.successors) or not self.successors[node]:
            return None
        return self.q[node] if isinstance(self.q, torch.Tensor) else self.q.get(node)

    def drawn(self, node: int) -> Sequence[int]:
        """What was drawn (or listed) below step token ``node``, in order."""
        if self.draws is not None and node in self.draws:
            return self.draws[node]
        return list(self.successors[node]) if node < len(self.successors) else []


#: No guess: the row takes a plain step.
NO_DRAFT = Draft()
