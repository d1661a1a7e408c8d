"""Drafting from trigram statistics that follow the target's own distribution."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from graphwright.ir.errors import InputError
from graphwright.kernels.top_tokens import top_tokens
from graphwright.runtime.speculation.calibration import Tally
from graphwright.runtime.speculation.corpus import END, check_corpus, read_corpus
from graphwright.runtime.speculation.drafter import Generation, Outcome, drafter
from graphwright.runtime.speculation.following import Follower
from graphwright.runtime.speculation.successors import NOTHING, Ranked, Successors

#: The last two tokens.
Pair = tuple[int, int]
#: Likeliest tokens that a step's logits bring in.
_LIKELIEST = 8
#: Successors kept of a pair.
_KEPT = 16
#: Pairs kept: what has not been updated for longest is forgotten.
_MOST_PAIRS = 65536
#: A candidate's probability counts as so many trials of it.
_TRIALS = 4.0


class Arm:
    """A token that may follow a pair.

    Attributes:
        law: its estimated probability.
        tried: how often it was a candidate when the target chose.
        won: how often the target chose it then.
    """

    __slots__ = ("law", "tried", "won")

    def __init__(self) -> None:
        self.law, self.tried, self.won = 0.0, 0, 0

    @property
    def chance(self) -> float:
        """The probability that the target chooses it, after what was seen of it."""
        return (self.won + _TRIALS * self.law) / (self.tried + _TRIALS)

    @property
    def kind(self) -> tuple[int, int]:
        """What other candidates it is like."""
        return int(8 * self.chance), min(self.tried, 3)


@drafter("trigrams")
@dataclass
class TrigramDrafter(Follower[Pair]):
    """Proposes the likeliest third tokens of trigrams, which adapt to the target's distribution (ADED).

    The conditional distribution after two tokens starts from the counts of a corpus and moves by ``rate``
    towards the target's own distribution every time it is seen there. Candidates are ordered as in PUCT: what
    they achieved, plus a bonus for the likely ones that were tried little. Statistics outlive generations.

    Options:
        rate: share of the target's distribution in an update.
        explore: weight of the bonus; 0 orders by chance alone.
        breadth: most candidates below a token.
        corpus: file of texts to count first, see :mod:`graphwright.runtime.speculation.corpus`.

    Source: Liu et al. 2024, "Adaptive Draft-Verification for Efficient Large Language Model Decoding".
    """

    rate: float = 0.5
    explore: float = 0.1
    breadth: int = 4
    corpus: str = ""
    _rows: list[Pair] = field(default_factory=list, init=False, repr=False, compare=False)
    _arms: dict[Pair, dict[int, Arm]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _tally: Tally = field(default_factory=Tally, init=False, repr=False, compare=False)
    _counted: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1 or self.explore < 0 or self.breadth < 1:
            raise InputError(
                f"rate={self.rate}, explore={self.explore}, breadth={self.breadth} learns or drafts nothing",
                where="drafter=trigrams",
                hint="0 < rate <= 1, explore >= 0, breadth >= 1",
            )
        if self.corpus:
            check_corpus(self.corpus)

    def begin(self, generation: Generation) -> None:
        self.settle()
        if self.corpus and not self._counted:
            self._count(read_corpus(self.corpus, generation.program).tolist())
            self._counted = True
        self._rows = [(END, END)] * len(generation.prompts)
        for row, prompt in enumerate(generation.prompts):
            for token in prompt[-2:]:
                self._rows[row] = (self._rows[row][1], token)

    def _count(self, text: list[int]) -> None:
        """Relative frequencies of the corpus's trigrams."""
        for first, second, third in zip(text, text[1:], text[2:], strict=False):
            if END not in (first, second, third):
                self._arms.setdefault((first, second), {}).setdefault(third, Arm()).law += 1.0
        for arms in self._arms.values():
            total = sum(arm.law for arm in arms.values())
            for arm in arms.values():
                arm.law /= total

    def observe(self, row: int, outcome: Outcome) -> None:
        laws: list[dict[int, float]] = [{token: 1.0} for token in outcome.tokens]
        if outcome.logits is not None:
            most = min(_LIKELIEST, outcome.logits.shape[1])
            tokens, chances = top_tokens(outcome.logits[outcome.nodes], most)
            pairs = zip(tokens.tolist(), chances.exp().tolist(), strict=True)
            laws = [dict(zip(*pair, strict=True)) for pair in pairs]
        for token, law in zip(outcome.tokens, laws, strict=True):
            pair = self._rows[row]
            for tried, arm in self._order(pair):
                self._tally.record(arm.kind, tried == token)
                arm.tried += 1
                arm.won += tried == token
            self._approach(pair, law)
            self._rows[row] = (pair[1], token)

    def _approach(self, pair: Pair, law: dict[int, float]) -> None:
        """Move the estimate after ``pair`` towards ``law``; take it over where there is none."""
        arms = self._arms.pop(pair, {})  # the pair updated last comes last
        rate = self.rate if arms else 1.0
        for arm in arms.values():
            arm.law *= 1 - rate
        for token, chance in law.items():
            arms.setdefault(token, Arm()).law += rate * chance
        if len(arms) > _KEPT:
            arms = dict(sorted(arms.items(), key=lambda item: -item[1].law)[:_KEPT])
        self._arms[pair] = arms
        if len(self._arms) > _MOST_PAIRS:
            del self._arms[next(iter(self._arms))]

    def _order(self, pair: Pair) -> list[tuple[int, Arm]]:
        """The candidates after ``pair``: exploitation plus exploration."""
        arms = self._arms.get(pair)
        if not arms:
            return []
        bonus = self.explore * math.sqrt(1 + sum(arm.tried for arm in arms.values()))
        return sorted(
            arms.items(), key=lambda item: -item[1].chance - bonus * item[1].law / (1 + item[1].tried)
        )[: self.breadth]

    def root(self, row: int) -> Pair:
        return self._rows[row]

    def follow(self, row: int, state: Pair, token: int) -> Pair:
        return (state[1], token)

    def candidates(self, row: int, state: Pair) -> Successors:
        order = self._order(state)
        if not order:
            return NOTHING
        chances, least = [], 1.0
        for _, arm in order:  # chances may not rise along the order
            least = min(least, self._tally.chance(arm.kind, arm.chance))
            chances.append(least)
        return Ranked([token for token, _ in order], chances)
