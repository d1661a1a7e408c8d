"""Which blocks to skip first: by place, by how little they turn the stream, or by what the text loses.

- ``angular``: the angle between what a block reads and what it hands on, ``arccos(x . y / |x||y|) / pi``, on
  average over the calibration text; the smallest first. Source: Gromov et al. 2024, "The Unreasonable
  Ineffectiveness of the Deeper Layers"; there for a run of neighbouring layers and at the last token of each
  text. For one layer at a time, by 1 - cosine over all tokens: Men et al. 2024, "ShortGPT". Measured once.
- ``trim``: the block without which the calibration text stays likeliest goes; then the same again with those
  that are left. Source: Hu et al. 2024, "TrimLLM" (calibration scanning). There accuracy on a task decides,
  activation norms break ties, and training goes on between two drops; here the likelihood decides, and
  nothing is trained. Each drop runs the text once for every block that is left.
- ``middle``: neighbours around the middle of the model. No data; the choice is ours, after S3D (Zhong and
  Bharadwaj 2024), which skips middle layers to draft.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch.fx.node import Node

from graphwright.ir.blocks import Block, Part, find_blocks, skip_blocks
from graphwright.ir.errors import PassError
from graphwright.ir.graph import Graph, value
from graphwright.passes.place_cache import PlaceCache, add_store, step_inputs

aten = torch.ops.aten


@runtime_checkable
class RunsText(Protocol):
    """A source of samples (``Graph.samples``) that also runs its text through programs that differ."""

    def fresh(self, graph: Graph) -> Mapping[str, torch.Tensor]:
        """What each store of ``graph`` holds after the text, ``[B, G, tokens, D]``; not kept."""

    def loss(self, graph: Graph) -> float:
        """Mean negative log likelihood of the text's tokens in nats."""


@dataclass(frozen=True)
class Choice:
    """A block to skip, and why this one."""

    block: Block
    reason: str


def middle(blocks: Sequence[Block], count: int) -> list[Choice]:
    """``count`` neighbours around the middle."""
    start = (len(blocks) - count) // 2
    return [Choice(block, "in the middle of the model") for block in blocks[start : start + count]]


def smallest_angles(graph: Graph, blocks: Sequence[Block], count: int) -> list[Choice]:
    """The ``count`` blocks that turn the stream least on the calibration text."""
    angles = measure_angles(graph, blocks[0].part, text_of(graph, "angular"))
    ranked = sorted(blocks, key=lambda block: (angles[block.layer], block.layer))
    most = f"on the calibration text, where the most is {max(angles.values()):.3f} pi"
    return [
        Choice(block, f"it turns the stream by {angles[block.layer]:.3f} pi {most}")
        for block in ranked[:count]
    ]


def least_missed(graph: Graph, blocks: Sequence[Block], count: int) -> list[Choice]:
    """``count`` blocks, each the one without which, and without those before it, the text is likeliest."""
    source, part = text_of(graph, "trim"), blocks[0].part
    left, before = {block.layer: block for block in blocks}, with_cache(graph)
    chosen: list[Choice] = []
    for drop in range(1, count + 1):
        trials = {layer: _without(before, part, layer) for layer in left}
        losses = {layer: source.loss(trial) for layer, trial in trials.items()}
        best = min(losses, key=lambda layer: (math.isnan(losses[layer]), losses[layer], layer))
        reason = f"drop {drop}: without it the calibration text takes {losses[best]:.4g} nats a token"
        chosen.append(Choice(left.pop(best), f"{reason}, without the worst {max(losses.values()):.4g}"))
        before = trials[best]
    return chosen


def text_of(graph: Graph, order: str) -> RunsText:
    """The calibration text.

    Raises:
        PassError: there is none.
    """
    if isinstance(graph.samples, RunsText):
        return graph.samples
    raise PassError(
        f"order={order} needs calibration text, and there is none",
        where="skip_layers",
        hint="order=middle needs none; or name the layers, layers=10-14",
    )


def with_cache(graph: Graph) -> Graph:
    """A copy in which every attention has a cache, as running text needs it.

    Raises:
        PassError: an attention cannot have one.
    """
    copy, place = graph.copy(), PlaceCache(cut="kv")
    for site in place.find(copy):
        verdict = place.legal(site)
        if not verdict.ok:
            raise PassError(f"the calibration text cannot run: {verdict.reason}", where=site.name)
        place.apply(site, copy)
    copy.eliminate_dead_code()
    return copy


def measure_angles(graph: Graph, part: Part, source: RunsText) -> dict[int, float]:
    """By layer, how far its block turns the stream on the text: 0 not at all, 1 around."""
    probe = with_cache(graph)
    blocks = find_blocks(probe).of(part)
    for block in blocks:
        _store_angle(probe, block)
    content = source.fresh(probe)
    return {block.layer: float(content[_name(block)].double().mean()) for block in blocks}


def _without(graph: Graph, part: Part, layer: int) -> Graph:
    trial = graph.copy()
    skip_blocks(trial, [block for block in find_blocks(trial).of(part) if block.layer == layer])
    trial.drop_unused_placeholders()
    return trial


def _name(block: Block) -> str:
    return f"{block.name}.angle"


def _store_angle(graph: Graph, block: Block) -> None:
    """Keep each token's angle between what a block reads and what it hands on, in units of pi."""
    last = block.exit if block.contribution is None else block.contribution
    place = last.next
    after = block.exit
    if block.contribution is not None:
        after = graph.emit(aten.add.Tensor, block.entry, block.contribution, before=place)
    x, y = (
        graph.emit(aten._to_copy.default, n, dtype=torch.float32, before=place) for n in (block.entry, after)
    )

    def dot(a: Node, b: Node) -> Node:
        product = graph.emit(aten.mul.Tensor, a, b, before=place)
        return graph.emit(aten.sum.dim_IntList, product, [-1], True, before=place)

    sizes = graph.emit(aten.mul.Tensor, dot(x, x), dot(y, y), before=place)
    sizes = graph.emit(
        aten.sqrt.default, graph.emit(aten.clamp.default, sizes, 1e-30, before=place), before=place
    )
    cosine = graph.emit(aten.div.Tensor, dot(x, y), sizes, before=place)
    cosine = graph.emit(aten.clamp.default, cosine, -1.0, 1.0, before=place)
    angle = graph.emit(aten.acos.default, cosine, before=place)
    angle = graph.emit(
        aten.unsqueeze.default, graph.emit(aten.div.Tensor, angle, math.pi, before=place), 1, before=place
    )
    inputs = step_inputs(graph)
    store = add_store(graph, _name(block), 1, 1, value(angle), 0)
    graph.emit("cache_append", store, angle, inputs["lengths"], inputs["counts"], before=place)
