"""A suffix automaton that grows token by token: where a suffix of a text occurred before, and what followed.

Sources: Blumer et al. 1985, "The smallest automaton recognizing the subwords of a text" (construction);
Hu et al. 2024, "SAM Decoding: Speculative Decoding via Suffix Automaton" (for drafting); Moffat 1990,
"Implementing the PPM data compression scheme" (a token is counted in the contexts that are at least as long
as the longest one that knew it).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Match(NamedTuple):
    """A suffix of some text that occurs in the automaton's text.

    Attributes:
        state: of the automaton; 0 for the empty suffix.
        length: tokens of the suffix.
    """

    state: int
    length: int


#: The empty suffix.
NO_MATCH = Match(0, 0)


class SuffixAutomaton:
    """All substrings of a growing text.

    A state stands for substrings that end at the same places, of which the longest has ``length[state]``
    tokens; ``link[state]`` is the longest suffix of them that ends at more places, -1 for the empty one.
    Appending costs amortized constant time, :meth:`follow` too, along one path.

    Attributes:
        size: tokens so far.
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.size = 0
        self._next: list[dict[int, int]] = [{}]
        self._counts: list[dict[int, int]] = [{}]
        self._link, self._length = [-1], [0]
        self._last = 0
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens."""
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """Append one token."""
        self.size += 1
        new = self._add({}, {}, self._length[self._last] + 1)
        state = self._last
        while state >= 0 and token not in self._next[state]:
            self._next[state][token] = new
            self._counts[state][token] = 1
            state = self._link[state]
        if state < 0:
            self._link.append(0)
        else:
            counts = self._counts[state]
            counts[token] = counts.pop(token) + 1  # the last key is the one counted last
            # The link is filled in first: splitting a state appends another one.
            self._link.append(-1)
            self._link[new] = self._ending(state, token)
        self._last = new

    def _ending(self, state: int, token: int) -> int:
        """The state whose longest string is ``state``'s longest with ``token`` behind it."""
        target = self._next[state][token]
        if self._length[target] == self._length[state] + 1:
            return target
        short = self._add(dict(self._next[target]), dict(self._counts[target]), self._length[state] + 1)
        self._link.append(self._link[target])
        self._link[target] = short
        while state >= 0 and self._next[state].get(token) == target:
            self._next[state][token] = short
            state = self._link[state]
        return short

    def _add(self, following: dict[int, int], counts: dict[int, int], length: int) -> int:
        self._next.append(following)
        self._counts.append(counts)
        self._length.append(length)
        return len(self._next) - 1

    def repeated(self) -> Match:
        """The longest suffix of the text that occurred in it before."""
        state = max(self._link[self._last], 0)
        return Match(state, self._length[state])

    def follow(self, match: Match, token: int) -> Match:
        """The longest suffix of ``match`` and ``token`` behind it that occurs in the text."""
        state, length = match
        while token not in self._next[state]:
            state = self._link[state]
            if state < 0:
                return NO_MATCH
            length = self._length[state]
        return Match(self._next[state][token], length + 1)

    def shorter(self, match: Match) -> Match:
        """The longest suffix of a match that ends at more places; the empty one in the end."""
        state = max(self._link[match.state], 0)
        return Match(state, self._length[state])

    def followers(self, match: Match) -> dict[int, int]:
        """The tokens that followed the match and how often, the one counted last at the end.

        A follower is counted where no longer context knew it.
        """
        return self._counts[match.state]
