"""Caches that keep fewer tokens than their rows are long: how many, and what the step writes down for it.

A layer whose tokens are evicted has stores ``[B, G, S, D]`` of fewer slots than the capacity, and a length
of its own, ``held [B]`` int64: its tokens are in the slots 0..held-1, in the order in which they came, and
appending and attention read ``held`` where they would read the rows' lengths. Between steps, some tokens
leave and the others move to the front (``runtime/evicted_storage.py``). Which ones, an evictor says, for
which the step keeps its newest queries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from graphwright.ir.ops import semantic_op

#: Tokens of a row in one decode or verification step at most; as ``runtime/storage.py`` has it.
STEP_TOKENS = 64
#: What a state of such a layer is, by its role in ``meta["store"]``.
KEPT, HELD, RING = "kept", "held", "ring"


@dataclass(frozen=True)
class Retention:
    """How many tokens a layer keeps.

    Attributes:
        keep: fraction of the capacity, where ``tokens`` is 0.
        tokens: that stay at an eviction.
        sinks: of them, the first ones.
        window: of them, the newest ones; their queries are observed.
        slack: slots beyond; the last 64 of them are the step's own.
        when: ``always``, or ``prompt``: nothing leaves while the prompt runs.
    """

    keep: float
    tokens: int
    sinks: int
    window: int
    slack: int
    when: str = "always"

    @classmethod
    def of(cls, about: Mapping[str, Any]) -> Retention:
        """From what a state's ``meta["store"]`` says."""
        names = ("keep", "tokens", "sinks", "window", "slack", "when")
        return cls(**{name: about[name] for name in names})

    @property
    def least(self) -> int:
        """The smallest budget: the tokens that always stay, and one more."""
        return self.sinks + self.window + 1

    def budget(self, capacity: int) -> int:
        """Tokens that stay at an eviction, for rows of at most ``capacity`` tokens."""
        # A fraction such as 0.1 is a little more than a tenth in binary.
        return self.tokens or max(self.least, math.ceil(self.keep * capacity - 1e-9))

    def slots(self, capacity: int, step_tokens: int = STEP_TOKENS) -> int:
        """Slots of a row, for steps of so many tokens."""
        return min(capacity, self.budget(capacity) + self.slack - STEP_TOKENS + max(STEP_TOKENS, step_tokens))

    def evicts(self, capacity: int) -> bool:
        """Whether rows of this capacity ever lose a token."""
        return self.slots(capacity) < capacity

    def limit(self, capacity: int) -> int:
        """Tokens that a row holds when the next eviction comes."""
        return self.budget(capacity) + self.slack - STEP_TOKENS

    def expression(self, capacity: sympy.Expr) -> sympy.Expr:
        """:meth:`slots` without the capacity's bound, for a symbol."""
        share = sympy.ceiling(sympy.nsimplify(self.keep, rational=True) * capacity)
        return (self.tokens or sympy.Max(self.least, share)) + self.slack

    @property
    def interval(self) -> int:
        """Tokens from one eviction to the next."""
        return self.slack - STEP_TOKENS


def ring_slots(window: int) -> int:
    """Slots of a ring of queries: the window, and the step's own, which may be rolled back."""
    return window + STEP_TOKENS


@semantic_op(
    "observe_queries(Tensor(a!) ring, Tensor q, Tensor lengths, Tensor counts) -> ()",
    fake=lambda ring, q, lengths, counts: None,
)
def observe_queries(ring: torch.Tensor, q: torch.Tensor, lengths: torch.Tensor, counts: torch.Tensor) -> None:
    """Keep the step's newest queries; that of token p of a row goes to slot ``p % R``.

    Of a step of more than R tokens, the last R valid ones. A step of at most 64 tokens may also leave
    anything in the slots of its padding: a ring has 64 more than are ever read (:func:`ring_slots`).

    Args:
        ring: ``[B, H, R, D]``, mutated.
        q: ``[B, H, T, D]``; rows t >= counts[b] are padding.
        lengths: ``[B]`` int64, committed tokens before the step, evicted ones included.
        counts: ``[B]`` int64, valid tokens of the step.
    """
    slots, tokens = ring.shape[2], q.shape[2]
    if tokens <= min(slots, STEP_TOKENS):
        at = (lengths[:, None] + torch.arange(tokens, device=q.device)) % slots
        ring.scatter_(2, at[:, None, :, None].expand(q.shape), q.to(ring.dtype))
        return
    newest = torch.arange(min(tokens, slots), device=q.device)
    column = (counts[:, None] - len(newest)).clamp(min=0) + newest  # [B, n]
    at = ((lengths[:, None] + column) % slots)[:, None, :, None]
    shape = (*q.shape[:2], len(newest), q.shape[3])
    fresh = q.gather(2, column[:, None, :, None].expand(shape)).to(ring.dtype)
    valid = (column < counts[:, None])[:, None, :, None]
    ring.scatter_(2, at.expand(shape), torch.where(valid, fresh, ring.gather(2, at.expand(shape))))
