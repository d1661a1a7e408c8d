"""Lookups that know a path by a state: one token moves the state on."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from graphwright.runtime.speculation.drafter import PathDrafter
from graphwright.runtime.speculation.growing import Ask
from graphwright.runtime.speculation.successors import Successors

S = TypeVar("S")


@dataclass
class Follower(PathDrafter, Generic[S]):
    """A path drafter whose answer depends on a text through a state only.

    The states of a growing draft are kept until it is complete, so that a question costs one
    :meth:`follow`, however deep it is.
    """

    _states: dict[tuple[int, int], S] = field(default_factory=dict, init=False, repr=False, compare=False)

    @abstractmethod
    def root(self, row: int) -> S:
        """The state of everything that the row has observed."""

    @abstractmethod
    def follow(self, row: int, state: S, token: int) -> S:
        """The state after one more token. Must leave ``state`` as it is."""

    @abstractmethod
    def candidates(self, row: int, state: S) -> Successors:
        """What may follow."""

    def look(self, asked: Sequence[Ask]) -> list[Successors]:
        return [self.candidates(ask.row, self._state(ask)) for ask in asked]

    def _state(self, ask: Ask) -> S:
        """The state at a step token; its ancestors were asked about before it, or are now."""
        row, node, growing = ask.row, ask.node, ask.growing
        missing = []
        while node and (row, node) not in self._states:
            missing.append(node)
            node = growing.parents[node - 1] + 1
        state = self._states[row, node] if node else self.root(row)
        for node in reversed(missing):
            state = self._states[row, node] = self.follow(row, state, growing.tokens[node - 1])
        return state

    def settle(self) -> None:
        """Forget the states; :meth:`begin` calls it too, for drafts that an error left incomplete."""
        self._states.clear()
