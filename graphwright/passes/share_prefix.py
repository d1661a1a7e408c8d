"""``share_prefix``: keep what all rows of a batch begin with once, and attend over it for all rows together.

The keys and values of the prefix leave the rows' stores for a store of one row. Each row's own tokens follow
in its store, and attention merges the two. Source: Juravsky et al. 2024, "Hydragen: High-Throughput LLM
Inference with Shared Prefixes".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch.fx.node import Node

from graphwright.cost_model.op_costs import attend, slot_bytes
from graphwright.cost_model.prediction import predict
from graphwright.cost_model.prefix_costs import attend_shared
from graphwright.cost_model.shapes import Call, Shapes
from graphwright.cost_model.target import Target
from graphwright.cost_model.workload import Workload
from graphwright.ir.errors import PassError
from graphwright.ir.eviction_ops import KEPT
from graphwright.ir.graph import Graph, argument, module_path, op_name, value
from graphwright.ir.prefix_ops import OWN_LENGTHS
from graphwright.passes.base import CostDelta, Fidelity, Pass, Site, Verdict, register_pass
from graphwright.passes.place_cache import new_size, step_inputs


@register_pass
@dataclass(frozen=True)
class SharePrefix(Pass):
    """Store the tokens that all rows of a batch begin with once, and read them once a step.

    Options:
        tokens: how many tokens every batch is promised to begin with; one that does not is refused. 0 shares
            whatever a batch has in common. The planner fills in what the workload says.
    """

    name: ClassVar[str] = "share_prefix"
    summary: ClassVar[str] = "store and read the tokens that all rows of a batch begin with once (Hydragen)"
    fidelity: ClassVar[Fidelity] = "reordered"
    scope: ClassVar[Literal["site", "program"]] = "program"
    requires: ClassVar[frozenset[str]] = frozenset({"cache"})
    follows: ClassVar[frozenset[str]] = frozenset({"quantize_cache", "evict_tokens", "sparsify_attention"})
    provides: ClassVar[frozenset[str]] = frozenset({"shared_prefix"})

    tokens: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise PassError(
                f"tokens={self.tokens} is not a number of tokens",
                hint="give those that all rows share, or 0 for whatever they have in common",
            )

    @classmethod
    def variants(cls) -> list[Pass]:
        """None for any workload: see :meth:`proposed`."""
        return []

    @classmethod
    def proposed(cls, workload: Workload) -> list[Pass]:
        """What the workload promises; nothing where there is nothing to share, or nobody to share it."""
        if workload.batch == 1 or _promised(workload) == 0:
            return []
        return [cls(tokens=_promised(workload))]

    def resolve(self, graph: Graph, workload: Workload, target: Target, memory: float | None) -> Pass:
        """The workload's promise, where the option makes none."""
        return self if self.tokens else replace(self, tokens=_promised(workload))

    def find(self, graph: Graph) -> list[Site]:
        found = graph.calls("cache_attention")
        roles = {n.meta.get("store", {}).get("role") for n in graph.placeholders("state")}
        info = {"shapes": Shapes(graph) if found else None, "roles": roles}
        return [
            Site(module_path(node) or f"attention.{index}", (node,), info) for index, node in enumerate(found)
        ]

    def legal(self, site: Site) -> Verdict:
        obstacle = _obstacle(site.nodes[0])
        if KEPT in site.info["roles"]:
            obstacle = "the program evicts tokens, in each row others"
        elif "summary" in site.info["roles"]:
            obstacle = "the program selects pages, in each row others"
        if obstacle is not None:
            return Verdict(False, obstacle)
        shared = f"the first {self.tokens} tokens" if self.tokens else "what the rows have in common"
        return Verdict(True, f"{shared} stored once, and read once a step")

    def gain(self, site: Site, workload: Workload, target: Target) -> CostDelta:
        call = Call(site.nodes[0], site.info["shapes"])
        tokens = min(self.tokens or _promised(workload), workload.capacity)
        place: dict[str, Any] = {"batch": workload.batch, "context": workload.mean_context, "tokens": 1}
        before = predict(attend(call, "keys", "values"), target, **place, op="cache_attention")
        after = predict(attend_shared(call, tokens), target, **place, op="prefix_attention")
        kept = int(slot_bytes(call, *map(value, _stores(site.nodes[0])))) * tokens * (1 - workload.batch)
        note = f"reads {before.bytes_read / 1e6:.3g} MB a step before, {after.bytes_read / 1e6:.3g} MB after"
        return CostDelta(after.seconds - before.seconds, float(kept), note)

    def apply(self, site: Site, graph: Graph) -> None:
        attention = site.nodes[0]
        stores = _stores(attention)
        lengths, own = step_inputs(graph)["lengths"], own_lengths(graph)
        prefix = {store: _prefix_of(graph, store, self.tokens) for store in stores}
        for append in _appends(stores):
            append.replace_input_with(lengths, own)
        keys, values = argument(attention, "keys"), argument(attention, "values")
        names = ("positions", "counts", "tree", "scale", "softcap", "sinks")
        positions, counts, tree, *rest = (argument(attention, name) for name in names)
        merged = graph.emit(
            "prefix_attention",
            argument(attention, "q"), prefix[keys], prefix[values], keys, values,
            positions, own, counts, tree, *rest,
            before=attention,
        )  # fmt: skip
        graph.replace(attention, merged)
        graph.fx.erase_node(attention)


