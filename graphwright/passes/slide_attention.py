"""``slide_attention``: let layers attend to a sliding window of their past, and store no more than that.

A layer with a window keeps it as a ring, with slack for a step (docs/architecture.md, the cache cut): memory
and reading stop growing with the context. Source: "Super Apriel: One Checkpoint, Many Speeds", which chooses
for each layer between full attention, a sliding window and others. Its windows were trained; here a model
gets windows that was trained without, so that a layer loses what lies behind its own.

First tokens do not stay: a ring has no place for them. ``evict_tokens{method=recent}`` keeps them beside the
newest (Xiao et al. 2023, StreamingLLM).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx.node import Node

from graphwright.cost_model.cost import CACHE, B, C, Cost
from graphwright.cost_model.prediction import predict
from graphwright.cost_model.stores import window_slack
from graphwright.cost_model.target import Target
from graphwright.cost_model.workload import Workload
from graphwright.ir.errors import PassError
from graphwright.ir.graph import Graph, argument, module_path, op_name, value
from graphwright.passes.base import CostDelta, Fidelity, Pass, Site, Verdict, register_pass
from graphwright.passes.place_cache import store_slots

MOST = 2**20


@register_pass
@dataclass(frozen=True)
class SlideAttention(Pass):
    """Give attention a sliding window.

    In a list with ``place_cache`` it comes first, and any cut then stores the window only. The planner puts
    it on top of stores of keys and values.

    Options:
        window: tokens that a query sees, itself included.
    """

    name: ClassVar[str] = "slide_attention"
    summary: ClassVar[str] = "attend to a sliding window and store no more than that"
    fidelity: ClassVar[Fidelity] = "lossy"
    needs_context: ClassVar[bool] = True

    window: int = 512

    def __post_init__(self) -> None:
        if not 1 <= self.window <= MOST:
            raise PassError(f"window={self.window} is not a number of tokens", hint=f"give 1 to {MOST}")

    @classmethod
    def variants(cls) -> list[Pass]:
        """What the planner tries: one window, as each takes measurements behind a long context."""
        return [cls()]

    def find(self, graph: Graph) -> list[Site]:
        found = graph.calls("attention", "cache_attention", "prefix_attention", "prefill_attention")
        return [Site(module_path(node) or f"attention.{i}", (node,)) for i, node in enumerate(found)]

    def legal(self, site: Site) -> Verdict:
        (attention,) = site.nodes
        obstacle = self._obstacle(attention)
        if obstacle is not None:
            return Verdict(False, obstacle)
        slots = self.window + window_slack(self.window)
        return Verdict(True, f"sees {self.window:,} tokens, and stores at most {slots:,}")

    def gain(self, site: Site, workload: Workload, target: Target) -> CostDelta:
        (attention,) = site.nodes
        token = sum(_token_bytes(node) for node in dict.fromkeys(_held(attention)))
        before = argument(attention, "window") or workload.capacity
        slots = [min(workload.capacity, w + window_slack(w)) for w in (before, self.window)]
        place: dict[str, Any] = {"batch": workload.batch, "tokens": 1}
        seconds = [
            predict(
                Cost(read={CACHE: B * C * token}), target, **place, context=min(workload.mean_context, window)
            ).seconds
            for window in (before, self.window)
        ]
        memory = workload.batch * token * (slots[1] - slots[0])
        note = f"{memory / 2**20:+.1f} MiB of cache"
        if self.window >= workload.capacity:
            note = (
                f"rows of {workload.capacity:,} tokens fit the window: nothing is saved, and nothing is lost"
            )
        return CostDelta(seconds[1] - seconds[0], float(memory), note)

    def apply(self, site: Site, graph: Graph) -> None:
        (attention,) = site.nodes
        if op_name(attention) == "cache_attention":
            for store in dict.fromkeys(_held(attention)):
                _make_ring(graph, store, self.window)
        target = attention.target
        assert isinstance(target, torch._ops.OpOverload)
        options = {spec.name: argument(attention, spec.name) for spec in target._schema.arguments}
        new = graph.emit(target, *(options | {"window": self.window}).values(), before=attention)
        graph.replace(attention, new)
        graph.fx.erase_node(attention)

    def _obstacle(self, attention: Node) -> str | None:
        """Why this attention keeps what it sees; None if it need not."""
        name = op_name(attention)
        if name == "prefix_attention":
            return "the prefix that its rows share is seen by all of their tokens"
        if name == "prefill_attention":
            return "its prompts see what a mask says"
        window = argument(attention, "window")
        if window and window <= self.window:
            return f"it has a window of {window} tokens, which is no larger: left alone"
        return None if name == "attention" else _stored_otherwise(attention)


def _held(attention: Node) -> list[Node]:
    """What a token's keys and values are, or where they are stored."""
    names = ("k", "v") if op_name(attention) == "attention" else ("keys", "values")
    return [argument(attention, name) for name in names]


def _token_bytes(node: Node) -> int:
    fake = value(node)
    return int(fake.shape[1]) * int(fake.shape[3]) * fake.dtype.itemsize


def _stored_otherwise(attention: Node) -> str | None:
    """Why the stores of an attention cannot become rings; None if they can."""
    if argument(attention, "pages") is not None:
        return "it reads chosen pages, which go by the number of a token"
    for store in _held(attention):
        if store.op != "placeholder" or store.meta["kind"] != "state" or "store" in store.meta:
            return "its cache is none of keys and values as they are: name slide_attention before place_cache"
        others = [u for u in store.users if u is not attention and op_name(u) != "cache_append"]
        if others:
            return f"its store is also read by {others[0].name}"
    return None


def _make_ring(graph: Graph, store: Node, window: int) -> None:
    """Let a store have the slots of a window."""
    fake, slots = value(store), store_slots(graph, window)
    batch, groups, _, features = fake.shape
    with graph.fake_mode:
        content = torch.empty((batch, groups, slots, features), dtype=fake.dtype, device=fake.device)
    store.meta.update(window=window, val=content)
