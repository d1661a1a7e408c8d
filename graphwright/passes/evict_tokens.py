"""``evict_tokens``: let a layer's cache hold fewer tokens than its rows are long.

The stores of keys and values get fewer slots than the capacity, and the layer a length of its own, which
appending and attention read in the place of the rows' lengths. Tokens keep the positions at which their
keys were rotated, so it does not matter in which slot one lies. Between steps an evictor chooses what stays
(:mod:`graphwright.runtime.evicted_storage`); what it needs of the step is written down in the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.fx.node import Node

from graphwright.cost_model.cost import CACHE, B, C, Cost
from graphwright.cost_model.held_tokens import held_tokens
from graphwright.cost_model.prediction import predict
from graphwright.cost_model.target import Target
from graphwright.cost_model.workload import Workload
from graphwright.ir.errors import PassError
from graphwright.ir.eviction_ops import HELD, KEPT, RING, STEP_TOKENS, Retention, ring_slots
from graphwright.ir.evictors import Evictor, parse_evictor
from graphwright.ir.graph import Graph, argument, module_path, op_name, value
from graphwright.passes.base import (
    CostDelta,
    Fidelity,
    Pass,
    Site,
    Verdict,
    parse_layers,
    register_pass,
)
from graphwright.passes.layer_budgets import observe_calibration, whole_tokens
from graphwright.passes.place_cache import new_size, step_inputs

WHEN = ("always", "prompt")
_MOST = 4096  # slots beside the budget


@register_pass
@dataclass(frozen=True)
class EvictTokens(Pass):
    """Keep some of the tokens.

    Options:
        method: an evictor, ``snapkv`` or ``ems(threshold=0.7)``.
        keep: tokens that stay at an eviction, as a fraction of the cache's capacity.
        tokens: the same as a number; 0 leaves it to ``keep``.
        window: newest tokens that always stay, and whose queries say what others matter.
        sinks: first tokens that always stay.
        slack: slots beside the budget: the next eviction comes when all but 64 of them are used up.
        when: ``always`` evicts whenever the slots are used up, so that memory is bounded while a prompt
            runs too; ``prompt`` keeps a prompt whole until it has run.
    """

    name: ClassVar[str] = "evict_tokens"
    summary: ClassVar[str] = "let the cache hold fewer tokens: evict or merge those that matter least"
    fidelity: ClassVar[Fidelity] = "lossy"
    needs_context: ClassVar[bool] = True
    requires: ClassVar[frozenset[str]] = frozenset({"cache"})

    method: str = "snapkv"
    keep: float = 0.5
    tokens: int = 0
    window: int = 32
    sinks: int = 4
    slack: int = 128
    when: str = "always"

    def __post_init__(self) -> None:
        parse_evictor(self.method)
        if self.when not in WHEN:
            raise PassError(f"when={self.when!r} is no time", hint=f"choose one of {', '.join(WHEN)}")
        limits = {"window": (1, _MOST), "sinks": (0, _MOST), "slack": (STEP_TOKENS + 1, _MOST)}
        for name, (least, most) in limits.items():
            if not least <= getattr(self, name) <= most:
                raise PassError(
                    f"{name}={getattr(self, name)} is out of range", hint=f"give {least} to {most} tokens"
                )
        if not self.tokens and not 0 < self.keep <= 1:
            raise PassError(
                f"keep={self.keep} is not a fraction of the cache that stays",
                hint="give a number above 0 and at most 1, for example keep=0.25, or tokens=1024",
            )
        least = self.sinks + self.window + 1
        if self.tokens and self.tokens < least:
            raise PassError(
                f"tokens={self.tokens} leaves nothing to choose: {self.sinks} first and {self.window} newest "
                "tokens always stay",
                hint=f"give at least {least}, or smaller sinks and window",
            )

    @classmethod
    def variants(cls) -> list[Pass]:
        """What the planner tries; quality decides."""
        return [cls(keep=0.5), cls(keep=0.25)]

    def find(self, graph: Graph) -> list[Site]:
        found = graph.calls("cache_attention", "prefix_attention")
        sites = [
            Site(module_path(node) or f"attention.{index}", (node,), {"graph": graph})
            for index, node in enumerate(found)
        ]
        wanted = parse_layers(self.layers)
        usable = [s for s in sites if (wanted is None or s.layer in wanted) and _obstacle(s.nodes[0]) is None]
        fractions = self._fractions(graph, usable)
        for site in sites:
            site.info.update(fraction=fractions.get(site.name), measured=bool(fractions))
        return sites

    def legal(self, site: Site) -> Verdict:
        (attention,) = site.nodes
        obstacle = _obstacle(attention)
        if obstacle is not None:
            return Verdict(False, obstacle)
        evictor, kept = self._evictor, self._retention(site)
        of_it = f"{kept.tokens:,} tokens" if kept.tokens else f"{kept.keep:.3g} of the cache"
        words = [f"{evictor} keeps {of_it}, the first {kept.sinks} and the newest {kept.window} among them"]
        if self.when == "prompt":
            words.append("a prompt stays whole until it has run")
        if evictor.by_layer and not site.info["measured"]:
            words.append("every layer the same, as there is no text to calibrate on")
        return Verdict(True, "; ".join(words))

    def gain(self, site: Site, workload: Workload, target: Target) -> CostDelta:
        kept, capacity = self._retention(site), workload.capacity
        stores = _stores(site.nodes[0])
        token = sum(_token_bytes(store) for store in stores)
        beside = self._bytes_beside(site, kept.slots(capacity))
        memory = workload.batch * ((kept.slots(capacity) - capacity) * token + beside)
        if not kept.evicts(capacity):
            note = f"rows of {capacity:,} tokens fit the slots: nothing is evicted, and nothing is lost"
            return CostDelta(0.0, memory, f"{note}; {memory / 2**20:+.1f} MiB of cache")
        read = Cost(read={CACHE: B * (held_tokens(kept) - C) * token})
        place: dict[str, Any] = {"batch": workload.batch, "context": workload.mean_context, "tokens": 1}
        saved = predict(Cost() - read, target, **place).seconds
        note = f"{kept.budget(capacity):,} of {capacity:,} tokens stay; {memory / 2**20:+.1f} MiB of cache"
        return CostDelta(-saved, memory, note)

    def apply(self, site: Site, graph: Graph) -> None:
        (attention,) = site.nodes
        inputs, stores = step_inputs(graph), _stores(attention)
        about = self._about(site, attention)
        held = _state(graph, f"{site.name}.held", value(inputs["lengths"]), {**about, "role": HELD})
        slots = _shared_slots(graph)
        for part, store in zip(("keys", "values"), stores, strict=True):
            fake = value(store)
            with graph.fake_mode:
                content = torch.empty(
                    (*fake.shape[:2], slots, fake.shape[3]), dtype=fake.dtype, device=fake.device
                )
            store.meta.update(val=content, store={**about, "role": KEPT, "part": part})
            for append in [user for user in store.users if op_name(user) == "cache_append"]:
                append.replace_input_with(inputs["lengths"], held)
        attention.replace_input_with(inputs["lengths"], held)
        if self._evictor.observes:
            q = argument(attention, "q")
            batch, heads, _, features = value(q).shape
            with graph.fake_mode:
                content = torch.empty(
                    (batch, heads, ring_slots(self.window), features),
                    dtype=value(q).dtype,
                    device=value(q).device,
                )
            ring = _state(graph, f"{site.name}.queries", content, {**about, "role": RING})
            graph.emit("observe_queries", ring, q, inputs["lengths"], inputs["counts"], before=attention)

    # --- what is kept ----------------------------------------------------------------------------

    @property
    def _evictor(self) -> Evictor:
        return parse_evictor(self.method)

    def _retention(self, site: Site) -> Retention:
        """What this site keeps: of methods that tell layers apart, its own share."""
        kept = Retention(self.keep, self.tokens, self.sinks, self.window, self.slack, self.when)
        fraction = site.info["fraction"]
        if fraction is None:
            return kept
        if not self.tokens:
            return replace(kept, keep=fraction)
        return replace(kept, tokens=max(kept.least, int(fraction)))

    def _about(self, site: Site, attention: Node) -> dict[str, Any]:
        """What the runtime and the cost model need to know, as plain data."""
        kept = self._retention(site)
        return {
            "name": site.name, "method": self.method, "keep": kept.keep, "tokens": kept.tokens,
            "sinks": kept.sinks, "window": kept.window, "slack": kept.slack, "when": kept.when,
            "scale": argument(attention, "scale"), "softcap": argument(attention, "softcap"),
        }  # fmt: skip

    def _bytes_beside(self, site: Site, slots: int) -> int:
        """Of one row, beside its keys and values."""
        q = value(argument(site.nodes[0], "q"))
        found = 8
        if self._evictor.observes:
            found += int(q.shape[1]) * ring_slots(self.window) * int(q.shape[3]) * q.dtype.itemsize
        if self._evictor.accumulates:
            found += int(value(_stores(site.nodes[0])[0]).shape[1]) * slots * 4
        return found

    def _fractions(self, graph: Graph, sites: list[Site]) -> dict[str, float]:
        """By site, what it keeps (a fraction, or tokens); empty where all keep the same."""
        evictor = self._evictor
        if not evictor.by_layer or graph.samples is None or not sites:
            return {}
        attention = [seen.attention() for seen in observe_calibration(graph, sites, self.window)]
        length = min(x.shape[-1] for x in attention)
        keep = min(1.0, self.tokens / length) if self.tokens else self.keep
        shares = evictor.shares(attention, keep)
        if self.tokens:  # whole tokens, as many in sum as without shares
            least = self.sinks + self.window + 1
            shares = whole_tokens([s / keep * self.tokens for s in shares], self.tokens * len(shares), least)
        return {site.name: share for site, share in zip(sites, shares, strict=True)}


def _stores(attention: Node) -> list[Node]:
    return [argument(attention, name) for name in ("keys", "values")]


def _token_bytes(store: Node) -> int:
    fake = value(store)
    return int(fake.shape[1]) * int(fake.shape[3]) * fake.dtype.itemsize


def _obstacle(attention: Node) -> str | None:
    """Why tokens of this attention cannot be evicted; None if they can."""
    if op_name(attention) == "prefix_attention":
        return "its rows share a prefix, which belongs to all of them"
    window = argument(attention, "window")
    if window:
        return f"a window of {window} tokens forgets by itself: left alone"
    if argument(attention, "pages") is not None:
        return "it reads chosen pages, which go by the number of a token"
    keys, values = _stores(attention)
    for store in (keys, values):
        if op_name(store) == "cache_read":
            return "its cache is packed, and pages of packed tokens have no slots to move"
        if store.op != "placeholder" or store.meta["kind"] != "state":
            return "its keys and values are computed from what is stored, by the position of a slot"
        if store.meta.get("store", {}).get("role") == KEPT:
            return "its tokens are evicted already"
        if "store" in store.meta:
            return "its store is not one of keys or values in slots of their own"
        others = [u for u in store.users if u is not attention and op_name(u) != "cache_append"]
        if others:
            return f"its store is also read by {others[0].name}"
    if keys is values:
        return "its keys and values are one store"
    if argument(attention, "lengths").meta.get("name") != "lengths":
        return "its slots are not those of the tokens' numbers"
    return None


# --- states --------------------------------------------------------------------------------------


def _state(graph: Graph, name: str, fake: torch.Tensor, about: Mapping[str, Any]) -> Node:
    with graph.fake_mode:
        node = graph.add_placeholder("state", name, torch.empty_like(fake))
    node.meta.update(window=0, store=dict(about))
    return node


def _shared_slots(graph: Graph) -> Any:
    """The symbol for a layer's slots, one for all layers.

    Layers may have different numbers of slots, and are compiled once all the same: each is a piece of its
    own, and nothing relates the stores of two.
    """
    for node in graph.placeholders("state"):
        if node.meta.get("store", {}).get("role") == KEPT:
            return value(node).shape[2]
    return new_size(graph, 43)