def _promised(workload: Workload) -> int:
    """Tokens that a workload's prompts share; each keeps one of its own, which gives the first logits."""
    return min(workload.shared_prefix, workload.prompt - 1)


def _stores(attention: Node) -> list[Node]:
    """What an attention reads, each once."""
    return list(dict.fromkeys([argument(attention, "keys"), argument(attention, "values")]))


def _appends(stores: Sequence[Node]) -> list[Node]:
    return [user for store in stores for user in store.users if op_name(user) == "cache_append"]


def _obstacle(attention: Node) -> str | None:
    """Why the rows' prefix cannot leave the stores of this attention; None if it can."""
    if argument(attention, "window"):
        return "its sliding window is a ring in each row, which overwrites the prefix"
    if any(argument(attention, name) is not None for name in ("pages", "chosen")):
        return "it reads chosen pages only, and each row chooses its own"
    stores = _stores(attention)
    for store in stores:
        if op_name(store) == "cache_read":
            return "its cache is packed, row by row, and a shared prefix is stored as it is"
        if store.op != "placeholder" or store.meta["kind"] != "state" or "store" in store.meta:
            return "its keys and values are computed from what is stored"
        others = [u for u in store.users if u is not attention and op_name(u) != "cache_append"]
        if others:
            return f"its store is also read by {others[0].name}"
    lengths = argument(attention, "lengths")
    if any(argument(append, "lengths") is not lengths for append in _appends(stores)) or (
        lengths.meta.get("name") != "lengths"
    ):
        return "its slots are not those of the tokens' positions"
    return None


def own_lengths(graph: Graph) -> Node:
    """The graph input ``own_lengths [B]``: committed tokens of each row after the prefix."""
    inputs = {node.meta["name"]: node for node in graph.placeholders("input")}
    if OWN_LENGTHS not in inputs:
        counts = step_inputs(graph)["counts"]
        with graph.fx.inserting_after(counts):
            node = graph.fx.placeholder(OWN_LENGTHS)
        with graph.fake_mode:
            fake = torch.empty_like(value(counts))
        node.meta.update(kind="input", name=OWN_LENGTHS, val=fake)
        return node
    return inputs[OWN_LENGTHS]


def _prefix_of(graph: Graph, store: Node, tokens: int) -> Node:
    """The state ``[1, G, F, D]`` of a store's prefix. The store itself then has slots for the rest only."""
    others = [n for n in graph.placeholders("state") if n.meta.get("store", {}).get("role") == "prefix"]
    fake = value(store)
    if others:
        first = value(others[0]).shape[2]
        rest = value(graph.placeholder(others[0].meta["store"]["of"])).shape[2]
    else:
        first, rest = new_size(graph, 29), new_size(graph, 31)
    batch, groups, _, features = fake.shape
    with graph.fake_mode:
        content = torch.empty((1, groups, first, features), dtype=fake.dtype, device=fake.device)
        store.meta["val"] = torch.empty((batch, groups, rest, features), dtype=fake.dtype, device=fake.device)
    name = store.meta["name"]
    prefix = graph.add_placeholder("state", f"{name}.prefix", content)
    prefix.meta.update(window=0, store={"role": "prefix", "of": name, "tokens": tokens})
    return prefix
