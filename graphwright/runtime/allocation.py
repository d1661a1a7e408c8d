"""The states of a step as tensors: how large each is for so many rows and tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from graphwright.ir.errors import InputError
from graphwright.ir.eviction_ops import HELD, KEPT, RING, Retention
from graphwright.ir.graph import is_appended, shared_prefix, value
from graphwright.ir.packed_ops import page_count, tail_slots
from graphwright.runtime.evicted_layout import evicted_layouts
from graphwright.runtime.lowering.lower import LoweredStep
from graphwright.runtime.storage import MAX_STEP_TOKENS, State, slots_for

#: The part of the cache that a state belongs to, by its role; None is a plain store.
_PARTS: dict[str | None, str] = {
    None: "stores", "tokens": "stores", "prefix": "stores", "tail": "tail", "first": "first",
    "summary": "summaries", KEPT: "stores", HELD: "stores", RING: "stores",
}  # fmt: skip


class Allocator:
    """Makes the caches of a program.

    Args:
        step: the lowered graph.
        device: where the caches live.
        draft: another lowered graph over the same caches, which hold what it reads besides.

    Attributes:
        packed, summaries: what committing tokens writes.
        windows: of each state that tokens are appended to.
        shared_prefix: tokens that rows are promised to share; 0: whatever they do; None: nothing is shared.
        prefixes: by the name of a store, the state that holds what all rows share of it.
    """

    def __init__(self, step: LoweredStep, device: torch.device, draft: LoweredStep | None = None) -> None:
        self._device = device
        own = {layout.name for layout in step.summaries}
        more = [] if draft is None else [layout for layout in draft.summaries if layout.name not in own]
        self.packed, self.summaries = tuple(step.packed), (*step.summaries, *more)
        nodes = self._nodes = {**({} if draft is None else draft.state_nodes), **step.state_nodes}
        self.windows = {name: node.meta["window"] for name, node in nodes.items() if is_appended(node)}
        self.shared_prefix = shared_prefix(nodes.values())
        parts = {name: node.meta.get("store", {}) for name, node in nodes.items()}
        self.prefixes = {part["of"]: name for name, part in parts.items() if part.get("role") == "prefix"}
        self._evicted = evicted_layouts(nodes)

    def allocate(self, batch: int, capacity: int, prefix: int, fixed: bool) -> State:
        """A fresh cache; see ``Program.allocate``."""
        self._check_prefix(prefix, capacity)
        stores = {name: self._tensor(name, batch, capacity, prefix) for name in self._nodes}
        state = self._state(stores, batch, capacity, fixed)
        state.share(prefix, self.prefixes)
        if not stores:
            history = torch.zeros((batch, 1, capacity, 1), dtype=torch.int64, device=self._device)
            state.stores["input_ids"] = history
            state.windows = {"input_ids": 0}
        return state

    def first_row(self, state: State) -> State:
        """A state of one row whose own stores are those that hold the prefix of ``state``."""
        own = [name for name in self._nodes if name not in self.prefixes]
        stores = {name: self._tensor(name, 1, state.capacity, 0) for name in own}
        stores |= {name: state.stores[prefix] for name, prefix in self.prefixes.items()}
        return self._state(stores, 1, state.capacity, fixed=False)

    def part(self, name: str) -> str:
        """The part of the cache that a state belongs to, for reports."""
        node = self._nodes.get(name)  # none has what evictors note of tokens
        role = node.meta.get("store", {}).get("role") if node is not None else None
        return _PARTS.get(role, "pages")

    def _state(self, stores: dict[str, torch.Tensor], batch: int, capacity: int, fixed: bool) -> State:
        parts = (self.packed, fixed, self.summaries, self._evicted)
        return State(stores, self.windows, batch, capacity, self._device, *parts)

    def _tensor(self, name: str, batch: int, capacity: int, prefix: int) -> torch.Tensor:
        """A state of zeros: its symbolic sizes are the batch and the slots (or pages)."""
        node = self._nodes[name]
        part = node.meta.get("store", {})
        if part.get("role") == "prefix":
            batch, slots = 1, prefix
        else:
            slots = _slots(part, node.meta["window"], capacity - (prefix if name in self.prefixes else 0))
        fake = value(node)
        shape = [batch, *(size if isinstance(size, int) else slots for size in fake.shape[1:])]
        return torch.zeros(shape, dtype=fake.dtype, device=self._device)

    def _check_prefix(self, prefix: int, capacity: int) -> None:
        if prefix and not self.prefixes:
            raise InputError(
                "the program keeps no shared prefix",
                where="Program.allocate",
                hint="add the pass share_prefix",
            )
        if not 0 <= prefix < max(capacity, 1):
            raise InputError(
                f"a prefix of {prefix} tokens leaves no room for each row's own in {capacity}",
                where="Program.allocate",
                hint="allocate a larger cache",
            )


def _slots(part: Mapping[str, Any], window: int, capacity: int) -> int:
    """Slots, pages or entries of a row that may have so many tokens of its own."""
    slots, role = slots_for(capacity, window), part.get("role")
    if role == KEPT:
        return Retention.of(part).slots(capacity)
    if role == "tail":
        return tail_slots(part["page"], part["first"], part["recent"], MAX_STEP_TOKENS)
    if role == "buffer":
        return page_count(slots, part["page"], part["first"], window)
    if role == "summary":
        return -(-page_count(slots, part["page"], part["first"], 0) // part["span"])
    return slots
