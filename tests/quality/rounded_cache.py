"""A rewrite that really loses something, for tests: what enters the cache is rounded to few levels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from graphwright.cost_model.target import Target, resolve_target
from graphwright.cost_model.workload import Workload
from graphwright.ir.canonicalize import canonicalize
from graphwright.ir.graph import Graph, argument
from graphwright.optimizer.capture import capture
from graphwright.passes.base import CostDelta, Fidelity, Pass, Site, Verdict
from graphwright.passes.place_cache import PlaceCache
from graphwright.runtime.lowering import LoweringOptions, lower
from graphwright.runtime.program import Program
from tests.architectures import POSITIONS, VOCAB, tiny_model

aten = torch.ops.aten


@dataclass(frozen=True)
class RoundCache(Pass):
    """Round keys and values to ``2 ** bits - 1`` levels of each head's largest element; not registered.

    ``legal`` refuses layers before ``first``.
    """

    name: ClassVar[str] = "round_cache"
    summary: ClassVar[str] = "round what is stored"
    fidelity: ClassVar[Fidelity] = "lossy"
    requires: ClassVar[frozenset[str]] = frozenset({"cache"})

    bits: int = 4
    first: int = 0

    def find(self, graph: Graph) -> list[Site]:
        """The appends of each layer."""
        layers: dict[str, list[torch.fx.Node]] = {}
        for node in graph.calls("cache_append"):
            store = argument(node, "store").meta["name"]
            layers.setdefault(store.rsplit(".", 1)[0], []).append(node)
        return [Site(name, tuple(nodes), {"layer": i}) for i, (name, nodes) in enumerate(layers.items())]

    def legal(self, site: Site) -> Verdict:
        """Any layer from the first one on."""
        return Verdict(site.info["layer"] >= self.first, "as the test wants it")

    def gain(self, site: Site, workload: Workload, target: Target) -> CostDelta:
        """Nothing: the rounded elements are stored in full."""
        return CostDelta()

    def apply(self, site: Site, graph: Graph) -> None:
        """``round(x / largest * levels) * largest / levels`` in front of each append."""
        levels = 2.0 ** (self.bits - 1) - 1
        for old in site.nodes:
            store, new, lengths, counts = old.args
            assert isinstance(new, torch.fx.Node)
            emit = partial(graph.emit, before=old)
            largest = emit(aten.amax.default, emit(aten.abs.default, new), [-1], True)
            step = emit(aten.div.Scalar, emit(aten.add.Scalar, largest, 1e-6), levels)
            whole = emit(aten.round.default, emit(aten.div.Tensor, new, step))
            rounded = emit(aten.mul.Tensor, whole, step)
            emit("cache_append", store, rounded, lengths, counts)
            graph.fx.erase_node(old)


class Lab:
    """A tiny model's exact graph, and a way to run graphs that counts how often it is asked."""

    def __init__(self, name: str = "llama", layers: int = 2, **options: object) -> None:
        # Weights large enough that the model has opinions: a flat distribution loses nothing.
        self.model = tiny_model(name, layers=layers, initializer_range=0.3, **options)  # type: ignore[arg-type]
        self.graph = capture(self.model)
        canonicalize(self.graph)
        PlaceCache(cut="kv")(self.graph, Workload(), resolve_target("h100"), force=True)
        self.lowered = 0

    def program(self, graph: Graph) -> Program:
        """Lower a graph, op by op."""
        self.lowered += 1
        return Program(
            lower(graph, self.model.device, LoweringOptions(compile=False)),
            config=self.model.config,
            device=self.model.device,
            dtype=self.model.dtype,
            vocab_size=VOCAB,
            max_positions=POSITIONS,
        )
