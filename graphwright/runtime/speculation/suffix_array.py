"""A suffix array of a fixed text: every place where a phrase occurs is one interval.

Source: Manber and Myers 1993, "Suffix arrays: a new method for on-line string searches" (sorting by prefixes
of doubling length; binary search).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

#: Phrases whose followers are kept: texts ask about the same ones again and again.
_CACHED = 65536


class Span(NamedTuple):
    """The suffixes ``order[low:high]``, which start with the same ``length`` tokens."""

    low: int
    high: int
    length: int


class SuffixArray:
    """The sorted suffixes of a text; 8 bytes a token besides the text.

    Args:
        tokens: ``[N]`` ids from -1, N at least 1.
        samples: places of a phrase that are looked at for what follows it.
    """

    def __init__(self, tokens: npt.NDArray[np.int64], samples: int = 64) -> None:
        self.size = len(tokens)
        self._tokens = np.append(tokens, -2)  # what follows the last token sorts first
        self._order = _sorted_suffixes(tokens)
        self._samples = samples
        self._followers: dict[Span, list[tuple[int, int]]] = {}

    @property
    def everything(self) -> Span:
        """All suffixes: the empty phrase."""
        return Span(0, self.size, 0)

    def narrow(self, span: Span, token: int) -> Span | None:
        """The places of the span's phrase with ``token`` behind it; None if there are none."""
        if span.high - span.low == 1:  # most long phrases
            same = self._tokens[self._order[span.low] + span.length] == token
            return Span(span.low, span.high, span.length + 1) if same else None
        place = range(span.low, span.high)

        def behind(at: int) -> int:
            return int(self._tokens[self._order[at] + span.length])

        low = bisect_left(place, token, key=behind)
        high = bisect_right(place, token, lo=low, key=behind)
        return Span(span.low + low, span.low + high, span.length + 1) if low < high else None

    def find(self, phrase: Sequence[int]) -> Span | None:
        """The places of a phrase; None if there are none."""
        wanted, length = list(phrase), len(phrase)

        def prefix(at: int) -> list[int]:
            start = self._order[at]
            found: list[int] = self._tokens[start : start + length].tolist()
            return found

        low = bisect_left(range(self.size), wanted, key=prefix)
        high = bisect_right(range(self.size), wanted, lo=low, key=prefix)
        return Span(low, high, length) if low < high else None

    def followers(self, span: Span) -> list[tuple[int, int]]:
        """What follows the phrase and how often, most frequent first, in a sample of its places.

        The places are sorted by what follows, so that evenly spaced ones keep the shares.
        """
        found = self._followers.get(span)
        if found is not None:
            return found
        size = span.high - span.low
        at = self._order[span.low : span.high]
        if size > self._samples:
            at = at[np.arange(self._samples) * size // self._samples]
        counts = Counter(self._tokens[at + span.length].tolist())
        found = [pair for pair in counts.most_common() if pair[0] >= 0]
        if len(self._followers) >= _CACHED:
            self._followers.clear()
        self._followers[span] = found
        return found


def _sorted_suffixes(tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The start of every suffix, in the order of the suffixes."""
    rank = np.unique(tokens, return_inverse=True)[1].astype(np.int64)
    size, length = len(tokens), 1
    while True:
        behind = np.zeros(size, dtype=np.int64)  # the end of the text sorts before every token
        behind[:-length] = rank[length:] + 1
        both = rank * (size + 1) + behind
        order = np.argsort(both, kind="stable")
        rises = np.diff(both[order], prepend=both[order[0]]) > 0
        rank[order] = np.cumsum(rises)
        length *= 2
        if rank[order[-1]] == size - 1 or length >= size:
            return order
