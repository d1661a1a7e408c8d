"""Rewritten graphs as programs, compared with the stock model step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from graphwright.cost_model.target import resolve_target
from graphwright.cost_model.workload import Workload
from graphwright.ir.graph import Graph
from graphwright.ir.verifier import verify
from graphwright.passes.base import SiteRecord, parse_pass
from graphwright.runtime.lowering import LoweringOptions, lower
from graphwright.runtime.program import Program
from tests.architectures import POSITIONS, VOCAB

WORKLOAD, TARGET = Workload(), resolve_target("h100")


def rewrite(captured: Any, *passes: str) -> tuple[Graph, list[SiteRecord]]:
    """A copy of the canonical graph after the passes, applied wherever they are legal, and their records."""
    graph = captured.canonical.copy()
    records: list[SiteRecord] = []
    for text in passes:
        records += parse_pass(text)(graph, WORKLOAD, TARGET, force=True)
        verify(graph, deep=True)
    return graph, records


def program(model: PreTrainedModel, graph: Graph) -> Program:
    """Run a graph op by op."""
    return Program(
        lower(graph, model.device, LoweringOptions(compile=False)),
        config=model.config,
        device=model.device,
        dtype=model.dtype,
        vocab_size=VOCAB,
        max_positions=POSITIONS,
    )


def largest_difference(
    model: PreTrainedModel,
    runs: Program,
    prompts: Sequence[int] = (30, 17, 1),
    steps: Sequence[int] = (1, 3, 8, 1, 5),
) -> float:
    """The largest difference of logits from stock: a ragged prefill, then steps that lose their last token.

    Args:
        prompts: tokens of each row's prompt.
        steps: tokens per step; all but the last one are committed (one if there is only one).
    """
    total = max(prompts) + sum(steps)
    ids = torch.randint(3, VOCAB, (len(prompts), total))
    with torch.no_grad():
        stock = model(ids).logits
    state = runs.allocate(len(prompts), total)
    counts = torch.tensor(prompts)
    first = runs.prefill(state, ids[:, : max(prompts)], counts)
    differences = [first - stock[torch.arange(len(prompts)), counts - 1]]
    for tokens in steps:
        starts = state.lengths.tolist()
        fed = torch.stack([ids[row, at : at + tokens] for row, at in enumerate(starts)])
        if tokens > 1:  # what is rolled back must leave no trace
            fed = torch.cat([fed[:, :-1], torch.full_like(fed[:, :1], 5)], dim=1)
        logits = runs.step(state, fed, torch.full((len(prompts),), tokens))
        kept = max(1, tokens - 1)
        differences += [logits[row, :kept] - stock[row, at : at + kept] for row, at in enumerate(starts)]
        state.commit(torch.full((len(prompts),), kept))
    return max(float(difference.abs().max()) for difference in differences)
