"""Drafting by retrieval from a corpus."""

from __future__ import annotations

from dataclasses import dataclass, field

from graphwright.ir.errors import InputError
from graphwright.runtime.speculation.calibration import Candidate, Tally
from graphwright.runtime.speculation.corpus import check_corpus, read_corpus
from graphwright.runtime.speculation.drafter import Generation, Outcome, drafter
from graphwright.runtime.speculation.following import Follower
from graphwright.runtime.speculation.successors import Successors
from graphwright.runtime.speculation.suffix_array import Span, SuffixArray


@dataclass(frozen=True)
class Retrieved:
    """The end of a text, and where its longest suffix is that the corpus has."""

    ending: tuple[int, ...]
    span: Span


@drafter("datastore")
@dataclass
class DatastoreDrafter(Follower[Retrieved]):
    """Proposes what follows the text's longest suffix in a corpus, with counts (REST).

    The corpus is kept as a suffix array. Chances are hit rates by the length of the match and the share of
    its places that go on with the token.

    Options:
        path: the corpus, see :mod:`graphwright.runtime.speculation.corpus`.
        longest: longest suffix that is looked up.
        shortest: nothing is retrieved for shorter matches.
        breadth: most candidates below a token.

    Source: He et al. 2023, "REST: Retrieval-Based Speculative Decoding"; "CodeSwift" (retrieve only where it
    pays, which :attr:`shortest` decides here).
    """

    path: str = ""
    longest: int = 16
    shortest: int = 2
    breadth: int = 4
    _corpus: SuffixArray | None = field(default=None, init=False, repr=False, compare=False)
    _rows: list[Retrieved] = field(default_factory=list, init=False, repr=False, compare=False)
    _tally: Tally = field(default_factory=Tally, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest or self.breadth < 1:
            raise InputError(
                f"shortest={self.shortest}, longest={self.longest}, breadth={self.breadth} retrieve nothing",
                where="drafter=datastore",
                hint="1 <= shortest <= longest, breadth >= 1",
            )
        if not self.path:
            raise InputError(
                "there is nothing to retrieve from",
                where="drafter=datastore",
                hint="datastore(path=corpus.jsonl)",
            )
        check_corpus(self.path)

    def begin(self, generation: Generation) -> None:
        self.settle()
        if self._corpus is None:
            self._corpus = SuffixArray(read_corpus(self.path, generation.program))
        self._rows = []
        for prompt in generation.prompts:
            ending = tuple(prompt[-self.longest :])
            self._rows.append(Retrieved(ending, self._longest(ending)))

    @property
    def _places(self) -> SuffixArray:
        assert self._corpus is not None, "begin() comes first"
        return self._corpus

    def _longest(self, ending: tuple[int, ...]) -> Span:
        """Where the longest suffix of ``ending`` is; a suffix of what occurs occurs too."""
        low, high, found = 0, len(ending), self._places.everything
        while low < high:
            length = (low + high + 1) // 2
            span = self._places.find(ending[-length:])
            if span is None:
                high = length - 1
            else:
                low, found = length, span
        return found

    def observe(self, row: int, outcome: Outcome) -> None:
        for token in outcome.tokens:
            self._tally.learn(self._listed(self._rows[row]), token)
            self._rows[row] = self.follow(row, self._rows[row], token)

    def root(self, row: int) -> Retrieved:
        return self._rows[row]

    def follow(self, row: int, state: Retrieved, token: int) -> Retrieved:
        ending = (*state.ending, token)[-self.longest :]
        if state.span.length < self.longest:
            span = self._places.narrow(state.span, token)
            if span is not None:
                return Retrieved(ending, span)
        # No longer match than this one: it went on with other tokens, or it may not grow.
        return Retrieved(ending, self._longest(ending[-max(state.span.length, 1) :]))

    def candidates(self, row: int, state: Retrieved) -> Successors:
        return self._tally.rank(self._listed(state))

    def _listed(self, state: Retrieved) -> list[Candidate]:
        span = state.span
        if span.length < self.shortest:
            return []
        followers = self._places.followers(span)
        total = sum(count for _, count in followers)
        matched = span.length / (span.length + 2)
        return [
            (token, (span.length, rank, 4 * count // total, min(total, 4)), matched * count / (total + 1))
            for rank, (token, count) in enumerate(followers[: self.breadth])
        ]
