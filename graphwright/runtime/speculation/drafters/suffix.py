"""Drafting by the longest suffix that occurred before, in the text itself and in earlier ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar, NamedTuple

from graphwright.ir.errors import InputError
from graphwright.runtime.speculation.automaton import NO_MATCH, Match, SuffixAutomaton
from graphwright.runtime.speculation.calibration import Candidate, Tally
from graphwright.runtime.speculation.corpus import END, check_corpus, read_corpus
from graphwright.runtime.speculation.drafter import Generation, Outcome, drafter
from graphwright.runtime.speculation.following import Follower
from graphwright.runtime.speculation.successors import Successors

#: Matches longer than these are kinds of their own.
_LENGTHS = (1, 2, 3, 5, 8, 13, 23, 47)
#: Longest match that is told from longer ones.
_LONGEST = _LENGTHS[-1] + 1
#: Match length -> its kind.
_KIND_OF_LENGTH = [sum(length > bound for bound in _LENGTHS) for length in range(_LONGEST + 1)]
#: Of the tokens that followed a match, so many are compared, the latest ones.
_RECENT = 8


class Place(NamedTuple):
    """Where a text is in both automata."""

    own: Match
    past: Match


@drafter("suffix")
@dataclass
class SuffixDrafter(Follower[Place]):
    """Continues the longest suffix that occurred before in the text, in earlier outputs or in a corpus.

    A suffix automaton of the row's own text and one of the past (the corpus and what earlier generations
    wrote) find the longest match of every path. Candidates are the tokens that followed it, the latest first,
    then the more frequent ones, then those of shorter matches. Their chances are hit rates by the length of
    the match, the number of tokens that followed it, and the count.

    Options:
        breadth: most candidates below a token, from each automaton.
        memory: tokens of earlier generations to remember; 0 forgets them.
        corpus: file of texts to remember always, see :mod:`graphwright.runtime.speculation.corpus`. Its
            automaton takes some 900 bytes a token, as does the memory; ``datastore`` takes 16.

    Source: Hu et al. 2024, "SAM Decoding: Speculative Decoding via Suffix Automaton"; Oliaro et al. 2024,
    "SuffixDecoding: A Model-Free Approach to Speeding Up Large Language Model Inference" (earlier outputs,
    chances from counts).
    """

    proposals: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"tokens": 16, "rule": "goodput"},
        {"tokens": 16, "tree": "greedy(hope=1)", "rule": "goodput"},
    )

    breadth: int = 3
    memory: int = 32768
    corpus: str = ""
    _rows: list[SuffixAutomaton] = field(default_factory=list, init=False, repr=False, compare=False)
    _past: SuffixAutomaton = field(default_factory=SuffixAutomaton, init=False, repr=False, compare=False)
    _corpus: list[int] = field(default_factory=list, init=False, repr=False, compare=False)
    _outputs: list[int] = field(default_factory=list, init=False, repr=False, compare=False)
    _written: list[list[int]] = field(default_factory=list, init=False, repr=False, compare=False)
    _places: list[Match] = field(default_factory=list, init=False, repr=False, compare=False)
    _tally: Tally = field(default_factory=Tally, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.breadth < 1 or self.memory < 0:
            raise InputError(
                f"breadth={self.breadth} or memory={self.memory} is not a number of candidates or of tokens",
                where="drafter=suffix",
                hint="breadth >= 1, memory >= 0",
            )
        if self.corpus:
            check_corpus(self.corpus)

    def begin(self, generation: Generation) -> None:
        self.settle()
        if not self._past.size and self.corpus:
            self._corpus = read_corpus(self.corpus, generation.program).tolist()
            self._past.extend(self._corpus)
        self._remember()
        self._rows = [SuffixAutomaton(prompt) for prompt in generation.prompts]
        self._written = [[] for _ in generation.prompts]
        self._places = []
        for prompt in generation.prompts:
            place = NO_MATCH
            for token in prompt[-_LONGEST:]:
                place = self._past.follow(place, token)
            self._places.append(place)

    def _remember(self) -> None:
        """Add what the last generation wrote to the past; forget the older half of what is too much."""
        for text in self._written:
            if self.memory and text:
                self._outputs += [*text, END]
                self._past.extend([*text, END])
        if len(self._outputs) > self.memory:
            self._outputs = self._outputs[len(self._outputs) - self.memory // 2 :]
            self._past = SuffixAutomaton(self._corpus + self._outputs)

    def observe(self, row: int, outcome: Outcome) -> None:
        text, past, place = self._rows[row], self._past, self._places[row]
        for token in outcome.tokens:
            self._tally.learn(self._listed(text, text.repeated(), ""), token)
            self._tally.learn(self._listed(past, place, "past"), token)
            place = past.follow(place, token)
            text.append(token)
        self._places[row] = place
        self._written[row].extend(outcome.tokens)

    def root(self, row: int) -> Place:
        return Place(self._rows[row].repeated(), self._places[row])

    def follow(self, row: int, state: Place, token: int) -> Place:
        return Place(self._rows[row].follow(state.own, token), self._past.follow(state.past, token))

    def candidates(self, row: int, state: Place) -> Successors:
        found = self._listed(self._rows[row], state.own, "")
        if state.past.length:
            found += self._listed(self._past, state.past, "past")
        return self._tally.rank(found)

    def _listed(self, text: SuffixAutomaton, match: Match, source: str) -> list[Candidate]:
        """What followed ``match`` in ``text``, then what followed its shorter suffixes."""
        found: list[Candidate] = []
        seen = {END}
        left = 1.0
        while match.length:
            followers = text.followers(match)
            order = list(islice(reversed(followers.items()), _RECENT))
            if len(order) > 2:
                order[1:] = sorted(order[1:], key=lambda item: -item[1])
            length, tokens = _KIND_OF_LENGTH[min(match.length, _LONGEST)], min(len(followers), 3)
            chance = match.length / (match.length + 2)
            for rank, (token, count) in enumerate(order, 1):
                if token not in seen:
                    seen.add(token)
                    kind = (source, length, len(found), tokens, min(count, 3))
                    found.append((token, kind, left * chance / rank))
                    if len(found) == self.breadth:
                        return found
            left *= 1 - chance
            match = text.shorter(match)
        return found
