"""What lowering runs a tile of cache slots at a time: the readers of packed stores.

An attention over two packed stores is one kernel where there is one for their codecs. Otherwise, and where
keys and values are computed from what is stored, the reference runs decode, computation and attention
tile by tile (:func:`graphwright.ir.packed_ops.stream_attention`).

Which kernels there are depends on where a graph will run: ``annotations["decode_kernels"]`` names a family
of them, and whoever knows the family describes it here (:func:`register_store_kernels`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.fx.node import Node

from graphwright.cost_model.listed_pages import Listing, listing_of
from graphwright.ir.codecs import PageShape
from graphwright.ir.codecs.fusible import fusion_obstacle
from graphwright.ir.errors import InputError
from graphwright.ir.graph import Graph, argument, op_name
from graphwright.ir.selectors import parse_selector


@dataclass(frozen=True)
class StoreKernels:
    """A family of kernels for caches, as prices see it.

    Attributes:
        supports: called with arguments of ``packed_attention`` by name (``q``, ``keys``, ``values`` as fake
            tensors, codecs and pages); None if one kernel runs it, else why not.
        packs: whether pages of a codec and shape are packed in one launch.
        attention_launches: of an attention over a cache, packed or not.
        turning_launches: for orthogonal maps of packed keys, by which queries are turned.
        joins_rotary: whether the launch that rotates queries and keys also appends keys and values.
        reads_lists: whether attention reads lists of pages page by page, and not everything.
        scores: whether pages are scored by a selector, given as text, in one launch.
        chooses: whether lists of pages are made in one launch.
        masked: by dtype, how many times longer attention under a mask of blocks takes for a pair of tokens
            than attention over everything: by compiled FlexAttention, and block by block without a compiler.
    """

    supports: Callable[..., str | None]
    packs: Callable[[str, PageShape], bool] = lambda codec, shape: False
    attention_launches: int = 1
    turning_launches: int = 0
    joins_rotary: bool = False
    reads_lists: bool = True
    scores: Callable[[str], bool] = lambda selector: False
    chooses: bool = False
    masked: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def masked_factor(self, dtype: str, compiled: bool) -> float:
        """The entry of ``masked``; 1 where nothing was measured."""
        return self.masked.get(dtype, (1.0, 1.0))[0 if compiled else 1]


def _cpp_supports(key_codec: str, value_codec: str, **_: Any) -> str | None:
    return fusion_obstacle(key_codec) or fusion_obstacle(value_codec)


def _cpp_scores(selector: str) -> bool:
    return parse_selector(selector).in_kernels


#: Measured with ``benchmarks/prefill_masks.py``: 512 queries over 8,192 tokens, two cores with AVX-512.
_CPP_MASKED = {"float32": (1.65, 2.85), "bfloat16": (2.55, 3.4)}
#: By name; ``cpp`` is what graphs run with that do not say otherwise.
_FAMILIES = {"cpp": StoreKernels(_cpp_supports, scores=_cpp_scores, chooses=True, masked=_CPP_MASKED)}


def register_store_kernels(name: str, kernels: StoreKernels) -> None:
    """Make a family known by the name that ``annotations["decode_kernels"]`` gives it."""
    _FAMILIES[name] = kernels


def store_kernels(graph: Graph) -> StoreKernels | None:
    """The family that a graph will run with; None where there is none (the annotation is False).

    Raises:
        InputError: no family of that name.
    """
    name = graph.annotations.get("decode_kernels", "cpp")
    if name is False:
        return None
    if name not in _FAMILIES:
        raise InputError(
            f"there are no kernels {name!r} for packed stores",
            where='annotations["decode_kernels"]',
            hint=f"known: {', '.join(_FAMILIES)}, or False for none",
        )
    return _FAMILIES[name]


@dataclass(frozen=True)
class Streaming:
    """The streamed part of a graph.

    Attributes:
        runs: of each streamed node, how many attentions run it for themselves.
        in_kernel: reads and attentions that are one kernel.
        attentions: all attentions that read a packed store, in a kernel or not.
        obstacles: of attentions over two packed stores that are no kernel, why not.
        joined: appends to packed stores that are part of a launch that counts already.
        kernels: the family that the graph will run with.
        listings: of attentions, and of reads in their kernel, that read lists of pages and no more.
    """

    runs: Mapping[Node, int] = field(default_factory=dict)
    in_kernel: frozenset[Node] = frozenset()
    attentions: frozenset[Node] = frozenset()
    obstacles: Mapping[Node, str] = field(default_factory=dict)
    joined: frozenset[Node] = frozenset()
    kernels: StoreKernels | None = None
    listings: Mapping[Node, Listing] = field(default_factory=dict)


def find_streaming(graph: Graph) -> Streaming:
    """The nodes of a graph, not lowered yet, that will run tile by tile."""
    kernels = store_kernels(graph)
    if not graph.calls("cache_read"):
        return Streaming(kernels=kernels, listings=_listings(graph, kernels, frozenset(), frozenset()))
    runs: Counter[Node] = Counter()
    in_kernel: set[Node] = set()
    joined: set[Node] = set()
    obstacles: dict[Node, str] = {}
    attentions: set[Node] = set()
    for attention in graph.calls("cache_attention"):
        ends = [argument(attention, "keys"), argument(attention, "values")]
        inside = _inside(ends)
        if not any(op_name(node) == "cache_read" for node in inside):
            continue
        runs.update(inside)
        attentions.add(attention)
        if not all(op_name(end) == "cache_read" for end in ends):
            continue
        joined.update(_joined_appends(attention, ends, kernels))
        reason = (
            "there are no kernels" if kernels is None else kernels.supports(**_as_packed(attention, ends))
        )
        if reason is None:
            in_kernel.update((attention, *ends))
        else:
            obstacles[attention] = reason
    return Streaming(
        dict(runs), frozenset(in_kernel), frozenset(attentions), obstacles, frozenset(joined), kernels,
        _listings(graph, kernels, in_kernel, attentions),
    )  # fmt: skip


def _listings(
    graph: Graph, kernels: StoreKernels | None, in_kernel: Collection[Node], streamed: Collection[Node]
) -> dict[Node, Listing]:
    """Who reads by lists: a kernel does; the reference reads everything and leaves out what is not listed."""
    found: dict[Node, Listing] = {}
    if kernels is None or not kernels.reads_lists:
        return found
    for attention in graph.calls("cache_attention", "packed_attention", "prefill_attention"):
        listing = listing_of(attention)
        if listing is None or (attention in streamed and attention not in in_kernel):
            continue
        if op_name(attention) == "packed_attention" and kernels.supports(**deciding(attention)) is not None:
            continue
        found[attention] = listing
        if attention in in_kernel:
            reads = {argument(attention, "keys"), argument(attention, "values")}
            # A read that several attentions share is of one price: that of reading it whole.
            found.update((read, listing) for read in reads if set(read.users) == {attention})
    return found


def _as_packed(attention: Node, reads: list[Node]) -> dict[str, Any]:
    """What decides of ``packed_attention``'s arguments whether a kernel runs it."""
    given: dict[str, Any] = {"q": argument(attention, "q").meta["val"]}
    for name, read in zip(("key", "value"), reads, strict=True):
        given[f"{name}s"] = [node.meta["val"] for node in argument(read, "store")]
        given[f"{name}_codec"], given[f"{name}_page"] = argument(read, "codec"), argument(read, "page")
    return given | _lists(attention)


