"""Which layers to leave out, by dynamic programming over the newest token's hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from graphwright.ir.errors import InputError
from graphwright.runtime.speculation.drafter import Generation, drafter
from graphwright.runtime.speculation.program_drafter import ProgramSession
from graphwright.runtime.speculation.skipping import SkipDrafter, check_share, middle, share_of
from graphwright.runtime.speculation.tree import MAX_TREE_TOKENS, StepTokens
from graphwright.runtime.transfers import upload


class SkipTable:
    """The dynamic program, as a visitor of one step: state j is the newest token with j layers left out.

    After a layer, state j is one of two: state j run through the layer, or state j - 1 as it came in. The
    one that is nearer to state 0, the full model, in cosine similarity (mean over rows) goes on. The other
    might have been nearer in the end: this is the approximation that makes the search one step.

    Args:
        rows: of the batch that count.
        most: layers to leave out.

    Attributes:
        sets: by j, the layers that state j went without.
    """

    def __init__(self, rows: torch.Tensor, most: int) -> None:
        self._rows, self._passed = rows, 0
        self.sets: list[frozenset[int]] = [frozenset()] * (most + 1)

    def __call__(self, layer: int, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """``[B, most + 1, H]``: the states that go on."""
        went = self._similarity(after, after).tolist()
        stayed = self._similarity(before, after).roll(1).tolist()
        # Of i layers, at most i can have been left out.
        states = range(len(self.sets))
        skips = [0 < j <= self._passed + 1 and (j > self._passed or stayed[j] > went[j]) for j in states]
        self._passed += 1
        self.sets = [self.sets[j - 1] | {layer} if skips[j] else self.sets[j] for j in states]
        chosen = torch.tensor(skips, device=after.device)[None, :, None]
        return torch.where(chosen, before.roll(1, 1), after)

    def _similarity(self, states: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
        """``[most + 1]`` to state 0 of ``full``."""
        mine, aim = states[self._rows].float(), full[self._rows, :1].float()
        return torch.cosine_similarity(mine, aim, dim=-1).mean(0)


@drafter("clasp")
@dataclass
class Clasp(SkipDrafter):
    """The program itself without the layers that change the newest token's hidden state least.

    Chosen anew every few drafts by dynamic programming: of all sets of one size, approximately the one whose
    last hidden state is most like the full model's.

    Options:
        share: of the layers, how many are left out; large models bear about half.
        every: drafts from one choice to the next; a choice costs a step of as many tokens as layers are left
            out, and one more.

    Source: Chen et al. 2025, "CLaSp: In-Context Layer Skip for Self-Speculative Decoding". There
    the states are the last accepted token's, kept from its verification; here those of the token after it,
    with the full model's computed beside the others.
    """

    share: float = 0.25
    every: int = 8
    _drafts: int = field(default=0, init=False, repr=False, compare=False)
    _most: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_share(self.share, "drafter=clasp")
        if self.every < 1:
            raise InputError(f"every={self.every} chooses never", where="drafter=clasp", hint="every >= 1")

    def open(self, generation: Generation) -> ProgramSession:
        session = super().open(generation)
        self._drafts = 0
        self._most = min(share_of(self.choices, self.share), MAX_TREE_TOKENS - 1)
        self.skip = middle(self.choices, self._most)  # where the cache has no room for a choice
        return session

    def prepare(self, rows: Sequence[int]) -> None:
        if self._drafts % self.every == 0 and self._running.fits(self._most + 1):
            self.skip = self._best_set(rows)
        self._drafts += 1

    def _best_set(self, rows: Sequence[int]) -> frozenset[int]:
        most = self._most
        device, batch, width = self._session.device, len(self._roots), most + 1
        counts = [width if row in rows else 0 for row in range(batch)]
        # Siblings: all at the position of the newest token, each of which sees the text and itself.
        step = StepTokens(
            upload([[root] * width for root in self._roots], device),
            upload(counts, device),
            torch.zeros((batch, width), dtype=torch.int64, device=device),
            upload([[1 << state for state in range(width)]] * batch, device),
        )
        table = SkipTable(upload(list(rows), device), most)
        self._running.look_through(step, table)
        return table.sets[most]
