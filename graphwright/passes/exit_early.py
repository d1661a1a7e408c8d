"""``exit_early``: tokens that are sure of their next token half-way up pass the remaining layers by.

Behind a layer, the model's own last norm and head read the residual stream. A token whose distribution is
sure enough exits: the stream that it has there is what the head reads in the end. Later tokens attend to it
in every layer all the same: above the exit, its keys and values are computed from the stream that it left
with.
Source: Schuster et al. 2022, "Confident Adaptive Language Modeling" (CALM): the last hidden state stands for
the missing ones above, and the gap between the two best probabilities is the measure (here ``margin``). There
models are trained to exit, behind any layer; here it is one layer of a model as it is.

The decision is a token's own, so prompts, ragged batches and steps of several tokens compute what steps of
single tokens would. Time is saved where every token of a step exits: the layers above then only write keys
and values. The host has to know, and reads one number a step: a GPU is waited for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch.fx.node import Node

from graphwright.cost_model.graph_cost import GraphCost, graph_cost
from graphwright.cost_model.prediction import predict
from graphwright.cost_model.target import Target
from graphwright.cost_model.workload import Workload
from graphwright.ir.blocks import Block, find_blocks
from graphwright.ir.depth_ops import MEASURES, generated_index
from graphwright.ir.errors import PassError
from graphwright.ir.graph import Graph, ancestors, is_impure, layer_number, module_path
from graphwright.passes.base import CostDelta, Fidelity, Pass, Site, Verdict, register_pass
from graphwright.passes.decay_depth import REWRITES, add_bypasses


@register_pass
@dataclass(frozen=True)
class ExitEarly(Pass):
    """Let sure tokens exit behind a layer.

    The planner does not try it: how many tokens exit, and what that loses, depends on the text.

    Options:
        layer: the last layer that every token uses.
        threshold: how sure a token has to be, 0 to 1.
        measure: ``top``, the largest probability; ``margin``, by how much it exceeds the next one.
        rate: share of the tokens that exit, for the price: an assumption.
    """

    name: ClassVar[str] = "exit_early"
    summary: ClassVar[str] = "let tokens that are sure of the next one pass the upper layers by (CALM)"
    fidelity: ClassVar[Fidelity] = "lossy"
    scope: ClassVar[Literal["site", "program"]] = "program"
    requires: ClassVar[frozenset[str]] = frozenset({"cache"})
    provides: ClassVar[frozenset[str]] = frozenset({"depth"})
    follows: ClassVar[frozenset[str]] = REWRITES

    layer: int = 20
    threshold: float = 0.9
    measure: str = "top"
    rate: float = 0.5

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise PassError(f"layer={self.layer} is no layer", hint="give its number, from 0")
        for option in ("threshold", "rate"):
            if not 0 <= getattr(self, option) <= 1:
                raise PassError(f"{option}={getattr(self, option)} is out of range", hint="give 0 to 1")
        if self.measure not in MEASURES:
            raise PassError(
                f"exit_early has no measure {self.measure!r}", hint=f"choose one of {', '.join(MEASURES)}"
            )

    @classmethod
    def variants(cls) -> list[Pass]:
        """None: see the class."""
        return []

    def find(self, graph: Graph) -> list[Site]:
        blocks = find_blocks(graph)
        info = {
            "graph": graph,
            "layers": blocks.layers,
            "blocks": {block.layer: block for block in blocks.of("whole")},
            "missing": {layer: why for (layer, part), why in blocks.missing.items() if part == "whole"},
        }
        return [Site("program", (), info)] if blocks.layers else []

    def legal(self, site: Site) -> Verdict:
        graph, layers = site.info["graph"], site.info["layers"]
        if graph.calls("bypass"):
            return Verdict(False, "tokens pass layers by already")
        if self.layer not in layers[:-1]:
            return Verdict(False, f"there is no layer {self.layer} with another one above it")
        for layer in (self.layer, *self._above(site)):
            if layer in site.info["missing"]:
                return Verdict(False, f"layer {layer} cannot be left out: {site.info['missing'][layer]}")
        head, below = self._head(site), _until(site.info["blocks"][self.layer].exit)
        read = {read for node in head for read in node.all_input_nodes} - {*head, self._end(site)}
        if any(map(is_impure, head)) or any(n.op == "call_function" and n not in below for n in read):
            return Verdict(False, "what follows the layers reads more than the last one's result")
        above, sure = len(self._above(site)), f"{self.measure} >= {self.threshold}"
        return Verdict(True, f"tokens of {sure} behind layer {self.layer} use {above} layers less")

    def gain(self, site: Site, workload: Workload, target: Target) -> CostDelta:
        graph, above = site.info["graph"], set(self._above(site))
        cost = graph_cost(graph)
        place: dict[str, Any] = {"batch": workload.batch, "context": workload.mean_context, "tokens": 1}

        def seconds(nodes: set[Node]) -> float:
            own = GraphCost({n: c for n, c in cost.by_node.items() if n in nodes}, cost.groups)
            return predict(own, target, **place, phase="decode").seconds

        own = {n for n in graph.nodes if layer_number(module_path(n)) in above}
        kept = ancestors([n for n in own if n.op == "call_function" and is_impure(n)])
        saved, head = seconds(own - kept), seconds(set(self._head(site)))
        everybody = self.rate**workload.batch
        note = (
            f"if {self.rate:.0%} of the tokens exit, {everybody:.0%} of the steps save {saved * 1e3:.3g} ms, "
            f"and the others take {head * 1e3:.3g} ms more for the exit's head"
        )
        # Where all exit, the logits behind the exit are those of the step.
        return CostDelta((1 - everybody) * head - everybody * saved, 0.0, note)

    def apply(self, site: Site, graph: Graph) -> None:
        block: Block = site.info["blocks"][self.layer]
        stream, anchor = block.exit, block.exit.next
        logits = _copied(graph, self._logits(graph), {self._end(site): stream}, self._head(site), anchor)
        generated = generated_index(graph)
        passing = graph.emit(
            "exits", stream, logits, generated, graph.placeholder("counts"), self.threshold, self.measure,
            before=anchor,
        )  # fmt: skip
        above = self._above(site)
        add_bypasses(graph, [site.info["blocks"][layer] for layer in above], dict.fromkeys(above, passing))

    def _above(self, site: Site) -> list[int]:
        return [layer for layer in site.info["layers"] if layer > self.layer]

    def _end(self, site: Site) -> Node:
        """The stream behind the last layer."""
        end: Node = site.info["blocks"][site.info["layers"][-1]].exit
        return end

    def _head(self, site: Site) -> list[Node]:
        """The calls behind the layers that give the logits, in order."""
        graph, end = site.info["graph"], self._end(site)
        needed = ancestors([self._logits(graph)])
        found: list[Node] = []
        behind = False
        for node in graph.nodes:
            if behind and node in needed and node.op == "call_function":
                found.append(node)
            behind = behind or node is end
        return found

    @staticmethod
    def _logits(graph: Graph) -> Node:
        return graph.output.all_input_nodes[0]


def _until(node: Node) -> set[Node]:
    """The nodes up to this one."""
    found = {node}
    while (node := node.prev).op != "root":
        found.add(node)
    return found


def _copied(graph: Graph, root: Node, mapping: dict[Node, Node], nodes: list[Node], before: Node) -> Node:
    """``root``, computed again by copies of ``nodes`` (in order) with the mapped nodes replaced."""
    for node in nodes:
        with graph.fx.inserting_before(before):
            copy = graph.fx.node_copy(node, lambda n: mapping.get(n, n))
        copy.meta = dict(node.meta)
        mapping[node] = copy
    return mapping[root]
