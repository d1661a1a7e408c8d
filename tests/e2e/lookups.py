"""Definitions for the tests of lookups: everything is found by looking everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from graphwright.runtime.speculation.drafters.mix import taken
from graphwright.runtime.speculation.following import Follower
from graphwright.runtime.speculation.growing import Ask, Growing
from graphwright.runtime.speculation.successors import Ranked

TEXT = st.lists(st.integers(0, 2), min_size=1, max_size=30)
TOKENS = st.lists(st.integers(0, 2), max_size=8)
FEW = settings(max_examples=60, deadline=None)


def ends(text: Sequence[int], phrase: Sequence[int]) -> list[int]:
    """The definition: where ``phrase`` ends in ``text``, found by looking everywhere."""
    size = len(phrase)
    return [end for end in range(size, len(text) + 1) if list(text[end - size : end]) == list(phrase)]


def longest(text: Sequence[int], whole: Sequence[int], most: int) -> int:
    """The length of the longest suffix of ``whole``, at most ``most``, that ``text`` has."""
    return max(n for n in range(min(most, len(whole)) + 1) if n == 0 or ends(text, whole[len(whole) - n :]))


def answers(guesser: Follower[Any], path: Sequence[int] = (), row: int = 0) -> list[tuple[int, float]]:
    """What a drafter lists below a path."""
    growing = Growing()
    node = 0
    for token in path:
        child = growing.add(node, Ranked([token], [1.0]))
        assert child is not None
        node = child
    (found,) = guesser.look([Ask(row, growing, node)])
    guesser.settle()
    return taken(found, 99)
