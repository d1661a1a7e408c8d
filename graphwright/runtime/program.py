"""The compiled program: one step over the cache, for every batch and number of tokens."""

from __future__ import annotations

import operator
import weakref
from functools import partial
from typing import Any, Literal

import torch

from graphwright.ir.depth_ops import PROMPT_LENGTHS
from graphwright.ir.errors import CapacityError, InputError
from graphwright.ir.prefix_ops import OWN_LENGTHS
from graphwright.runtime.allocation import Allocator
from graphwright.runtime.calls import StepCalls
from graphwright.runtime.depth import DynamicDepth
from graphwright.runtime.graphs import CudaGraphs, GraphBackend, StepGraphs, StepInputs, why_not_captured
from graphwright.runtime.lowering.lower import LoweredStep
from graphwright.runtime.residual import Visit
from graphwright.runtime.speculation.tree import MAX_TREE_TOKENS
from graphwright.runtime.state_pool import StatePool
from graphwright.runtime.storage import MAX_STEP_TOKENS, PREFILL_CHUNK, State, window_slack

Logits = Literal["last", "all"]


class Program:
    """Runs a lowered step.

    Args:
        step: the lowered graph.
        config: the model's configuration.
        device: where the program and its caches live.
        dtype: dtype of the logits.
        vocab_size: V.
        max_positions: most tokens of a sequence, or None if the model has no limit.
        graphs: records decode steps and replays them, where it is enabled for the device.
        draft: another lowered graph over the same caches, to draft with.

    Attributes:
        draft: the program that runs it, over states of this one; None without it.
        runs_ahead: a step is queued on the device, and the host need not wait for it.
        refresh: generated tokens between dense passes; 0 for none.
        graphs_off: why steps are not recorded on a device where they could be; None if they are, or if
            the device has no such thing.
        shared_prefix: tokens that the rows of a batch are promised to begin with, which are then stored once;
            0: whatever they share; None: the program shares nothing.

    Logits of a row do not depend on the other rows, nor on how many tokens the step has.
    """

    max_step_tokens = MAX_STEP_TOKENS

    def __init__(
        self,
        step: LoweredStep,
        *,
        config: Any,
        device: torch.device,
        dtype: torch.dtype,
        vocab_size: int,
        max_positions: int | None,
        graphs: GraphBackend | None = None,
        draft: LoweredStep | None = None,
    ) -> None:
        self.lowered = step
        self.config, self.device, self.dtype = config, device, dtype
        self.vocab_size, self.max_positions = vocab_size, max_positions
        self._calls = StepCalls(step)
        self._depth = DynamicDepth(step)
        self._allocator = Allocator(step, device, draft)
        self.shared_prefix = self._allocator.shared_prefix
        slacks = [window_slack(w) for w in self._allocator.windows.values() if w]
        self._chunk = min([step.prefill_chunk or PREFILL_CHUNK, *slacks])
        self._alive: weakref.WeakSet[State] = weakref.WeakSet()
        self.runs_ahead = device.type == "cuda"
        self.refresh = max((layout.refresh for layout in step.summaries), default=0)
        self.graphs_off: str | None = None
        self._graphs: GraphBackend | None = None
        graphs = CudaGraphs() if graphs is None else graphs
        if graphs.enabled(device):
            self.graphs_off = why_not_captured(bool(step.states), step.kernels, step.exit is not None)
            self._graphs = graphs if self.graphs_off is None else None
        self._pool = StatePool(max_positions)
        self.draft: Program | None = None
        if draft is not None:
            model = {"config": config, "vocab_size": vocab_size, "max_positions": max_positions}
            self.draft = Program(draft, device=device, dtype=dtype, graphs=graphs, **model)

    @property
    def prepared_bytes(self) -> int:
        """Storage that lowering made for folded parameters."""
        return self.lowered.prepared_bytes + (0 if self.draft is None else self.draft.prepared_bytes)

    @property
    def _records(self) -> bool:
        """Whether steps over a state are recorded: its tensors then have to stay where they are."""
        return self._graphs is not None or (self.draft is not None and self.draft._records)

    # --- the cache -------------------------------------------------------------------------------

    def allocate(self, batch: int, capacity: int, prefix: int = 0) -> State:
        """A fresh cache for ``batch`` rows of at most ``capacity`` tokens.

        Args:
            prefix: how many of them all rows share; :meth:`prefill` takes them from the first row's prompt.

        Raises:
            InputError: the program shares no prefix, or none that long.
        """
        state = self._allocator.allocate(batch, capacity, prefix, fixed=self._records)
        self._alive.add(state)
        return state

    def borrow(self, batch: int, capacity: int, prefix: int = 0) -> State:
        """An empty cache for one call, to be given back: one with captured steps if there is one.

        It may hold more than ``capacity`` tokens a row. ``prefix`` is as in :meth:`allocate`.
        """
        if not self._records:
            return self.allocate(batch, capacity, prefix)
        return self._pool.borrow(batch, capacity, partial(self.allocate, prefix=prefix), prefix)

    def give_back(self, state: State) -> None:
        """The end of a call that borrowed ``state``, in whatever condition it is."""
        if self._records:
            self._pool.give_back(state)

    def free_idle(self) -> bool:
        """Let go of the caches that are kept for later calls; whether there were any."""
        return self._pool.clear()

    def cache_bytes(self) -> int:
        """Bytes of all caches that are alive, those kept for later calls included."""
        return sum(state.nbytes() for state in self._alive)

    def cache_parts(self) -> dict[str, int]:
        """Bytes of the caches that are alive by part, if they have several; else empty."""
        summaries = self._allocator.summaries
        if not self.lowered.packed and not summaries:
            return {}
        kinds = ("stores", "pages", "tail", "first", *(("summaries",) if summaries else ()))
        parts = dict.fromkeys(kinds, 0)
        for state in self._alive:
            for name, held in state.stores.items():
                parts[self._allocator.part(name)] += held.nbytes
        return parts

    # --- running ---------------------------------------------------------------------------------

    @torch.no_grad()
    def step(
        self,
        state: State,
        tokens: torch.Tensor,
        counts: torch.Tensor,
        *,
        depth: torch.Tensor | None = None,
        tree: torch.Tensor | None = None,
        dense: torch.Tensor | None = None,
        logits: Logits = "all",
        skip: frozenset[int] = frozenset(),
        visit: Visit | None = None,
    ) -> torch.Tensor:
        """Run new tokens over the cache without committing them.

        Args:
            tokens: ``[B, T]`` int64; row b has ``counts[b]`` valid tokens, the rest is padding.
            counts: ``[B]`` int64.
            depth: ``[B, T]`` distance of each token from the last committed one, minus one; None: 0..T-1.
            tree: ``[B, T]`` int64 visibility bits, see ``cache_attention``; None: a chain.
            dense: ``[B]`` int64: the first ``dense[b]`` tokens of a row read everything, where pages are
                selected; None: no token does.
            logits: ``all`` gives ``[B, T, V]``, ``last`` gives ``[B, 1, V]`` of each row's last valid token.
            skip: layers to leave out, by number. They store nothing of these tokens, which therefore can be
                looked at only, not committed.
            visit: called with the residual stream after each layer that can be left out.

        Steps with ``skip`` or ``visit`` run without a recorded graph.

        Raises:
            CapacityError: the cache is too small; nothing was written.
            InputError: a tree of more tokens than its mask has bits, or a layer that cannot be left out.
        """
        width = tokens.shape[1]
        if tree is not None and width > MAX_TREE_TOKENS:
            raise InputError(
                f"a step with a tree takes at most {MAX_TREE_TOKENS} tokens a row, the last committed one "
                f"included; this one has {width}",
                where="Program.step",
                hint="verify smaller trees, or leave tree out for a chain",
            )
        if skip:
            self.lowered.blocks.check(skip, "Program.step")
        self._check_room(state, counts, width)
        state.make_room(width)
        layers = self._depth.inputs(state, counts, width)
        given = StepInputs(tokens, counts, depth, tree, logits == "last", dense, **layers)
        whole = not skip and visit is None
        if whole and self._graphs is not None and state.takes_short_steps and width <= MAX_STEP_TOKENS:
            return self._graphs_of(state).step(given)
        if not self.lowered.states:
            return self._run_whole(state, given, skip, visit)
        return self._run_step(state.stores, state.lengths, given, skip, visit)

    @torch.no_grad()
    def read_out(self, stream: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, T, V]``, were ``stream [B, T, H]`` the residual stream after the last layer.

        Raises:
            InputError: what follows the layers reads more than that.
        """
        return self._calls.read_out(stream)

    @torch.no_grad()
    def step_eagerly(self, state: State, tokens: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """:meth:`step` of a chain without a graph, all logits: for timing kernels one by one."""
        self._check_room(state, counts, tokens.shape[1])
        layers = self._depth.inputs(state, counts, tokens.shape[1])
        given = StepInputs(tokens, counts, None, None, False, **layers)
        return self._run_step(state.stores, state.lengths, given)

    @torch.no_grad()
    def prefill(self, state: State, tokens: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Run and commit right-padded prompts ``[B, T]``; logits ``[B, V]`` of each row's last token.

        Into an empty state with a shared prefix, the prefix runs once, as the first row has it.
        """
        if state.prefix and not any(state.known):
            self._begin(state, tokens[:1, : state.prefix])
            tokens, counts = tokens[:, state.prefix :], counts - state.prefix
        state.begin_prompt(tokens.shape[1])
        result: torch.Tensor | None = None
        wanted: list[int] = counts.tolist()
        for start in range(0, tokens.shape[1], self._chunk):
            chunk = tokens[:, start : start + self._chunk]
            width = chunk.shape[1]
            valid = (counts - start).clamp(0, width)
            self._check_room(state, valid, width)
            state.make_room(width)
            layers = self._depth.inputs(state, valid, width)
            given = StepInputs(chunk, valid, None, None, True, dense=valid, **layers)
            if self.lowered.states:
                logits = self._run_step(state.stores, state.lengths, given)[:, 0]
            else:
                logits = self._run_whole(state, given)[:, 0]
            result = logits if result is None else torch.where((valid > 0)[:, None], logits, result)
            state.commit(valid, [min(max(count - start, 0), width) for count in wanted])
        assert result is not None, "a prompt has at least one token"
        state.shrink()
        if state.in_prompt:
            state.end_prompt()
        return result

    def _begin(self, state: State, tokens: torch.Tensor) -> None:
        """Run a shared prefix ``[1, F]``: through a state of one row whose own stores are the prefix's."""
        one = self._allocator.first_row(state)
        self.prefill(one, tokens, torch.full((1,), tokens.shape[1], dtype=torch.int64, device=self.device))
        state.begin_with(one)

    def _graphs_of(self, state: State) -> StepGraphs:
        if self not in state.graphs:
            assert self._graphs is not None
            run = partial(self._run_step, state.stores, state.lengths)
            state.graphs[self] = StepGraphs(self._graphs, run, self.device, self._stop_capturing)
        graphs: StepGraphs = state.graphs[self]
        return graphs

    def _stop_capturing(self, reason: str) -> None:
        self.graphs_off, self._graphs = reason, None
        self._pool.clear()

    def _run_step(
        self,
        stores: dict[str, torch.Tensor],
        lengths: torch.Tensor,
        given: StepInputs,
        skip: frozenset[int] = frozenset(),
        visit: Visit | None = None,
    ) -> torch.Tensor:
        """Run a step over these tensors; reads no contents on the host and can be repeated."""
        tokens, counts, tree = given.tokens, given.counts, given.tree
        positions = self._positions(lengths, tokens.shape[1], given.depth)
        values = list(self.lowered.slots)
        named = {
            "input_ids": tokens.contiguous(),
            "positions": positions,
            "lengths": lengths,
            "counts": counts,
            "tree": tree if tree is not None else torch.empty_like(positions[:, :0]),
        }
        if "dense" in self.lowered.inputs:
            named["dense"] = given.dense if given.dense is not None else torch.zeros_like(counts)
        if PROMPT_LENGTHS in self.lowered.inputs:
            assert given.prompts is not None
            named[PROMPT_LENGTHS] = given.prompts
        prefix = next(iter(self._allocator.prefixes.values()), None)  # all are of one length
        if prefix is not None:
            named[OWN_LENGTHS] = lengths - stores[prefix].shape[2]
        for name, slot in self.lowered.inputs.items():
            values[slot] = named[name]
        for name, slot in self.lowered.states.items():
            values[slot] = stores[name]
        rows = (counts - 1).clamp_(min=0)[:, None] if given.last and tokens.shape[1] > 1 else None
        return self._calls.run(values, rows, skip | given.idle, visit, given.exits)

    def _run_whole(
        self,
        state: State,
        given: StepInputs,
        skip: frozenset[int] = frozenset(),
        visit: Visit | None = None,
    ) -> torch.Tensor:
        """A program without a cache: keep the tokens and run all of them."""
        tokens, counts = given.tokens, given.counts
        history = state.stores["input_ids"][:, 0, :, 0]
        total = int((state.lengths + counts).max())
        for row, (start, count) in enumerate(zip(state.lengths.tolist(), counts.tolist(), strict=True)):
            history[row, start : start + count] = tokens[row, :count]
        ids = history[:, :total]
        values = list(self.lowered.slots)
        values[self.lowered.inputs["input_ids"]] = ids.contiguous()
        positions = torch.arange(total, device=self.device).repeat(ids.shape[0], 1)
        values[self.lowered.inputs["positions"]] = positions
        column = torch.arange(tokens.shape[1], device=self.device)
        if given.last:
            column = (counts - 1).clamp(min=0)[:, None]
        rows = (state.lengths[:, None] + column).clamp(max=total - 1)
        return self._calls.run(values, rows, skip, visit)

    def _positions(self, lengths: torch.Tensor, tokens: int, depth: torch.Tensor | None) -> torch.Tensor:
        if depth is None:
            if tokens == 1:
                positions = lengths[:, None].clone()
            else:
                positions = lengths[:, None] + torch.arange(tokens, device=self.device)
        else:
            positions = lengths[:, None] + depth
        if self.max_positions is not None:  # padding must stay inside a table of positions
            positions.clamp_(max=self.max_positions - 1)
        return positions

    def _check_room(self, state: State, counts: torch.Tensor, tokens: int) -> None:
        limit = state.capacity
        if self.max_positions is not None:
            limit = min(limit, self.max_positions)
        if max(state.known) + tokens <= limit:
            return
        # Not every row need have as many: only now are the counts read from the device.
        needed = max(map(operator.add, state.known, counts.tolist()))
        if needed > limit:
            raise CapacityError(
                f"a sequence of {needed} tokens does not fit: the cache holds {state.capacity}, "
                f"the model {self.max_positions or 'any number of'} positions",
                where="Program.step",
                hint="allocate a larger cache, or shorten the prompt or max_new_tokens",
            )
