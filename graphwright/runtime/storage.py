"""The cache of one generation: preallocated, ragged, with rollback."""

from __future__ import annotations

import torch

from graphwright.ir.errors import CapacityError

#: Most tokens of one row in one decode or verification step.
MAX_STEP_TOKENS = 64
#: Most tokens of one row in one prefill step.
PREFILL_CHUNK = 512


def window_slack(window: int) -> int:
    """Slots beyond the window: a step and a prefill chunk must fit without overwriting what is visible."""
    return max(MAX_STEP_TOKENS, min(PREFILL_CHUNK, window))


def slots_for(capacity: int, window: int) -> int:
    """Slots of a store: all tokens, or the window and its slack (a ring)."""
    return min(capacity, window + window_slack(window)) if window else capacity


class State:
    """One generation's cache.

    Attributes:
        lengths: ``[B]`` int64, committed tokens of each row.
        batch, capacity: rows, and tokens that a row may hold.
        stores: name to ``[B, G, S, D]``.

    Tokens beyond ``lengths`` are whatever the last step wrote; not committing them is the rollback.
    """

    def __init__(
        self,
        stores: dict[str, torch.Tensor],
        windows: dict[str, int],
        batch: int,
        capacity: int,
        device: torch.device,
    ) -> None:
        self.stores = stores
        self.windows = windows
        self.batch, self.capacity = batch, capacity
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self._furthest = 0

    def nbytes(self) -> int:
        """Bytes of all stores."""
        return sum(store.nbytes for store in self.stores.values())

    def commit(self, accepted: torch.Tensor) -> None:
        """Keep the first ``accepted[b]`` tokens of the last step (``[B]``); the rest is rolled back."""
        self.lengths += accepted

    def commit_path(self, path: torch.Tensor, accepted: torch.Tensor) -> None:
        """Keep step tokens ``path[b, :accepted[b]]`` of a tree (``[B, P]``, ``[B]``), compacted.

        Paths ascend: a child comes after its parent in the step.
        """
        for row, count in enumerate(accepted.tolist()):
            if count == 0:
                continue
            start = int(self.lengths[row])
            chosen = path[row, :count].to(self.lengths.device)
            to = torch.arange(count, device=chosen.device)
            if not torch.equal(chosen, to):
                for store in self.stores.values():
                    slots = store.shape[2]
                    moved = store[row].index_select(1, (start + chosen) % slots)
                    store[row].index_copy_(1, (start + to) % slots, moved)
        self.lengths += accepted

    def truncate(self, lengths: torch.Tensor) -> None:
        """Forget everything after ``lengths[b]`` tokens (``[B]``).

        Raises:
            CapacityError: a sliding-window store no longer holds what the shorter row would need.
        """
        self._furthest = max(self._furthest, int(self.lengths.max()))
        shortest = int(torch.minimum(lengths, self.lengths).min())
        for name, store in self.stores.items():
            slots, window = store.shape[2], self.windows[name]
            lost = self._furthest - slots
            if window and lost > max(0, shortest - window):
                raise CapacityError(
                    f"cannot go back to {shortest} tokens: {name} keeps the last {slots} of {self._furthest}",
                    where="State.truncate",
                    hint="start a new cache for the shorter sequence",
                )
        self.lengths = torch.minimum(self.lengths, lengths)
