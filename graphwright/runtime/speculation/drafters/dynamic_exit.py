"""Drafting with the first layers only; how many of them, and how many tokens, follow from the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from graphwright.ir.errors import InputError
from graphwright.runtime.speculation.drafter import Generation, Outcome, drafter
from graphwright.runtime.speculation.growing import Ask
from graphwright.runtime.speculation.program_drafter import ProgramSession
from graphwright.runtime.speculation.skipping import SkipDrafter


def tokens_per_layer(acceptance: float, length: int, exit_layers: int, layers: int) -> float:
    """Expected tokens of a draft and its verification, for each layer that they run.

    Args:
        acceptance: of a draft token whose predecessors were accepted.
        length: draft tokens.
        exit_layers, layers: that a draft token runs, and all of them.

    Source: Entezari Zarch et al. 2025, "DEL" (the token-per-layer metric).
    """
    expected = sum(acceptance**accepted for accepted in range(length + 1))
    return expected / (layers + length * exit_layers)


@drafter("del")
@dataclass
class DynamicExit(SkipDrafter):
    """The program's first layers; how many, and how many tokens, is chosen by what they would have drafted.

    The hidden states of verified tokens after some of the layers say what a draft that exits there would
    have been: one pass of the head for all of them. From the acceptance of each exit follow the exit and the
    length with most expected tokens for each layer run; or no draft, where none pays.

    Options:
        exits: how many exits are compared, evenly spaced.
        tokens: most tokens in a draft.
        decay: weight of an older token relative to the next one in an exit's acceptance.

    Source: Entezari Zarch et al. 2025, "DEL: Context-Aware Dynamic Exit Layer for Efficient Self-Speculative
    Decoding". Ending a draft early where its confidence is low is a length rule's part here.
    """

    wants_hidden: ClassVar[bool] = True

    exits: int = 8
    tokens: int = 8
    decay: float = 0.95
    _exits: list[int] = field(default_factory=list, init=False, repr=False, compare=False)
    _hits: torch.Tensor = field(init=False, repr=False, compare=False)  # [exits], decayed
    _seen: float = field(default=0.0, init=False, repr=False, compare=False)
    _length: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.exits < 1 or self.tokens < 1 or not 0 < self.decay <= 1:
            raise InputError(
                f"exits={self.exits}, tokens={self.tokens}, decay={self.decay} cannot be",
                where="drafter=del",
                hint="exits and tokens are at least 1, decay is above 0 and at most 1",
            )

    def open(self, generation: Generation) -> ProgramSession:
        session = super().open(generation)
        if self._blocks.obstacles or len(self.choices) < 2:
            reasons = [f"layer {layer}: {why}" for layer, why in self._blocks.obstacles.items()][:2]
            raise InputError(
                f"no layer is an exit ({'; '.join(reasons) or 'there is only one'})",
                where="drafter=del",
                hint="use skip, swift or clasp",
            )
        last = len(self.choices) - 1
        count = min(self.exits, last)
        self._exits = sorted({round((index + 1) * last / count) for index in range(count)})
        self._hits = torch.zeros(len(self._exits), dtype=torch.float64)
        self._seen, self._length = 0.0, 0
        return session

    def observe(self, row: int, outcome: Outcome) -> None:
        super().observe(row, outcome)
        if not outcome.hidden:
            return
        shadow = torch.stack([outcome.hidden[layers][outcome.nodes] for layers in self._exits])  # [E, K, H]
        logits = self._running.program.read_out(shadow.flatten(0, 1)[None])
        guesses = logits[0].argmax(-1).view(shadow.shape[:2]).cpu()
        count = len(outcome.tokens)
        # Oldest first: the newest token weighs 1.
        weights = self.decay ** torch.arange(count - 1, -1, -1, dtype=torch.float64)
        fade = self.decay**count
        self._hits = self._hits * fade + (guesses == torch.tensor(outcome.tokens)).double() @ weights
        self._seen = self._seen * fade + float(weights.sum())

    def prepare(self, rows: Sequence[int]) -> None:
        """Choose the exit and the length of the drafts to come."""
        if not self._seen:
            return
        total, rates = len(self.choices), (self._hits / self._seen).tolist()
        found = [
            (tokens_per_layer(rate, length, layers, total), length, layers)
            for layers, rate in zip(self._exits, rates, strict=True)
            for length in range(self.tokens + 1)
        ]
        # Of equals, the shortest draft.
        _, self._length, layers = max(found, key=lambda one: (one[0], -one[1]))
        self.skip = frozenset(self.choices[layers:])

    def goes_beyond(self, ask: Ask) -> bool:
        return ask.growing.depth(ask.node) < self._length

    def default_length(self) -> int:
        return self.tokens
