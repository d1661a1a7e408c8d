"""Lower a rewritten graph to a flat list of calls over numbered slots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx.node import Node

from graphwright.ir.graph import Graph
from graphwright.kernels.registry import REFERENCE
from graphwright.runtime.lowering.blocks import LoweredBlocks, lowered_blocks
from graphwright.runtime.lowering.compile import Runner, compile_piece, run_as_is
from graphwright.runtime.lowering.early_exit import LoweredExit, apart, exit_of, lowered_exit, rest_of
from graphwright.runtime.lowering.fold import Folded, fold_parameters
from graphwright.runtime.lowering.kernels import (
    KernelUse,
    expand_feed_forward,
    fuse_appends,
    fuse_rotary_appends,
    group_linears,
    select_kernels,
)
from graphwright.runtime.lowering.prefill import lower_prefill
from graphwright.runtime.lowering.rows import row_wise_input
from graphwright.runtime.lowering.split import Piece, split_layers
from graphwright.runtime.lowering.stream import packed_layouts, stream_reads
from graphwright.runtime.packed_storage import PackedLayout, packing_obstacle
from graphwright.runtime.page_summaries import SummaryLayout, summary_layouts

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class LoweringOptions:
    """How to lower.

    Attributes:
        compile: hand everything that is not a kernel to Inductor; otherwise it runs op by op.
    """

    compile: bool = True


@dataclass
class Made:
    """What lowering made of one graph and can use for another over the same parameters.

    Attributes:
        folded: parameter expressions.
        runners: pieces by their structure and by whether they were compiled.
    """

    folded: Folded = field(default_factory=Folded)
    runners: dict[Hashable, Runner] = field(default_factory=dict)


@dataclass
class LoweredStep:
    """One step as calls over slots.

    Attributes:
        inputs: slot of each graph input by name.
        states: slot of each state by name.
        state_nodes: its node, with shape and ``window`` in the metadata.
        calls: (function, input slots, output slots), in order.
        tail: index of the call after which only the wanted rows go on; None if rows cannot be cut.
        tail_slot: the slot ``[B, T, F]`` that is cut.
        result: slot of the logits.
        slots: the initial content of all slots: parameters, and None elsewhere.
        kernels: which implementation runs what.
        structures: distinct pieces, and pieces.
        prepared_bytes: storage made for folded parameters.
        compiled: whether the pieces went through Inductor.
        packed: the stores that are packed.
        summaries: of the pages that attention selects from.
        prefill_chunk: most tokens of a row in a step of a prompt; None where the plan does not say.
        draft_passes: of a draft program, what made its graph of the target's.
        blocks: the decoder layers that a step can leave out.
        depth: by layer that some tokens pass by, the last generated token that uses it.
        exit: where tokens can pass all further layers by, if they can.
    """

    inputs: dict[str, int]
    states: dict[str, int]
    state_nodes: dict[str, Node]
    calls: list[tuple[Runner, list[int], list[int]]]
    tail: int | None
    tail_slot: int | None
    result: int
    slots: list[Any]
    kernels: list[KernelUse]
    structures: tuple[int, int]
    prepared_bytes: int
    compiled: bool
    packed: list[PackedLayout] = field(default_factory=list)
    summaries: list[SummaryLayout] = field(default_factory=list)
    prefill_chunk: int | None = None
    draft_passes: tuple[str, ...] = ()
    blocks: LoweredBlocks = field(default_factory=LoweredBlocks)
    depth: dict[int, int] = field(default_factory=dict)
    exit: LoweredExit | None = None


def lower(
    graph: Graph,
    device: torch.device,
    options: LoweringOptions,
    progress: Progress | None = None,
    made: Made | None = None,
) -> LoweredStep:
    """Lower a copy of ``graph``; the graph itself stays as it is.

    Args:
        device: where the step runs; decides the kernels.
        progress: called with a label and the share that is done.
        made: of other graphs over the same parameters, for this device; takes what is made here.
    """
    made = Made() if made is None else made
    rest = None if exit_of(graph) is None else lower(rest_of(graph), device, options, progress, made)
    graph = graph.copy()
    expand_feed_forward(graph)
    prepared = fold_parameters(graph, made.folded)
    group_linears(graph)
    fuse_rotary_appends(graph, device)
    fuse_appends(graph)
    computed = stream_reads(graph)
    kernels = lower_prefill(graph, device, options.compile) + select_kernels(graph, device)
    if computed:
        reason = "keys and values are computed from a packed store, a tile at a time: no kernel does that"
        kernels.append(KernelUse("packed_attention", REFERENCE, computed, reason))
    pieces = split_layers(graph, apart(graph))
    runners = _runners(pieces, options, progress, made.runners)
    step = _assemble(graph, pieces, runners, rest)
    step.packed = packed_layouts(graph)
    step.summaries = summary_layouts(graph)
    step.prefill_chunk = graph.annotations.get("prefill_chunk")
    step.depth = {int(layer): limit for layer, limit in graph.annotations.get("depth", {}).items()}
    step.draft_passes = tuple(graph.annotations.get("draft_passes", ()))
    if device.type == "cuda":
        kernels += _packed_by_reference(step.packed)
    step.kernels, step.prepared_bytes = kernels, prepared
    distinct = len({piece.structure for piece in pieces})
    step.structures, step.compiled = (distinct, len(pieces)), options.compile
    return step


def _packed_by_reference(layouts: Sequence[PackedLayout]) -> list[KernelUse]:
    """Stores whose pages no kernel packs, by the reason: packing is no node of the graph."""
    reasons = Counter(packing_obstacle(str(layout.codec), layout.shape) for layout in layouts)
    return [KernelUse("pack pages", REFERENCE, n, reason) for reason, n in reasons.items() if reason]


def _runners(
    pieces: Sequence[Piece],
    options: LoweringOptions,
    progress: Progress | None,
    made: dict[Hashable, Runner],
) -> list[Runner]:
    missing = {piece.structure: piece for piece in pieces if (options.compile, piece.structure) not in made}
    for number, (structure, piece) in enumerate(missing.items()):
        if progress is not None:
            progress(f"compiling piece {number + 1} of {len(missing)}", number / len(missing))
        runner = compile_piece(piece) if options.compile else run_as_is(piece)
        made[options.compile, structure] = runner
    return [made[options.compile, piece.structure] for piece in pieces]


def _assemble(
    graph: Graph, pieces: list[Piece], runners: list[Runner], rest: LoweredStep | None
) -> LoweredStep:
    slot: dict[Node, int] = {}
    values: list[Any] = []

    def assign(node: Node, content: Any = None) -> int:
        slot[node] = len(values)
        values.append(content)
        return slot[node]

    inputs = {n.meta["name"]: assign(n) for n in graph.placeholders("input")}
    for node in graph.placeholders("parameter"):
        assign(node, graph.parameters[node.meta["name"]])
    state_nodes = {n.meta["name"]: n for n in graph.placeholders("state")}
    states = {name: assign(node) for name, node in state_nodes.items()}
    calls: list[tuple[Runner, list[int], list[int]]] = []
    for piece, runner in zip(pieces, runners, strict=True):
        calls.append((runner, [slot[n] for n in piece.inputs], [assign(n) for n in piece.outputs]))
    logits = graph.output.args[0]
    if isinstance(logits, tuple | list):
        logits = logits[0]
    assert isinstance(logits, Node)
    cut = row_wise_input(graph, pieces[-1]) if len(pieces) > 1 else None
    return LoweredStep(
        inputs=inputs,
        states=states,
        state_nodes=state_nodes,
        calls=calls,
        tail=len(calls) - 1 if cut is not None else None,
        tail_slot=slot[cut] if cut is not None else None,
        result=slot[logits],
        slots=values,
        kernels=[],
        structures=(0, 0),
        prepared_bytes=0,
        compiled=False,
        blocks=lowered_blocks(graph, pieces, slot),
        exit=None if rest is None else lowered_exit(graph, pieces, slot, rest),
    )
