"""What the alternatives take, layer by layer: seconds by the cost model, bytes, and what they lose."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from graphwright.cost_model.cost import Cost
from graphwright.cost_model.graph_cost import graph_cost
from graphwright.cost_model.prediction import predict
from graphwright.cost_model.stores import StoreSpec, cache_bytes, default_stores
from graphwright.ir.graph import Graph, layer_number, module_path
from graphwright.optimizer.choice import ProgramOption, SiteOption
from graphwright.optimizer.planner.alternatives import Alternative, ProgramChoice
from graphwright.optimizer.planner.layers import Layer, costs_by_layer
from graphwright.optimizer.planner.request import Request
from graphwright.optimizer.quality import Sensitivity
from graphwright.passes.base import Pass, StepShape


class StepPrices:
    """An alternative's step, split into its layers and the rest (embedding, head, what is in no layer).

    Args:
        alternative: whose step.
        graph: the alternative's, or what program-wide passes made of it.
        request: what is planned for.
        memo: of all steps: seconds by what they are priced by.
    """

    def __init__(
        self, alternative: Alternative, graph: Graph, request: Request, memo: dict[Any, float]
    ) -> None:
        self._request, self._memo, self.graph = request, memo, graph
        self._bytes: dict[int, float] = {}
        layers = {node: layer_number(module_path(node)) for node in graph.nodes}
        shown = {alternative.sample(layer) for layer in layers.values()}
        found = costs_by_layer(graph_cost(graph, only={n for n, layer in layers.items() if layer in shown}))
        self._parts = {layer: found.get(alternative.sample(layer), {}) for layer in {*layers.values()}}

    def seconds(self, layer: Layer, shape: StepShape) -> float:
        """Seconds of a layer (None: of what is in no layer) in a step of this shape, on average.

        A batch runs the longer step as soon as one of its rows drafts.
        """
        if layer not in self._parts:
            return 0.0
        if shape.tokens == 1:
            return self._at(layer, 1)
        drafting = 1 - (1 - shape.share) ** self._request.workload.batch
        return drafting * self._at(layer, shape.tokens) + (1 - drafting) * self._at(layer, 1)

    def _at(self, layer: Layer, tokens: int) -> float:
        workload = self._request.workload
        place: dict[str, Any] = {"batch": workload.batch, "context": workload.mean_context, "tokens": tokens}
        step_bytes = self._step_bytes(tokens)
        total = 0.0
        for group, cost in self._parts[layer].items():
            # Alike layers cost alike: each is priced once.
            key = (group, tokens, step_bytes, cost.key)
            if key not in self._memo:
                self._memo[key] = predict(
                    cost, self._request.target, **place, step_bytes=step_bytes, op=group
                ).seconds
            total += self._memo[key]
        return total

    def _step_bytes(self, tokens: int) -> float:
        if tokens not in self._bytes:
            workload = self._request.workload
            total = Cost.sum(cost for groups in self._parts.values() for cost in groups.values())
            values = total.at(batch=workload.batch, context=workload.mean_context, tokens=tokens)
            self._bytes[tokens] = values.bytes_read
        return self._bytes[tokens]


class PriceList:
    """Prices of all alternatives under all program choices.

    Args:
        alternatives: those that apply somewhere.
        choices: the program-wide ones.
        losses: by the exact part of a chain, what its lossy passes lose, by (site, pass string).
    """

    def __init__(
        self,
        alternatives: Sequence[Alternative],
        choices: Sequence[ProgramChoice],
        request: Request,
        losses: Mapping[str, Mapping[tuple[str, str], Sensitivity]],
    ) -> None:
        self.alternatives, self.choices, self._request, self._losses = alternatives, choices, request, losses
        self._memo: dict[Any, float] = {}
        self._steps: dict[tuple[int, tuple[Pass, ...]], StepPrices] = {}
        self._kept: dict[tuple[int, tuple[Pass, ...]], list[StoreSpec]] = {}
        self.layers = sorted({x for a in alternatives for x in a.layers}, key=lambda x: (x is not None, x))

    def sites(self) -> dict[str, list[SiteOption]]:
        """For each layer, each alternative that applies there."""
        options: dict[str, list[SiteOption]] = {}
        for layer in self.layers:
            found = [self._option(i, a, layer) for i, a in enumerate(self.alternatives) if layer in a.layers]
            # What breaks the model (an infinite loss) is no option.
            options[site_name(layer)] = [o for o in found if math.isfinite(o.kl + o.log_perplexity)]
        return options

    def programs(self, fixed_bytes: float) -> list[ProgramOption]:
        """The program-wide choices; ``fixed_bytes`` (weights, workspace) are kept whatever is chosen."""
        # What lies outside of the layers hardly differs between alternatives; the whole is priced again.
        options = []
        for choice in self.choices:
            seconds = choice.shape.draft_seconds
            if None not in self.layers:
                seconds += self._step(0, choice).seconds(None, choice.shape)
            options.append(ProgramOption(choice.name, seconds, choice.shape.tokens_per_step, fixed_bytes))
        return options

    def _option(self, index: int, alternative: Alternative, layer: Layer) -> SiteOption:
        seconds = {c.name: self._step(index, c).seconds(layer, c.shape) for c in self.choices}
        sample = alternative.sample(layer)
        kept = {c.name: self._kept_bytes(index, c, sample) for c in self.choices}
        lost = self._loss(alternative, layer)
        most = max(kept.values())
        return SiteOption(alternative.name, seconds, most, lost.kl, lost.log_perplexity, kept)

    def _loss(self, alternative: Alternative, layer: Layer) -> Sensitivity:
        """The sum over the chain's lossy passes and the layer's sites."""
        measured = self._losses.get(alternative.exact_name, {}).items()
        found: list[Sensitivity] = []
        for name in map(str, alternative.lossy):
            here = [loss for (site, text), loss in measured if text == name and layer_number(site) == layer]
            # What was not measured here is not known to be free.
            found += here or [Sensitivity(math.inf, math.inf)]
        return Sensitivity(sum(x.kl for x in found), sum(x.log_perplexity for x in found))

    def _step(self, index: int, choice: ProgramChoice) -> StepPrices:
        key = (index, choice.rewriting)
        if key not in self._steps:
            alternative = self.alternatives[index]
            graph = alternative.graph.copy() if choice.rewriting else alternative.graph
            for chosen in choice.rewriting:
                # What it gains is what is asked here, wherever it may apply.
                for site in chosen.find(graph):
                    if chosen.legal(site).ok:
                        chosen.apply(site, graph)
            self._steps[key] = StepPrices(alternative, graph, self._request, self._memo)
        return self._steps[key]

    def _kept_bytes(self, index: int, choice: ProgramChoice, layer: Layer) -> float:
        """What a layer keeps in memory."""
        key = (index, choice.rewriting)
        if key not in self._kept:
            self._kept[key] = default_stores(self._step(index, choice).graph)
        stores = [s for s in self._kept[key] if layer_number(s.name) == layer]
        return float(cache_bytes(stores, self._request.workload.batch, self._request.workload.capacity))


def site_name(layer: Layer) -> str:
    """How the choice names a layer."""
    return "program" if layer is None else f"layer {layer}"
