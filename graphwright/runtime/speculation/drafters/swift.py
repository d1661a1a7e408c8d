"""Which layers to leave out, searched while generating."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from graphwright.ir.errors import InputError
from graphwright.runtime.speculation.drafter import Generation, Outcome, drafter
from graphwright.runtime.speculation.program_drafter import ProgramSession
from graphwright.runtime.speculation.skip_search import SkipSearch
from graphwright.runtime.speculation.skipping import SkipDrafter, check_share, middle, share_of, tried


@drafter("swift")
@dataclass
class Swift(SkipDrafter):
    """The program itself without some of its layers, which are searched by what was accepted.

    Sets of one size are tried, each for some draft tokens: by turns one that differs a little from the best
    so far, and of several such ones the one that a model of the layers' effects finds most promising. The
    search ends when nothing better was found for a while, and begins again when the acceptance falls. The
    first and the last layer stay.

    Options:
        share: of the layers, how many are left out; 0.45 in the paper, for models of 13B and more.
        trial: draft tokens that judge a set.
        patience: sets without improvement that end the search.
        enough: acceptance that ends it at once.
        drop: part of the acceptance that may be lost before the search begins again.
        seed: of the random choices.

    Source: Xia et al. 2024, "SWIFT: On-the-Fly Self-Speculative Decoding for LLM Inference Acceleration".
    There a set is judged by running it over the latest text; here by its own drafts.
    """

    share: float = 0.25
    trial: int = 24
    patience: int = 12
    enough: float = 0.95
    drop: float = 0.2
    seed: int = 0
    _search: SkipSearch = field(init=False, repr=False, compare=False)
    _accepted: int = field(default=0, init=False, repr=False, compare=False)
    _tried: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_share(self.share, "drafter=swift")
        if self.trial < 1 or self.patience < 1:
            raise InputError(
                f"trial={self.trial}, patience={self.patience} judge nothing",
                where="drafter=swift",
                hint="both are at least 1",
            )

    def open(self, generation: Generation) -> ProgramSession:
        session = super().open(generation)
        inner = self.choices[1:-1] or self.choices[:1]
        count = min(share_of(self.choices, self.share), len(inner))
        first, rng = middle(inner, count), random.Random(self.seed)
        self._search = SkipSearch(inner, first, rng, patience=self.patience, enough=self.enough)
        self._begin_trial()
        return session

    def _begin_trial(self) -> None:
        self.skip = self._search.current
        self._accepted = self._tried = 0

    def observe(self, row: int, outcome: Outcome) -> None:
        super().observe(row, outcome)
        accepted, chances = tried(outcome)
        self._accepted += accepted
        self._tried += chances

    def prepare(self, rows: Sequence[int]) -> None:
        if self._tried < self.trial:
            return
        if self._search.is_over:
            self._search.watch(self._accepted / self._tried, self.drop)
        else:
            self._search.judge(self._accepted / self._tried)
        self._begin_trial()
