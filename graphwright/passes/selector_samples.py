"""What calibrated selectors are fitted on: keys and queries of the calibration text, and ends of sentences.

Keys are what stores hold. Queries are kept by no store: the text runs through a copy of the graph in which
every cache attention's queries are appended to a store of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch.fx.node import Node

from graphwright.ir.graph import Graph, argument, module_path, op_name, value
from graphwright.ir.selectors import Selector
from graphwright.ir.selectors.selector import Samples
from graphwright.passes.place_cache import new_size, step_inputs


@runtime_checkable
class KnowsSentences(Protocol):
    """A source of samples (``Graph.samples``) that has seen a tokenizer."""

    def ends(self) -> torch.Tensor | None:
        """``[V]`` bool, which tokens end a sentence; None without a tokenizer."""


def selector_samples(graph: Graph, selector: Selector) -> Callable[[Node], Samples]:
    """What ``selector`` is fitted on at a cache attention of this graph as it is now, when first asked for.

    A pass asks in ``find`` and reads in ``apply``, when other sites may be rewritten already. The text runs
    once for all sites, and only for selectors that need it.

    Returns:
        A function of the attention. Without text, or for a selector that needs nothing, it gives empty
        samples. Keys are None where an attention's keys are computed from what is stored.
    """
    source = graph.samples
    if source is None or not (selector.needs_samples or selector.needs_tokens):
        return lambda attention: Samples()
    untouched = graph.copy() if selector.needs_samples else None
    index = {attention: i for i, attention in enumerate(graph.calls("cache_attention"))}
    seen: list[_Seen] = []

    def samples(attention: Node) -> Samples:
        ends = None
        if selector.needs_tokens and isinstance(source, KnowsSentences):
            ends = source.ends()
        if untouched is None:
            return Samples(ends=ends)
        if not seen:
            seen.extend(_observe(untouched))
        keys, queries = seen[index[attention]]
        held = source(untouched)
        return Samples(_rows(held.get(keys)), _rows(held.get(queries)), ends)

    return samples


class _Seen(NamedTuple):
    """Names of the stores that hold an attention's keys and its queries."""

    keys: str
    queries: str


def _observe(graph: Graph) -> list[_Seen]:
    """Store queries, and keys that are packed, of every cache attention; the names of the stores."""
    found: list[_Seen] = []
    for index, attention in enumerate(graph.calls("cache_attention")):
        name = module_path(attention) or f"attention.{index}"
        if any(name == seen.queries.removesuffix(".queries") for seen in found):
            name = f"{name}.{index}"
        _append(graph, f"{name}.queries", argument(attention, "q"), attention)
        found.append(_Seen(_keys(graph, attention), f"{name}.queries"))
    return found


def _keys(graph: Graph, attention: Node) -> str:
    """The name of a store that holds an attention's keys as they are; empty if there can be none."""
    keys = argument(attention, "keys")
    if op_name(keys) != "cache_read":
        return "" if "store" in keys.meta else str(keys.meta.get("name", ""))
    tail = argument(keys, "store")[1]
    name = f"{tail.meta['store']['name']}.whole"
    append = next((user for user in tail.users if op_name(user) == "cache_append"), None)
    if append is None:
        return ""
    if all(node.meta["name"] != name for node in graph.placeholders("state")):
        _append(graph, name, argument(append, "new"), append)
    return name


def _append(graph: Graph, name: str, new: Node, before: Node) -> None:
    """Append ``new [B, H, T, D]`` to a store of its own for all tokens."""
    fake, inputs = value(new), step_inputs(graph)
    slots = _slots(graph)
    with graph.fake_mode:
        size = (fake.shape[0], fake.shape[1], slots, fake.shape[3])
        content = torch.empty(size, dtype=fake.dtype, device=fake.device)
    store = graph.add_placeholder("state", name, content)
    store.meta["window"] = 0
    graph.emit("cache_append", store, new, inputs["lengths"], inputs["counts"], before=before)


def _slots(graph: Graph) -> Any:
    """The symbol for slots of all tokens."""
    for node in graph.placeholders("state"):
        plain = node.meta.get("store", {"role": "slots"})["role"] == "slots"
        if plain and node.meta["window"] == 0:
            return value(node).shape[2]
    return new_size(graph, 37)


def _rows(held: torch.Tensor | None) -> torch.Tensor | None:
    """``[B, G, n, D]`` as ``[G, B * n, D]`` float32."""
    return None if held is None else held.transpose(0, 1).flatten(1, 2).float()
