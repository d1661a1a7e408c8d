"""The cache of one generation: preallocated, ragged, with rollback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from graphwright.ir.depth_ops import ENDLESS
from graphwright.ir.errors import CapacityError
from graphwright.runtime.evicted_layout import EvictedLayout
from graphwright.runtime.evicted_storage import Eviction
from graphwright.runtime.packed_storage import PackedLayout
from graphwright.runtime.page_summaries import Summaries, SummaryLayout
from graphwright.runtime.transfers import upload

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

    Args:
        stores: every tensor by name: stores ``[B, G, S, D]`` and the parts of packed ones.
        windows: of each store that keeps tokens slot by slot.
        batch, capacity: rows, and tokens that a row may hold.
        device: where the stores are.
        packed: the stores that are packed.
        fixed: decode steps find every store at the same address for as long as the state lives, also
            after longer steps: what graphs of them need.
        summaries: of the stores whose pages attention selects from.
        evicted: the layers that hold fewer tokens than their rows have.

    Attributes:
        lengths: ``[B]`` int64, committed tokens of each row; one tensor for as long as the state lives.
        known: the same on the host, so that nothing has to be read from the device.
        graphs: what was captured of steps over this state, by the program that runs them.
        prefix: tokens that all rows share, which are kept once; see :meth:`share`.
        prompt_lengths: ``[B]`` int64, tokens of each row that are its prompt; later ones count as generated.
            One tensor for as long as the state lives. See :meth:`end_prompt`.
        prompts: the same on the host.

    Tokens beyond ``lengths`` are whatever the last step wrote; not committing them is the rollback.
    """

    def __init__(
        self,
        stores: dict[str, torch.Tensor],
        windows: dict[str, int],
        batch: int,
        capacity: int,
        device: torch.device,
        packed: Sequence[PackedLayout] = (),
        fixed: bool = False,
        summaries: Sequence[SummaryLayout] = (),
        evicted: Sequence[EvictedLayout] = (),
    ) -> None:
        self.stores = stores
        self.windows = windows
        self.packed = tuple(packed)
        self.summaries = Summaries(summaries, batch)
        self.eviction = Eviction(evicted, stores, batch, capacity, device, fixed) if evicted else None
        # Stores that fill their pages at the same lengths: one of each kind says when any must pack.
        self._paces = {layout.pace: layout for layout in packed}
        self.batch, self.capacity = batch, capacity
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.known = [0] * batch
        self.prompt_lengths = torch.full_like(self.lengths, ENDLESS)
        self.prompts = [ENDLESS] * batch
        # Of each kind, tokens of every row that are in pages: what the stores' ``packed`` say.
        self._done = {pace: [0] * batch for pace in self._paces}
        self._furthest = 0
        self._step_tokens = MAX_STEP_TOKENS
        self._fixed = fixed
        self._tails: dict[str, torch.Tensor] = {}  # of decode steps, while a longer step has larger ones
        self.graphs: dict[Any, Any] = {}
        self._ahead = [0] * batch
        self.prefix = 0
        self._prefixes: Mapping[str, str] = {}

    def nbytes(self) -> int:
        """Bytes of all stores."""
        return sum(store.nbytes for store in self.stores.values())

    def pretend(self, length: int) -> None:
        """Look like a cache of ``length`` tokens a row, of no particular content: for timing."""
        for store in self.stores.values():
            # Pages that were never written are all one page of memory, which stays in a processor's cache.
            store.fill_(1)
        self.lengths.fill_(length)
        self.known = [length] * self.batch
        for layout in self.packed:
            self.stores[layout.roles["packed"]].fill_(layout.packable(length))
        self.summaries.pretend(length)
        if self.eviction is not None:
            self.eviction.pretend(length)
        self._done = {pace: [one.packable(length)] * self.batch for pace, one in self._paces.items()}

    def reset(self) -> None:
        """Forget everything: as good as a new state, at the same addresses."""
        self.lengths.zero_()
        for layout in self.packed:
            self.stores[layout.roles["packed"]].zero_()
        self.summaries.reset()
        if self.eviction is not None:
            self.eviction.reset()
        self.known = [0] * self.batch
        self._done = {pace: [0] * self.batch for pace in self._paces}
        self._furthest = 0
        self._ahead = [0] * self.batch
        self.prompt_lengths.fill_(ENDLESS)
        self.prompts = [ENDLESS] * self.batch
        self.shrink()  # a long step may have been interrupted

    def share(self, prefix: int, prefixes: Mapping[str, str]) -> None:
        """Rows share so many tokens; the stores that ``prefixes`` names begin after them.

        Args:
            prefixes: by the name of a store, that of the state ``[1, G, F, D]`` which holds its prefix.
        """
        self.prefix, self._prefixes = prefix, prefixes

    def begin_with(self, one: State) -> None:
        """Every row begins with the tokens of a state of one row: those of the shared prefix.

        The states that hold the prefix have them already; the others are copied.
        """
        elsewhere = {*self._prefixes, *self._prefixes.values()}
        for name, store in self.stores.items():
            if name not in elsewhere:
                store.copy_(one.stores[name].expand_as(store))
        self.lengths.copy_(one.lengths.expand_as(self.lengths))
        self.known = one.known * self.batch
        self._done = {pace: done * self.batch for pace, done in one._done.items()}
        self.summaries.pretend(self.prefix)  # those of its pages were copied
        if self.eviction is not None and one.eviction is not None:
            self.eviction.adopt(one.eviction)

    def commit(self, accepted: torch.Tensor, known: Sequence[int] | None = None) -> None:
        """Keep the first ``accepted[b]`` tokens of the last step (``[B]``); the rest is rolled back.

        Args:
            accepted: ``[B]`` int64 on the state's device.
            known: the same on the host; without it, ``accepted`` is read, which on a GPU waits for it.
        """
        self.lengths += accepted
        counts = accepted.tolist() if known is None else known
        self.known = [length + count for length, count in zip(self.known, counts, strict=True)]
        self.summaries.write(self.stores, self.known)  # packing takes away what they are made from
        if self.eviction is not None:
            self.eviction.commit(accepted, counts, self.known)
        for pace, one in self._paces.items():
            if any(one.packable(n) > done for n, done in zip(self.known, self._done[pace], strict=True)):
                self._pack()
                return

    def commit_path(
        self, path: torch.Tensor, accepted: torch.Tensor, known: Sequence[int] | None = None
    ) -> None:
        """Keep step tokens ``path[b, :accepted[b]]`` of a tree (``[B, P]``, ``[B]``), compacted.

        Paths ascend: a child comes after its parent in the step. ``path`` is read on the host: on the CPU
        it costs nothing. ``known`` is as in :meth:`commit`.
        """
        counts = accepted.tolist() if known is None else known
        for row, (count, nodes) in enumerate(zip(counts, path.tolist(), strict=True)):
            chosen, start = nodes[:count], self.known[row]
            if chosen == list(range(count)):
                continue
            moves = upload([[start + node for node in chosen], range(start, start + count)], path.device)
            for name in self.windows:
                store, before = self.stores[name], self.prefix if name in self._prefixes else 0
                origin, target = (moves.to(store.device) - before) % store.shape[2]
                store[row].index_copy_(1, target, store[row].index_select(1, origin))
            if self.eviction is not None:
                self.eviction.move(row, chosen, start)
        self.commit(accepted, counts)

    def rewind(self, tokens: Sequence[int]) -> None:
        """Take back the last ``tokens[b]`` committed tokens of each row, which the next step runs again.

        They are not packed: passes that ask for this keep so many newest tokens as they are.
        """
        self._furthest = max(self._furthest, *self.known)
        before = self.known
        self.known = [length - back for length, back in zip(self.known, tokens, strict=True)]
        if self.eviction is not None:
            self.eviction.rewind(before, self.known)
        self.lengths -= upload(list(tokens), self.lengths.device)
        self.summaries.cut(self.known)

    def truncate(self, lengths: torch.Tensor) -> None:
        """Forget everything after ``lengths[b]`` tokens (``[B]``).

        Of a packed page that is cut, the tokens that stay return to the tail as the codec kept them.

        Raises:
            CapacityError: a sliding-window store no longer holds what the shorter row would need, the row
                would end within the prefix that it shares, or tokens were evicted since.
        """
        self._furthest = max(self._furthest, *self.known)
        known = [min(pair) for pair in zip(self.known, lengths.tolist(), strict=True)]
        shortest = min(known)
        if shortest < self.prefix:
            raise CapacityError(
                f"cannot go back to {shortest} tokens: the rows share their first {self.prefix}",
                where="State.truncate",
                hint="start a new cache for the shorter sequence",
            )
        for name, window in self.windows.items():
            slots = slots_for(self.capacity, window)
            lost = self._furthest - slots
            if window and lost > max(0, shortest - window):
                raise CapacityError(
                    f"cannot go back to {shortest} tokens: {name} keeps the last {slots} of {self._furthest}",
                    where="State.truncate",
                    hint="start a new cache for the shorter sequence",
                )
        if self.eviction is not None:
            self.eviction.check_cut(self.known, known)
            self.eviction.cut(self.known, known)
        self.lengths.copy_(torch.minimum(self.lengths, lengths))
        self.known = known
        self.summaries.cut(known)
        if any(length < prompt < ENDLESS for length, prompt in zip(known, self.prompts, strict=True)):
            self.end_prompt([min(pair) for pair in zip(known, self.prompts, strict=True)])
        for layout in self.packed:
            layout.unpack(self.stores, known)
        for pace, one in self._paces.items():
            self._done[pace] = self.stores[one.roles["packed"]].tolist()

    def advance(self, tokens: Sequence[int]) -> None:
        """Let later steps read the first ``tokens[b]`` tokens of row b's last step, without committing them.

        Nothing is packed, summarized or evicted: that waits for the commit. With the steps that follow, a row
        stays within :meth:`room` and 64 tokens. :meth:`retreat` comes before anything else but such steps.
        """
        self._shift(tokens)
        self._ahead = [ahead + more for ahead, more in zip(self._ahead, tokens, strict=True)]

    def retreat(self) -> None:
        """Take back everything that :meth:`advance` let be read."""
        self._shift([-ahead for ahead in self._ahead])
        self._ahead = [0] * self.batch

    def _shift(self, tokens: Sequence[int]) -> None:
        shift = upload(list(tokens), self.lengths.device)
        self.lengths += shift
        self.known = [length + more for length, more in zip(self.known, tokens, strict=True)]
        if self.eviction is not None:
            self.eviction.shift(shift, tokens)

    def room(self) -> list[int]:
        """Tokens that each row may run in one step and see every page as steps of one token would.

        Rows stop before they pack their next page, and where newest tokens end that are always read; so
        speculation changes nothing. Without packed stores and selected pages there is no limit.
        """
        paces = self._paces.values()
        most = self.summaries.room(default=self.capacity)
        room = [min([most, *(one.room(length) for one in paces)]) for length in self.known]
        if self.eviction is None:
            return room
        return [min(n, self.eviction.room(row)) for row, n in enumerate(room)]

    @property
    def takes_short_steps(self) -> bool:
        """Whether the tails are those of decode steps, where graphs of such steps look for them."""
        is_large = self.eviction is not None and self.eviction.is_large
        return self._step_tokens == MAX_STEP_TOKENS and not is_large

    def begin_prompt(self, tokens: int) -> None:
        """A prompt of so many tokens a row is about to run; :meth:`shrink` ends it."""
        if self.eviction is not None:
            self.eviction.begin_prompt(tokens)

    @property
    def in_prompt(self) -> bool:
        """Whether the prompt has not ended."""
        return ENDLESS in self.prompts

    def end_prompt(self, prompts: Sequence[int] | None = None) -> None:
        """The first ``prompts[b]`` tokens of each row are its prompt, by default all that there are."""
        self.prompts = list(self.known if prompts is None else prompts)
        self.prompt_lengths.copy_(upload(self.prompts, self.lengths.device))

    def make_room(self, tokens: int) -> None:
        """Let the next step have ``tokens`` tokens a row; a decode or verification step always fits."""
        if self.eviction is not None:
            self.eviction.make_room(tokens)
        wanted = max(tokens, MAX_STEP_TOKENS)
        if wanted > self._step_tokens:
            if self._fixed and self._step_tokens == MAX_STEP_TOKENS:
                roles = [layout.roles["tail"] for layout in self.packed]
                self._tails = {name: self.stores[name] for name in roles}
            self._resize(wanted)

    def shrink(self) -> None:
        """Give back what a long step, or a prompt, needed."""
        if self.eviction is not None:
            self.eviction.end_prompt(self.known)
            self.eviction.shrink()
        if self._step_tokens != MAX_STEP_TOKENS:
            self._resize(MAX_STEP_TOKENS)

    def _resize(self, step_tokens: int) -> None:
        for layout in self.packed:
            into = self._tails.get(layout.roles["tail"]) if step_tokens == MAX_STEP_TOKENS else None
            layout.resize_tail(
                self.stores, self.known, step_tokens, packed=self._done[layout.pace], into=into
            )
        self._step_tokens = step_tokens
        if step_tokens == MAX_STEP_TOKENS:
            self._tails = {}

    def _pack(self) -> None:
        for layout in self.packed:
            layout.pack(self.stores, self.known, self._done[layout.pace])
        for pace, one in self._paces.items():
            pairs = zip(self._done[pace], self.known, strict=True)
            self._done[pace] = [max(done, one.packable(length)) for done, length in pairs]

    def _appended(self) -> list[torch.Tensor]:
        """The tensors that steps append to: token p in slot ``p % slots``."""
        return [self.stores[name] for name in self.windows]