def deciding(attention: Node) -> dict[str, Any]:
    """What decides of a ``packed_attention``'s arguments whether a kernel runs it."""
    given: dict[str, Any] = {"q": argument(attention, "q").meta["val"]}
    for name in ("key", "value"):
        given[f"{name}s"] = [node.meta["val"] for node in argument(attention, f"{name}s")]
        given |= {f"{name}_{word}": argument(attention, f"{name}_{word}") for word in ("codec", "page")}
    return given | _lists(attention)


def _lists(attention: Node) -> dict[str, Any]:
    """The lists of pages among the arguments, if it has any."""
    lists = {name: argument(attention, name) for name in ("pages", "chosen")}
    if None in lists.values():
        return {}
    found: dict[str, Any] = {name: node.meta["val"] for name, node in lists.items()}
    return found | {name: argument(attention, name) for name in ("page", "first")}


def _joined_appends(attention: Node, reads: list[Node], kernels: StoreKernels | None) -> list[Node]:
    """The appends of both stores, if they are part of the launch that rotates queries and keys."""
    if kernels is None or not kernels.joins_rotary:
        return []
    tails = [argument(read, "store")[1] for read in reads]
    appends = [[user for user in tail.users if op_name(user) == "cache_append"] for tail in tails]
    if tails[0] is tails[1] or any(len(found) != 1 for found in appends):
        return []
    (keys,), (values,) = appends
    rotated = (argument(attention, "q"), argument(keys, "new"))
    return [keys, values] if all(op_name(node) == "rotary" for node in rotated) else []


def _inside(ends: list[Node]) -> set[Node]:
    """What keys and values are computed by from the slots of stores, the reads of packed ones included."""
    found: dict[Node, bool] = {}
    stack = list(ends)
    while stack:
        node = stack[-1]
        if node in found:
            stack.pop()
        elif _is_source(node):
            found[node] = True
        elif waiting := [n for n in node.all_input_nodes if n not in found]:
            stack += waiting
        else:
            found[node] = any(found[n] for n in node.all_input_nodes)
    return {node for node, streamed in found.items() if streamed and node.op != "placeholder"}


def _is_source(node: Node) -> bool:
    if node.op == "placeholder":
        return bool(node.meta.get("kind") == "state" and "store" not in node.meta)
    return op_name(node) in ("cache_read", "slot_positions")


def kernel_decodes(codec: str) -> bool:
    """Whether the C++ kernels of ``packed_attention`` decode a codec, given as text."""
    return fusion_obstacle(codec) is None
