"""States that are used again, so that what was captured over them is too."""

from __future__ import annotations

from collections.abc import Callable

from graphwright.runtime.storage import State

_SMALLEST = 64


def capacity_bucket(capacity: int) -> int:
    """The capacity that is allocated for one that is asked for: at most a sixteenth more, or 64 tokens."""
    step = max(_SMALLEST, 1 << max((capacity - 1).bit_length() - 5, 0))
    return -(-capacity // step) * step


class StatePool:
    """Keeps the states of calls that have ended, one for each batch and capacity.

    Args:
        most: no state needs more tokens a row than this; None if there is no limit.
    """

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._idle: dict[tuple[int, int], State] = {}

    def __len__(self) -> int:
        return len(self._idle)

    def borrow(
        self, batch: int, capacity: int, allocate: Callable[[int, int], State], prefix: int = 0
    ) -> State:
        """An empty state of at least this capacity, a new one from ``allocate`` if none is kept.

        One whose rows share another ``prefix`` makes way for it.
        """
        wanted = capacity_bucket(capacity)
        if self._most is not None:
            wanted = max(capacity, min(wanted, self._most))
        state = self._idle.pop((batch, wanted), None)
        if state is None or state.prefix != prefix:
            return allocate(batch, wanted)
        state.reset()
        return state

    def give_back(self, state: State) -> None:
        """Keep a state for the next call; what is in it does not matter."""
        self._idle[state.batch, state.capacity] = state

    def clear(self) -> bool:
        """Let go of all states; whether there were any."""
        had = bool(self._idle)
        self._idle.clear()
        return had
