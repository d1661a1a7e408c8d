"""Dynamic depth: tokens of one step that use different layers.

A layer that some tokens pass by ends in :func:`bypass`, which hands on its input for them and its output for
the others. Which tokens pass by is computed in the step, token by token, from what was generated before them
or, by :func:`exits`, from how sure the model is; so a token's depth depends neither on the other rows nor on
how many tokens the step has. What of a layer no token uses need not run; the runtime leaves out what it can
(:mod:`graphwright.runtime.depth`).
"""

from __future__ import annotations

import torch
from torch.fx.node import Node

from graphwright.ir.graph import Graph, value
from graphwright.ir.ops import semantic_op

#: The graph input that says how many tokens of each row are its prompt, ``[B]`` int64; those behind count as
#: generated.
PROMPT_LENGTHS = "prompt_lengths"
#: Prompt length of a row whose prompt has not ended: no token counts as generated.
ENDLESS = 2**40


def _bypass_fake(entry, exit, passing):  # type: ignore[no-untyped-def]
    return torch.empty_like(entry, memory_format=torch.contiguous_format)


@semantic_op("bypass(Tensor entry, Tensor exit, Tensor passing) -> Tensor", fake=_bypass_fake)
def bypass(entry: torch.Tensor, exit: torch.Tensor, passing: torch.Tensor) -> torch.Tensor:
    """What goes on behind a layer: its input where a token passes by, its output elsewhere.

    Args:
        entry, exit: ``[B, T, H]`` before and after the layer.
        passing: ``[B, T]`` bool.

    Returns:
        ``[B, T, H]``, contiguous.
    """
    return torch.where(passing[:, :, None], entry, exit).contiguous()


#: What :func:`exits` compares: the largest probability, or by how much it exceeds the next one.
MEASURES = ("top", "margin")


@semantic_op(
    "exits(Tensor stream, Tensor logits, Tensor generated, Tensor counts, float threshold, str measure) "
    "-> Tensor",
    fake=lambda stream, logits, generated, counts, threshold, measure: torch.empty_like(
        generated, dtype=torch.bool
    ),
)
def exits(
    stream: torch.Tensor,
    logits: torch.Tensor,
    generated: torch.Tensor,
    counts: torch.Tensor,
    threshold: float,
    measure: str,
) -> torch.Tensor:
    """Which tokens need no more layers, as their next token is sure enough already.

    Args:
        stream: ``[B, T, H]`` from which the logits were computed; says where in the graph tokens exit.
        logits: ``[B, T, V]``.
        generated: ``[B, T]`` int64; of a prompt, whose tokens have numbers below 1, nothing exits.
        counts: ``[B]`` valid tokens of each row.
        threshold: 0 to 1.
        measure: one of :data:`MEASURES`.

    Returns:
        ``[B, T]`` bool; True for padding, which needs nothing.
    """
    best = torch.softmax(logits.float(), dim=-1).topk(min(2, logits.shape[-1]), dim=-1).values
    sure = best[..., 0] - best[..., -1] if measure == "margin" else best[..., 0]
    padding = torch.arange(generated.shape[1], device=generated.device) >= counts[:, None]
    return (sure >= threshold) & (generated > 0) | padding


def generated_index(graph: Graph) -> Node:
    """Which generated token each token of the step helps to choose, ``[B, T]`` int64.

    The last token of a prompt chooses token 0, those before it have negative numbers; the first token that is
    fed back chooses token 1. The nodes come before all other calls, and belong to no layer.
    """
    positions, prompts = graph.placeholder("positions"), _prompt_lengths(graph)
    first = next(node for node in graph.nodes if node.op == "call_function")
    column = graph.emit(torch.ops.aten.unsqueeze.default, prompts, 1, before=first)
    behind = graph.emit(torch.ops.aten.sub.Tensor, positions, column, before=first)
    generated = graph.emit(torch.ops.aten.add.Scalar, behind, 1, before=first)
    for node in (column, behind, generated):
        node.meta.pop("nn_module_stack", None)
    return generated


def _prompt_lengths(graph: Graph) -> Node:
    """The graph input :data:`PROMPT_LENGTHS`, added when missing."""
    inputs = graph.placeholders("input")
    for node in inputs:
        if node.meta["name"] == PROMPT_LENGTHS:
            return node
    with graph.fx.inserting_after(inputs[-1]):
        node = graph.fx.placeholder(PROMPT_LENGTHS)
    with graph.fake_mode:
        fake = torch.empty_like(value(graph.placeholder("lengths")))
    node.meta.update(kind="input", name=PROMPT_LENGTHS, val=fake)
    return node
