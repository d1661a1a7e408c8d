"""From a plan to a program that runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from graphwright.ir.errors import InputError
from graphwright.ir.graph import Graph, value
from graphwright.optimizer.draft_program import draft_graph
from graphwright.optimizer.planner import Planned
from graphwright.optimizer.report import Decision, Status
from graphwright.passes.base import parse_pass
from graphwright.runtime.lowering import LoweredStep, LoweringOptions, Made, lower
from graphwright.runtime.program import Program


@dataclass
class Built:
    """A plan, and the program that it became.

    Attributes:
        planned: the plan with its rewritten graph.
        program: runs the graph.
        fallbacks: what runs on a slower implementation than planned.
        quality: what was measured of its loss, beside the exact program; empty for exact plans.
    """

    planned: Planned
    program: Program
    fallbacks: list[Decision] = field(default_factory=list)
    quality: dict[str, float] = field(default_factory=dict)

    @property
    def graph(self) -> Graph:
        """The rewritten graph."""
        return self.planned.graph

    @property
    def lossy(self) -> tuple[str, ...]:
        """The passes that change what the model computes."""
        return tuple(p for p in self.planned.plan.passes if parse_pass(p).fidelity == "lossy")

    @property
    def is_lossy(self) -> bool:
        """Whether there is one."""
        return bool(self.lossy)


def build(model: PreTrainedModel, planned: Planned) -> Built:
    """Lower a plan's graph over the model's weights."""
    program, fallbacks = build_program(model, planned.graph)
    return Built(planned, program, fallbacks)


def build_program(model: PreTrainedModel, graph: Graph) -> tuple[Program, list[Decision]]:
    """A plan's graph as a program, with its draft program if it drafts with one; and what fell back.

    Raises:
        PassError: the drafter cannot make its draft program of this graph.
    """
    drafts = draft_graph(graph)
    made = Made()
    step, fallbacks = lower_planned(graph, model.device, made)
    if drafts is None:
        return make_program(model, graph, step), fallbacks
    draft, more = lower_planned(drafts.graph, model.device, made)
    return make_program(model, graph, step, draft), fallbacks + more


def build_kernels(device: torch.device) -> None:
    """Build the C++ kernels where they can run; selection reports why where they cannot."""
    if device.type == "cpu":
        from graphwright.kernels.cpp.build import available

        available()


def lower_planned(
    graph: Graph, device: torch.device, made: Made | None = None
) -> tuple[LoweredStep, list[Decision]]:
    """Lower with Inductor if the plan says so; without a working compiler, op by op, and say so."""
    wanted = bool(graph.annotations.get("compile"))
    try:
        return lower(graph, device, LoweringOptions(compile=wanted), made=made), []
    except Exception as error:
        if not wanted:
            raise
        reason = f"Inductor failed, the program runs op by op: {str(error).strip().splitlines()[0][:200]}"
        step = lower(graph, device, LoweringOptions(compile=False), made=made)
        return step, [Decision("compile_layers", "", Status.FALLBACK, reason, None, None, "reordered")]


def make_program(
    model: PreTrainedModel, graph: Graph, step: LoweredStep, draft: LoweredStep | None = None
) -> Program:
    """The runnable program of a lowered graph, with another one to draft with."""
    logits = graph.output.args[0]
    first = logits[0] if isinstance(logits, tuple | list) else logits
    assert isinstance(first, torch.fx.Node)
    return Program(
        step,
        config=model.config,
        device=model.device,
        dtype=value(first).dtype,
        vocab_size=vocabulary(graph),
        max_positions=max_positions(model.config),
        draft=draft,
    )


def op_by_op(model: PreTrainedModel, graph: Graph) -> Program:
    """:func:`build_program` without compiling anything: for measuring what it computes, not its speed."""
    plain = graph.copy()
    plain.annotations["compile"] = False
    return build_program(model, plain)[0]


def vocabulary(graph: Graph) -> int:
    """V of the logits ``[B, T, V]``."""
    logits = graph.output.args[0]
    first = logits[0] if isinstance(logits, tuple | list) else logits
    if not isinstance(first, torch.fx.Node):
        raise InputError("the graph returns no logits")
    return int(value(first).shape[-1])


def max_positions(config: Any) -> int | None:
    """Most tokens of a sequence that the model was made for."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        found = getattr(text, name, None)
        if isinstance(found, int) and found > 0:
            return found
    return None
