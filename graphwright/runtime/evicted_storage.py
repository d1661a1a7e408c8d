"""Layers that hold fewer tokens than their rows are long: when tokens leave, and where the others go.

See :mod:`graphwright.ir.eviction_ops` for the tensors. A step appends behind the tokens that a layer holds.
Once its tokens are committed, a row that holds as many as its slots allow evicts down to the budget: tokens
leave at fixed numbers of held ones, whatever the steps were. Rolling back a step never meets an eviction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from graphwright.ir.errors import CapacityError
from graphwright.ir.eviction_ops import STEP_TOKENS
from graphwright.ir.evictors import Seen, choose
from graphwright.runtime.evicted_layout import EvictedLayout, Pace
from graphwright.runtime.transfers import upload

Tensors = dict[str, torch.Tensor]


class _Row(NamedTuple):
    """A row of the layers of one pace.

    Attributes:
        held: tokens that it holds.
        settled: of them, those that an eviction left.
        anchored: of them, first ones that stay for good.
    """

    held: int = 0
    settled: int = 0
    anchored: int = 0


class Eviction:
    """The evicted layers of one generation, and how much every row of them holds.

    Args:
        layouts: one or more.
        stores: of the generation; lengths of the layers are replaced by rows of one tensor, and what
            evictors note is added.
        batch, capacity: rows, and tokens that a row may have.
        device: of the stores.
        fixed: small stores stay at their addresses while a long step has larger ones.
    """

    def __init__(
        self,
        layouts: Sequence[EvictedLayout],
        stores: Tensors,
        batch: int,
        capacity: int,
        device: torch.device,
        fixed: bool,
    ) -> None:
        self.layouts, self._stores, self._batch, self._capacity = tuple(layouts), stores, batch, capacity
        self._fixed = fixed
        # One tensor for all layers: committing adds to all of them at once.
        self._lengths = torch.zeros((len(layouts), batch), dtype=torch.int64, device=device)
        for index, layout in enumerate(layouts):
            stores[layout.held] = self._lengths[index]
            if layout.evictor.accumulates:
                keys = stores[layout.keys]
                stores[layout.noted] = torch.zeros(keys.shape[:3], dtype=torch.float32, device=device)
        self._paces = {layout.pace: layout for layout in layouts}
        self._small: Tensors = {}
        self._prompt = False
        self.reset()

    def reset(self) -> None:
        """No row holds a token. Stores keep their size; see :meth:`shrink`."""
        self._lengths.zero_()
        self._rows = {pace: [_Row()] * self._batch for pace in self._paces}
        # The ring holds no queries of tokens before these.
        self._observed = [0] * self._batch
        self._prompt = False

    def adopt(self, one: Eviction) -> None:
        """Every row is as the only row of ``one``, whose tensors were copied."""
        self._rows = {pace: rows * self._batch for pace, rows in one._rows.items()}
        self._observed = one._observed * self._batch

    def pretend(self, length: int) -> None:
        """Hold what rows of so many tokens hold."""
        for pace, one in self._paces.items():
            held = length
            if one.kept.evicts(self._capacity):
                held = min(length, one.kept.limit(self._capacity) - 1)
            self._rows[pace] = [_Row(held, held)] * self._batch
        for index, layout in enumerate(self.layouts):
            self._lengths[index].fill_(self._rows[layout.pace][0].held)

    def room(self, row: int) -> int:
        """Tokens that a row may run before its next eviction."""
        return min(
            (self._limit(one) - self._rows[pace][row].held for pace, one in self._paces.items()),
            default=self._capacity,
        )

    def _limit(self, one: EvictedLayout) -> int:
        """Tokens that a row holds when it evicts; more than ever if it does not."""
        whole = self._prompt and one.kept.when == "prompt"
        never = whole or not one.kept.evicts(self._capacity)
        return 2 * self._capacity + STEP_TOKENS if never else one.kept.limit(self._capacity)

    # --- committing ------------------------------------------------------------------------------

    def commit(self, accepted: torch.Tensor, counts: Sequence[int], lengths: Sequence[int]) -> None:
        """Take in the tokens that a step committed, and evict where it is time.

        Args:
            accepted: ``[B]`` tokens of each row, on the device; counts: the same on the host.
            lengths: ``[B]`` tokens of each row, these included.
        """
        self.shift(accepted, counts)
        for pace, one in self._paces.items():
            rows = self._rows[pace]
            limit = self._limit(one)
            due = [index for index, row in enumerate(rows) if row.held >= limit]
            if due:
                self._evict(pace, due, one.kept.budget(self._capacity), lengths)

    def shift(self, tokens: torch.Tensor, counts: Sequence[int]) -> None:
        """Every row holds so many tokens more, or fewer if negative: the newest; nothing is evicted.

        Args:
            tokens: ``[B]`` on the device; counts: the same on the host.
        """
        self._lengths += tokens
        for pace, rows in self._rows.items():
            self._rows[pace] = [row._replace(held=row.held + n) for row, n in zip(rows, counts, strict=True)]

    def _evict(self, pace: Pace, due: Sequence[int], count: int, lengths: Sequence[int]) -> None:
        """Let these rows of a pace keep so many tokens."""
        for index, layout in enumerate(self.layouts):
            for row in due if layout.pace == pace else ():
                self._evict_row(layout, row, count, lengths[row])
                self._lengths[index, row].fill_(count)
        rows = self._rows[pace]
        for row in due:
            rows[row] = rows[row]._replace(held=count, settled=count)

    def _evict_row(self, layout: EvictedLayout, row: int, count: int, length: int) -> None:
        """One row by itself, so that it does not matter which others are in the batch."""
        state = self._rows[layout.pace][row]
        seen = self._seen(layout, row, length)
        seen = replace(seen, accumulated=layout.evictor.note(seen))
        first = max(min(layout.kept.sinks, count), state.anchored)
        newest = min(layout.kept.window, count - first)
        kept = choose(layout.evictor.score(seen), count, first, newest)
        found = layout.evictor.merge(seen, kept)
        for name, content in ((layout.keys, found.keys), (layout.values, found.values)):
            self._stores[name][row, :, :count] = content[0]
        if layout.evictor.accumulates:
            self._stores[layout.noted][row, :, :count] = found.accumulated[0]

    def _seen(self, layout: EvictedLayout, row: int, length: int) -> Seen:
        state = self._rows[layout.pace][row]
        keys, values = (
            self._stores[name][row, None, :, : state.held] for name in (layout.keys, layout.values)
        )
        noted = torch.zeros(keys.shape[:3], dtype=torch.float32, device=keys.device)
        if layout.evictor.accumulates:
            old = self._stores[layout.noted][row, None]
            noted[:, :, : state.settled] = old[:, :, : state.settled]
        queries = keys[:, :, :0]
        if layout.ring is not None:
            ring = self._stores[layout.ring]
            start = max(length - layout.kept.window, self._observed[row], length - state.held)
            numbers = torch.arange(start, length, device=ring.device) % ring.shape[2]
            queries = ring[row, None][:, :, numbers]
        return Seen(queries, keys, values, noted, layout.scale, layout.softcap, length)

    def move(self, row: int, nodes: Sequence[int], length: int) -> None:
        """Compact what a row keeps of a tree: step tokens ``nodes`` become its first ones.

        Args:
            length: committed tokens of the row before the step.
        """
        for layout in self.layouts:
            held = self._rows[layout.pace][row].held
            for name, start in ((layout.keys, held), (layout.values, held), (layout.ring, length)):
                if name is None:
                    continue
                mine = self._stores[name][row]
                ends = (nodes, range(len(nodes)))
                moves = upload([[start + n for n in end] for end in ends], mine.device)
                origin, target = moves % mine.shape[1]
                mine.index_copy_(1, target, mine.index_select(1, origin))

    # --- going back ------------------------------------------------------------------------------

    def check_cut(self, before: Sequence[int], after: Sequence[int]) -> None:
        """Whether rows can go back from and to these lengths.

        Raises:
            CapacityError: tokens have left since; nothing was changed.
        """
        for rows in self._rows.values():
            for row, old, new in zip(rows, before, after, strict=True):
                if new and row.held - (old - new) < row.settled:
                    raise CapacityError(
                        f"cannot go back to {new} tokens: since then, tokens were evicted, and "
                        f"{row.settled} of the first {old - (row.held - row.settled)} are left",
                        where="State.truncate",
                        hint="start a new cache for the shorter sequence",
                    )

    def cut(self, before: Sequence[int], after: Sequence[int]) -> None:
        """Forget the newest tokens of each row; :meth:`check_cut` found nothing against it."""
        back = [old - new for old, new in zip(before, after, strict=True)]
        for pace, rows in self._rows.items():
            self._rows[pace] = [
                row._replace(held=row.held - n, settled=min(row.settled, row.held - n)) if new else _Row()
                for row, n, new in zip(rows, back, after, strict=True)
            ]
        held = [[row.held for row in self._rows[layout.pace]] for layout in self.layouts]
        self._lengths.copy_(upload(held, self._lengths.device))
        for index, (old, new) in enumerate(zip(before, after, strict=True)):
            if old > new:  # steps after the cut have overwritten what came before their windows
                window = max(layout.kept.window for layout in self.layouts)
                self._observed[index] = 0 if not new else max(self._observed[index], old - window)

    def rewind(self, before: Sequence[int], after: Sequence[int]) -> None:
        """Take back newest tokens that the next step runs again.

        Raises:
            CapacityError: more than an eviction always leaves of the newest ones.
        """
        for pace, one in self._paces.items():
            for row, old, new in zip(self._rows[pace], before, after, strict=True):
                if row.held - (old - new) < row.settled - one.kept.window * bool(row.settled):
                    raise CapacityError(
                        f"cannot run {old - new} tokens again: {one.kept.window} are left of the newest",
                        where="State.rewind",
                        hint="give evict_tokens a window of at least as many tokens",
                    )
        observed = list(self._observed)
        self.cut(before, after)
        self._observed = observed  # the same tokens come again

    # --- long steps and prompts ------------------------------------------------------------------

    @property
    def is_large(self) -> bool:
        """Whether stores are larger than those of decode steps."""
        return any(self._stores[x.keys].shape[2] != x.kept.slots(self._capacity) for x in self.layouts)

    def begin_prompt(self, tokens: int) -> None:
        """A prompt of at most so many tokens a row begins; where it stays whole, stores take all of it."""
        for layout in self.layouts:
            if layout.kept.when == "prompt" and layout.kept.evicts(self._capacity):
                self._prompt = True
                most = max(row.held for row in self._rows[layout.pace]) + tokens
                self._resize(layout, min(self._capacity, most))

    def make_room(self, tokens: int) -> None:
        """Let the next step have ``tokens`` tokens a row."""
        if tokens <= STEP_TOKENS:
            return
        for layout in self.layouts:
            if not (self._prompt and layout.kept.when == "prompt"):
                self._resize(layout, layout.kept.slots(self._capacity, tokens))

    def end_prompt(self, lengths: Sequence[int]) -> None:
        """A prompt has run: evict what it kept beyond its layers' budgets."""
        whole, self._prompt = self._prompt, False
        for pace, one in self._paces.items():
            budget = one.kept.budget(self._capacity)
            rows, share = self._rows[pace], one.evictor.anchored(budget)
            if not one.kept.evicts(self._capacity):
                continue
            if share:  # of the first prompt; what comes later is no part of it
                share = max(share, one.kept.least)
                due = [i for i, row in enumerate(rows) if not row.anchored and row.held > share]
                self._evict(pace, due, share, lengths)
                rows[:] = [row if row.anchored else row._replace(anchored=row.held) for row in rows]
            elif whole:
                due = [i for i, row in enumerate(rows) if row.held >= self._limit(one)]
                self._evict(pace, due, budget, lengths)

    def shrink(self) -> None:
        """Give back what a long step or a whole prompt needed."""
        for layout in self.layouts:
            self._resize(layout, layout.kept.slots(self._capacity))

    def _resize(self, layout: EvictedLayout, slots: int) -> None:
        """Larger stores where they are too small; small ones where they are asked for."""
        small, now = layout.kept.slots(self._capacity), self._stores[layout.keys].shape[2]
        if slots == now or small < slots < now:
            return
        names = [layout.keys, layout.values] + [layout.noted] * layout.evictor.accumulates
        held = max(row.held for row in self._rows[layout.pace])
        for name in names:
            store = self._stores[name]
            into = self._small.pop(name, None) if slots == small else None
            if self._fixed and now == small:
                self._small[name] = store
            fresh = store.new_zeros((*store.shape[:2], slots, *store.shape[3:])) if into is None else into
            fresh[:, :, :held] = store[:, :, :held]
            self._stores[name] = fresh
