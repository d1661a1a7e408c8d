"""``decay_depth``: the further a row has been generated, the fewer layers its tokens use.

Generated token i uses ``floor(L * alpha^i)`` of L layers. Source: Fan et al. 2025, "Position-Aware Depth
Decay Decoding (D3)": the power law, and that the first and last layers (its core) stay while flexible ones of
the middle go. Ours: how many layers the core has, that the flexible ones nearest the middle go first,
``start`` as a number of tokens, and ``least``. (Without 6 layers of SmolLM2-135M's 30, prose loses 1.0 nats a
token if they go from the middle, 4.3 from the first flexible one up, and 10.2 from the last one down.)

Layers go in one order, so a later token uses a subset of the layers of every earlier one of its row. Hence
nothing has to stand in for keys and values that a token did not make: whoever uses a layer came before the
first token that passed it by, in a chain as in a tree of drafts, and sees only tokens that used it.

The decision is a token's own: it depends on how many tokens were generated before it. Prompts, ragged batches
and steps of several tokens compute what steps of single tokens would.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch.fx.node import Node

from graphwright.cost_model.graph_cost import GraphCost, graph_cost
from graphwright.cost_model.prediction import predict
from graphwright.cost_model.target import Target
from graphwright.cost_model.workload import Workload
from graphwright.ir.blocks import Block, find_blocks
from graphwright.ir.depth_ops import generated_index
from graphwright.ir.errors import PassError
from graphwright.ir.graph import Graph, layer_number, module_path
from graphwright.passes.base import CostDelta, Fidelity, Pass, Site, Verdict, register_pass

#: What rewrites a layer or its stores comes before what decides who uses the layer.
REWRITES = frozenset(
    {
        "skip_layers", "slide_attention", "place_cache", "absorb_projections", "rebuild_values",
        "predict_cache", "quantize_cache", "evict_tokens", "sparsify_attention", "sparsify_prefill",
        "share_prefix",
    }
)  # fmt: skip


@register_pass
@dataclass(frozen=True)
class DecayDepth(Pass):
    """Use fewer layers for later tokens.

    The planner does not try it: what it loses belongs to the whole program, and grows with the number of
    tokens that are generated, which the text that losses are measured on does not tell.

    Options:
        alpha: share of the layers that each further token keeps, between 0 and 1.
        start: generated tokens before the decay begins.
        first, last: layers at either end that every token uses.
        least: fewest layers that a token uses; 0 is ``first + last``.
    """

    name: ClassVar[str] = "decay_depth"
    summary: ClassVar[str] = "use fewer layers the more tokens were generated (D3)"
    fidelity: ClassVar[Fidelity] = "lossy"
    scope: ClassVar[Literal["site", "program"]] = "program"
    requires: ClassVar[frozenset[str]] = frozenset({"cache"})
    provides: ClassVar[frozenset[str]] = frozenset({"depth"})
    follows: ClassVar[frozenset[str]] = REWRITES

    alpha: float = 0.999
    start: int = 0
    first: int = 4
    last: int = 2
    least: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise PassError(
                f"alpha={self.alpha} is no share of the layers that stay",
                hint="give a number between 0 and 1, for example alpha=0.999",
            )
        for option in ("start", "first", "last", "least"):
            if getattr(self, option) < 0:
                raise PassError(f"{option}={getattr(self, option)} is negative", hint="give 0 or more")

    @classmethod
    def variants(cls) -> list[Pass]:
        """None: see the class."""
        return []

    def find(self, graph: Graph) -> list[Site]:
        blocks = find_blocks(graph)
        layers = blocks.layers
        info = {
            "graph": graph,
            "layers": len(layers),
            "blocks": {block.layer: block for block in blocks.of("whole")},
            "missing": {layer: why for (layer, part), why in blocks.missing.items() if part == "whole"},
            "limits": self.limits(layers),
        }
        return [Site("program", (), info)] if layers else []

    def legal(self, site: Site) -> Verdict:
        graph, limits, layers = site.info["graph"], site.info["limits"], site.info["layers"]
        if graph.calls("bypass"):
            return Verdict(False, "tokens pass layers by already")
        if not limits:
            return Verdict(False, f"every token uses all {layers} layers: {self._least(layers)} at least")
        for layer in limits:
            if layer in site.info["missing"]:
                return Verdict(False, f"layer {layer} cannot be left out: {site.info['missing'][layer]}")
        least = layers - len(limits)
        return Verdict(True, f"token i uses floor({layers} * {self.alpha}^i) layers, {least} at least")

    def gain(self, site: Site, workload: Workload, target: Target) -> CostDelta:
        limits, steps = site.info["limits"], max(workload.decode_steps, 1)
        # A layer's share of the steps that leave it out: step i, from 1, chooses generated token i.
        idle = {layer: 1 - min(limit, steps) / steps for layer, limit in limits.items()}
        cost = graph_cost(site.info["graph"])
        place: dict[str, Any] = {"batch": workload.batch, "context": workload.mean_context, "tokens": 1}
        saved = 0.0
        for layer, share in idle.items():
            own = {n: c for n, c in cost.by_node.items() if layer_number(module_path(n)) == layer}
            saved += share * predict(GraphCost(own, cost.groups), target, **place, phase="decode").seconds
        layers = site.info["layers"]
        note = f"{layers - sum(idle.values()):.1f} of {layers} layers on average over {steps:,} steps"
        return CostDelta(-saved, 0.0, note)

    def apply(self, site: Site, graph: Graph) -> None:
        limits: dict[int, int] = site.info["limits"]
        generated = generated_index(graph)
        # Beside it: alike layers stay alike, each reads a mask of its own.
        passing = {
            layer: graph.emit(torch.ops.aten.gt.Scalar, generated, limit, after=generated)
            for layer, limit in limits.items()
        }
        add_bypasses(graph, [site.info["blocks"][layer] for layer in sorted(limits)], passing)
        graph.annotations["depth"] = {str(layer): limit for layer, limit in limits.items()}

    # --- the rule --------------------------------------------------------------------------------

    def depth(self, index: int, layers: int) -> int:
        """Layers that the token uses which helps to choose generated token ``index``."""
        decayed = math.floor(layers * self.alpha ** max(index - self.start, 0))
        return max(decayed, min(self._least(layers), layers))

    def limits(self, layers: list[int]) -> dict[int, int]:
        """By layer that some tokens pass by, the last generated token that uses it.

        Args:
            layers: all, by number.
        """
        total = len(layers)
        flexible = layers[self.first : max(self.first, total - self.last)]
        # From the middle outwards; of two that are as far from it, the deeper one.
        order = sorted(range(len(flexible)), key=lambda at: (abs(2 * at + 1 - len(flexible)), -at))
        droppable = max(0, total - self._least(total))
        return {
            flexible[at]: self._last_user(total - place, total)
            for place, at in enumerate(order)
            if place < droppable
        }

    def _least(self, layers: int) -> int:
        return max(self.least, self.first + self.last)

    def _last_user(self, needed: int, layers: int) -> int:
        """The last token whose depth is at least ``needed``, which is above the least one."""
        guess = self.start + int(math.log(needed / layers) / math.log(self.alpha))
        while self.depth(guess, layers) >= needed:
            guess += 1
        while self.depth(guess, layers) < needed:
            guess -= 1
        return guess


def add_bypasses(graph: Graph, blocks: list[Block], passing: Mapping[int, Node]) -> None:
    """End each block in a ``bypass``.

    Args:
        blocks: whole layers, in order.
        passing: by layer, who passes it by, ``[B, T]`` bool.
    """
    replaced: dict[Node, Node] = {}
    for block in blocks:
        entry = replaced.get(block.entry, block.entry)
        joined = graph.emit("bypass", entry, block.exit, passing[block.layer], after=block.exit)
        block.exit.replace_all_uses_with(joined, delete_user_cb=lambda user, own=joined: user is not own)
        replaced[block.exit] = joined
