"""Numbers between the host and the device without waiting for the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch


def upload(values: Sequence[Any], device: torch.device) -> torch.Tensor:
    """Nested lists of integers as an int64 tensor on ``device``.

    ``torch.tensor(values, device="cuda")`` waits until the device has done everything that was queued
    before; a copy from pinned memory is queued like a kernel.
    """
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.int64, device=device)
    return torch.tensor(values, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)


class Readback:
    """Small tensors on their way from the device to the host, in order.

    Args:
        device: where they come from.
        shape: of each of them; int64.
        slots: most that are under way at a time.

    On a GPU a tensor is copied to pinned memory behind the work that makes it, and only :meth:`take` waits
    for that one copy.
    """

    def __init__(self, device: torch.device, shape: Sequence[int], slots: int) -> None:
        cuda = device.type == "cuda"
        self._buffers = [torch.empty(tuple(shape), dtype=torch.int64, pin_memory=cuda) for _ in range(slots)]
        self._events: list[Any] = [torch.cuda.Event() if cuda else None for _ in range(slots)]
        self._free = deque(range(slots))
        self._under_way: deque[int] = deque()

    def __len__(self) -> int:
        return len(self._under_way)

    def put(self, tensor: torch.Tensor) -> None:
        """Send a tensor on its way; there must be a free slot."""
        slot = self._free.popleft()
        self._buffers[slot].copy_(tensor, non_blocking=True)
        if self._events[slot] is not None:
            self._events[slot].record()
        self._under_way.append(slot)

    def take(self) -> Any:
        """The oldest one as nested lists; waits until it has arrived."""
        slot = self._under_way.popleft()
        if self._events[slot] is not None:
            self._events[slot].synchronize()
        values = self._buffers[slot].tolist()
        self._free.append(slot)
        return values
