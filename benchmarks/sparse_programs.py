"""What ``sparse_quality.py`` runs: one dense pass over each text, and programs that go on from its cache.

Prompts of sparse programs run densely, so that their caches hold what the dense program's cache holds.
Texts run once, through a dense program that keeps its queries too; every other program gets a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics

import torch
from common import load_model, load_tokenizer

from graphwright.cost_model.target import resolve_target
from graphwright.cost_model.workload import Workload
from graphwright.ir.graph import Graph, argument, value
from graphwright.optimizer.build import build_kernels, op_by_op
from graphwright.optimizer.driver import capture_step
from graphwright.optimizer.quality.samples import StoreSamples
from graphwright.optimizer.quality.sentences import ending_tokens
from graphwright.passes.base import parse_pass
from graphwright.passes.place_cache import add_store, step_inputs
from graphwright.runtime.program import Program
from graphwright.runtime.storage import State

KV = "place_cache{cut=kv}"
#: Tokens of a step: fewer than what is always read of the newest ones, so that steps of one token would
#: read the same pages.
STEP = 16
_CALIBRATION = (8, 512)  # rows, tokens


@dataclass
class Rewritten:
    """A program, the graph that it is of, and what its passes said of the sites that they left alone."""

    graph: Graph
    program: Program
    left: str


@dataclass
class Dense:
    """Rows that ran through the dense program.

    Attributes:
        tokens: ``[B, n]`` int64, of equal length.
        state: keys ``[B, G, S, D]``, values and ``<keys>.queries [B, H, S, D]`` of every layer.
        context: the first tokens, which other programs begin with.
        logits: ``[B, n - context, V]`` of the others.
    """

    tokens: torch.Tensor
    state: State
    context: int
    logits: torch.Tensor
    masses: dict[tuple[int, int], dict[str, torch.Tensor]] = field(default_factory=dict)


class Bench:
    """The model, its graph, text to measure on, and the programs that passes make."""

    def __init__(self, folder: str, gguf: str | None, text: str | None) -> None:
        self.model = load_model(folder, gguf)
        build_kernels(self.model.device)
        self.graph, _ = capture_step(self.model)
        self.tokenizer = load_tokenizer(folder, gguf)
        names = sorted(topics)
        halves = ["\n\n".join(topics[name] for name in names[start::2]) for start in (0, 1)]
        rows, tokens = _CALIBRATION
        calibration = self.cut(halves[0], rows, tokens)
        self.text = Path(text).read_text() if text else halves[1]
        self.graph.samples = StoreSamples(
            lambda graph: op_by_op(self.model, graph),
            lambda: calibration,
            lambda: ending_tokens(self.tokenizer, self.model.config.vocab_size),
        )
        self._programs: dict[tuple[str, ...], Rewritten] = {}
        self.dense = self._dense()

    def ids(self, text: str) -> list[int]:
        """Token ids, without special ones."""
        found: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def cut(self, text: str, rows: int, tokens: int) -> list[list[int]]:
        """Rows of so many tokens, spread evenly over the text."""
        ids = self.ids(text[: 40 * rows * tokens])
        if len(ids) < rows * tokens:
            raise SystemExit(f"the text has {len(ids)} tokens, {rows * tokens} are needed")
        stride = len(ids) // rows
        return [ids[i * stride : i * stride + tokens] for i in range(rows)]

    def rewrite(self, passes: Sequence[str]) -> Rewritten:
        """The program after the passes, made once."""
        key = tuple(passes)
        if key not in self._programs:
            graph, left = self.graph.copy(), []
            for text in passes:
                records = parse_pass(text)(graph, Workload(), resolve_target("h100"), force=True)
                illegal = [r for r in records if r.status != "applied"]
                if illegal:
                    left.append(f"{text} left {len(illegal)} of {len(records)} sites: {illegal[0].reason}")
            self._programs[key] = Rewritten(graph, op_by_op(self.model, graph), "; ".join(left))
        return self._programs[key]

    def _dense(self) -> Rewritten:
        """The dense program, which keeps its queries in stores of their own."""
        graph = self.graph.copy()
        parse_pass(KV)(graph, Workload(), resolve_target("h100"), force=True)
        inputs = step_inputs(graph)
        for attention in graph.calls("cache_attention"):
            q, keys = argument(attention, "q"), argument(attention, "keys")
            _, heads, _, width = value(q).shape
            name = queries_of(keys.meta["name"])
            store = add_store(graph, name, int(heads), int(width), value(q), 0)
            graph.emit("cache_append", store, q, inputs["lengths"], inputs["counts"], before=attention)
        return Rewritten(graph, op_by_op(self.model, graph), "")

    def run_dense(self, rows: Sequence[Sequence[int]], context: int, room: int = 0) -> Dense:
        """Run rows of equal length densely: ``context`` tokens as a prompt, the others in steps."""
        program, tokens = self.dense.program, torch.tensor([list(row) for row in rows])
        state = program.allocate(len(rows), tokens.shape[1] + room)
        program.prefill(state, tokens[:, :context].contiguous(), torch.full((len(rows),), context))
        return Dense(tokens, state, context, run_steps(program, state, tokens[:, context:]))


def queries_of(keys: str) -> str:
    """The store of the queries that meet the keys of this store."""
    return f"{keys}.queries"


def run_steps(program: Program, state: State, tokens: torch.Tensor) -> torch.Tensor:
    """Run and commit tokens ``[B, n]`` in short steps; logits ``[B, n, V]``."""
    found = []
    for start in range(0, tokens.shape[1], STEP):
        part = tokens[:, start : start + STEP].contiguous()
        counts = torch.full((tokens.shape[0],), part.shape[1])
        found.append(program.step(state, part, counts))
        state.commit(counts)
    return torch.cat(found, dim=1) if found else torch.empty(0)


def adopt(made: Rewritten, dense: Dense, length: int, room: int) -> State:
    """A state of another program with the first ``length`` tokens of a dense one.

    Caches that evict do so as at the end of a prompt; packed ones cannot be copied, and run the prompt.
    """
    program, rows = made.program, dense.tokens.shape[0]
    state = program.allocate(rows, length + room)
    counts = torch.full((rows,), length)
    if made.program.lowered.packed:
        program.prefill(state, dense.tokens[:, :length].contiguous(), counts)
        return state
    state.begin_prompt(length)
    held = dense.state.stores
    for name, node in program.lowered.state_nodes.items():
        if node.meta.get("store", {}).get("role") == "tokens":
            state.stores[name][:, 0, :length, 0] = dense.tokens[:, :length]
        elif name in held:
            state.stores[name][:, :, :length] = held[name][:, :, :length]
    for layout in state.eviction.layouts if state.eviction is not None else ():
        if layout.ring is not None:
            ring = state.stores[layout.ring]
            newest = torch.arange(max(0, length - ring.shape[2]), length)
            ring[:, :, newest % ring.shape[2]] = held[queries_of(layout.keys)][:, :, newest]
    state.commit(counts)
    state.shrink()
    return state


def attention_mass(dense: Dense, page: int, first: int) -> dict[str, torch.Tensor]:
    """By store of keys, each page's share of the dense attention of every query after the context.

    Pages are those of :mod:`graphwright.ir.sparse_ops`; the last entry holds the tokens before ``first``.

    Returns:
        ``[B, H, t, N + 1]`` float32.
    """
    if (page, first) in dense.masses:
        return dense.masses[page, first]
    total = dense.tokens.shape[1]
    at = torch.arange(dense.context, total)
    number = torch.arange(total)
    entries = -(-(total - first) // page)
    entry = torch.where(number < first, entries, (number - first).clamp(min=0) // page)
    found = {}
    for name, queries in dense.state.stores.items():
        if not name.endswith(".queries"):
            continue
        keys = dense.state.stores[name.removesuffix(".queries")][:, :, :total].float()
        q = queries[:, :, dense.context : total].float()
        share = torch.zeros((*q.shape[:3], entries + 1))
        for row in range(q.shape[0]):
            whole = keys[row].repeat_interleave(q.shape[1] // keys.shape[1], dim=0)
            scores = q[row] @ whole.transpose(1, 2) * q.shape[3] ** -0.5
            scores.masked_fill_(number > at[:, None], float("-inf"))
            share[row].index_add_(2, entry, scores.softmax(-1))
        found[name.removesuffix(".queries")] = share
    dense.masses[page, first] = found
    return found
