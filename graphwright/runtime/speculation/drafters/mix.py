"""Several sources of drafts in one tree."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from graphwright.ir.errors import InputError
from graphwright.runtime.speculation.calibration import Candidate, Tally
from graphwright.runtime.speculation.drafter import (
    Generation,
    Outcome,
    PathDrafter,
    drafter,
    parse_drafter,
)
from graphwright.runtime.speculation.growing import Ask, Growing
from graphwright.runtime.speculation.successors import Successors

#: Chances of a source are told apart by these bounds.
_BOUNDS = (0.03, 0.1, 0.25, 0.5, 0.8, 0.95, 0.985)


@drafter("mix")
@dataclass
class MixDrafter(PathDrafter):
    """Merges the candidates of several drafters, so that one fills what another leaves free.

    The tree takes the likeliest of all candidates. What is pruned from one source makes room for those of
    another. A candidate's chance is the hit rate of candidates of which every source said about the same: how
    likely this token is, or another one. It is learned along the paths that the target takes.

    Options:
        sources: names of drafters that answer for any path, with + between them.
        breadth: most candidates of each source below a token.

    Source: "Draft Less, Retrieve More: Hybrid Tree Construction for Speculative Decoding" (Graft), whose
    prune-then-graft order this is without its thresholds: one order by chance does both.
    """

    proposals: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"tokens": 16, "tree": "greedy(hope=1)", "rule": "goodput"},
    )

    sources: str = "suffix+recycling"
    breadth: int = 4
    _sources: list[PathDrafter] = field(default_factory=list, init=False, repr=False, compare=False)
    _given: dict[int, tuple[Growing, dict[int, list[Candidate]]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _tally: Tally = field(default_factory=Tally, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.breadth < 1:
            raise InputError(
                f"breadth={self.breadth} merges nothing", where="drafter=mix", hint="breadth >= 1"
            )
        self._sources = [self._source(name) for name in self.sources.split("+")]

    @staticmethod
    def _source(name: str) -> PathDrafter:
        source = parse_drafter(name)
        if not isinstance(source, PathDrafter) or source.wants_hidden or source.draft_passes():
            raise InputError(
                f"drafter '{name}' cannot be mixed: it guesses one path, or needs more than text and logits",
                where="drafter=mix",
                hint="lookups such as suffix+recycling+trigrams",
            )
        return source

    def begin(self, generation: Generation) -> None:
        listed = replace(generation, sample=False)  # draws from several distributions do not merge
        for source in self._sources:
            source.begin(listed)
        self._given.clear()

    def look(self, asked: Sequence[Ask]) -> list[Successors]:
        answers = zip(*(source.look(asked) for source in self._sources), strict=True)
        return [self._merge(ask, several) for ask, several in zip(asked, answers, strict=True)]

    def _merge(self, ask: Ask, answers: Sequence[Successors]) -> Successors:
        lists = [taken(answer, self.breadth) for answer in answers]
        # What a source without the token says instead is part of the token's kind: below 0.
        without = [-1 - bisect(_BOUNDS, one[0][1]) if one else 0 for one in lists]
        kinds: dict[int, list[int]] = {}
        priors: dict[int, float] = {}
        for place, candidates in enumerate(lists):
            for token, chance in candidates:
                if token not in kinds:
                    kinds[token], priors[token] = without.copy(), chance
                kinds[token][place] = 1 + bisect(_BOUNDS, chance)
                priors[token] = max(priors[token], chance)
        total = max(1.0, sum(priors.values()))
        found: list[Candidate] = [
            (token, tuple(kind), priors[token] / total) for token, kind in kinds.items()
        ]
        self._remember(ask, found)
        return self._tally.rank(found)

    def _remember(self, ask: Ask, found: list[Candidate]) -> None:
        """What was given is compared with the target's choice once that is known."""
        given = self._given.get(ask.row)
        if given is None or given[0] is not ask.growing:
            given = self._given[ask.row] = (ask.growing, {})
        given[1][ask.node] = found

    def settle(self) -> None:
        for source in self._sources:
            source.settle()

    def release(self) -> None:
        for source in self._sources:
            source.release()

    def observe(self, row: int, outcome: Outcome) -> None:
        if row in self._given:
            self._learn(*self._given.pop(row), outcome.tokens)
        for source in self._sources:
            source.observe(row, outcome)

    def _learn(self, growing: Growing, given: dict[int, list[Candidate]], tokens: Sequence[int]) -> None:
        """Compare what was given along the path that the target took, whether it was verified or not."""
        below = {edge: node for node, edge in enumerate(zip(growing.parents, growing.tokens, strict=True), 1)}
        node: int | None = 0
        for token in tokens:
            if node is None or node not in given:
                return
            self._tally.learn(given[node], token)
            node = below.get((node - 1, token))


def taken(successors: Successors, most: int) -> list[tuple[int, float]]:
    """The first candidates with their chances, at most ``most``."""
    found: list[tuple[int, float]] = []
    while len(found) < most and successors.ahead() > 0:
        found.append(successors.take())
    return found
