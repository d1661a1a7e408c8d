"""Attention over packed stores, lowered so that only a tile of them is ever decoded.

Where attention reads two packed stores directly, it becomes ``packed_attention``, which kernels
implement. Where keys and values are computed from what is stored (rotated, projected, taken apart),
the nodes in between are cut out as a function of one tile of slots, and one opaque op runs decode,
function and attention tile by tile.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.fx.node import Node

from graphwright.ir.codecs import parse_codec
from graphwright.ir.graph import Graph, ancestors, argument, op_name, value
from graphwright.ir.packed_ops import PackedStore, page_shape, read_tile, slot_numbers, stream_attention
from graphwright.ir.page_lists import LISTS
from graphwright.runtime.lowering.split import Builder, structure
from graphwright.runtime.packed_storage import PackedLayout

_NAMESPACE = "graphwright_stream"
_LIBRARY = torch.library.Library(_NAMESPACE, "FRAGMENT")
_ATTENTION_TENSORS = ("q", "positions", "lengths", "counts", "tree", "sinks")
_ATTENTION_NUMBERS = ("scale", "window", "softcap")


def packed_layouts(graph: Graph) -> list[PackedLayout]:
    """The packed stores of a graph, from the placeholders that make them up."""
    parts: dict[str, list[Node]] = {}
    for node in graph.placeholders("state"):
        about = node.meta.get("store")
        if about is not None and "codec" in about:
            parts.setdefault(about["name"], []).append(node)
    return [_layout(graph, name, nodes) for name, nodes in parts.items()]


def _layout(graph: Graph, name: str, nodes: Sequence[Node]) -> PackedLayout:
    about = nodes[0].meta["store"]
    codec = parse_codec(about["codec"])
    roles = {n.meta["store"]["buffer"] or n.meta["store"]["role"]: n.meta["name"] for n in nodes}
    tail = next(n for n in nodes if n.meta["store"]["role"] == "tail")
    shape = page_shape(value(tail), about["page"])
    constants = {key: graph.parameters[f"{name}.{key}"] for key in codec.constant_names(shape)}
    window = nodes[0].meta["window"]
    return PackedLayout(name, codec, shape, about["first"], about["recent"], window, roles, constants)


def stream_reads(graph: Graph) -> int:
    """Replace every attention over packed stores by an op that decodes tile by tile.

    Returns:
        How many of them compute their keys and values from what is stored, which has no kernel.
    """
    computed = 0
    for attention in graph.calls("cache_attention"):
        keys, values = argument(attention, "keys"), argument(attention, "values")
        if all(op_name(n) == "cache_read" for n in (keys, values)):
            new = _packed_attention(graph, attention, keys, values)
        else:
            region = _Region(graph, attention)
            if not any(op_name(n) == "cache_read" for n in region.sources):
                continue
            new = region.emit(graph)
            computed += 1
        graph.replace(attention, new)
        graph.fx.erase_node(attention)
    graph.eliminate_dead_code()
    return computed


def _packed_attention(graph: Graph, attention: Node, keys: Node, values: Node) -> Node:
    given: list[Any] = [argument(attention, "q")]
    for read in (keys, values):
        given += [argument(read, "store"), argument(read, "constants")]
    given.append(argument(keys, "slots"))
    given += [argument(attention, name) for name in ("positions", "lengths", "counts", "tree")]
    for read in (keys, values):
        given += [argument(read, "codec"), argument(read, "page")]
    given += [argument(attention, name) for name in (*_ATTENTION_NUMBERS, "sinks", *LISTS)]
    return graph.emit("packed_attention", *given, before=attention)


class _Region:
    """What lies between the stores and one attention, as a function of a tile of slots.

    Attributes:
        sources: nodes with one entry a slot: packed and plain stores, and the slots' positions.
    """

    def __init__(self, graph: Graph, attention: Node) -> None:
        self.attention = attention
        ends = [argument(attention, name) for name in ("keys", "values")]
        above = ancestors(ends)
        self.sources = [n for n in graph.nodes if n in above and _is_source(n)]
        inside = set(self.sources)
        ordered = []
        for node in graph.nodes:
            if node in above and node not in inside and any(n in inside for n in node.all_input_nodes):
                inside.add(node)
                ordered.append(node)
        used = (n for node in ordered for n in node.all_input_nodes)
        self.others = list(dict.fromkeys(n for n in used if n not in inside and _is_tensor(n)))
        builder = Builder([*self.sources, *self.others])
        for node in ordered:
            builder.copy(node)
        self.module = builder.finish(ends)

    def emit(self, graph: Graph) -> Node:
        """The attention as one op of everything that goes in."""
        tensors, kinds = [], []
        for source in self.sources:
            kind, own = _inputs_of(source)
            kinds.append(kind)
            tensors += own
        numbers = tuple(argument(self.attention, name) for name in _ATTENTION_NUMBERS)
        given = [argument(self.attention, name) for name in _ATTENTION_TENSORS]
        has_sinks = given[-1] is not None
        width = int(value(argument(self.attention, "values")).shape[3])
        runner = _Runner(self.module, tuple(kinds), len(self.others), numbers, has_sinks, width)
        op = _stream_op(runner)
        inputs = [n for n in given if n is not None]
        return graph.emit(op, [*inputs, *tensors, *self.others], before=self.attention)


def _is_source(node: Node) -> bool:
    if node.op == "placeholder":
        return node.meta["kind"] == "state" and "store" not in node.meta
    return op_name(node) in ("cache_read", "slot_positions")


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


Reader = Callable[[int, int], torch.Tensor]


@dataclass(frozen=True)
class _Kind:
    """How a source is read: ``packed``, ``plain`` or ``positions``, and from how many tensors."""

    name: str
    tensors: int = 0
    constants: int = 0
    codec: str = ""
    page: int = 0


def _inputs_of(source: Node) -> tuple[_Kind, list[Node]]:
    """How a source is read, and the tensors that takes."""
    if op_name(source) == "cache_read":
        store, constants = argument(source, "store"), argument(source, "constants")
        own = [*store, *constants, argument(source, "slots")]
        codec, page = argument(source, "codec"), argument(source, "page")
        return _Kind("packed", len(own), len(constants), codec, page), own
    if op_name(source) == "slot_positions":
        return _Kind("positions"), []
    return _Kind("plain", 1), [source]


@dataclass(frozen=True)
class _Runner:
    """Runs a region on the flat list of its inputs."""

    module: torch.fx.GraphModule
    kinds: tuple[_Kind, ...]
    others: int
    numbers: tuple[float, int, float]
    has_sinks: bool
    width: int

    @property
    def key(self) -> str:
        """Equal for regions that differ in their tensors only."""
        text = repr((structure(self.module.graph), *list(vars(self).values())[1:]))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __call__(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        q, positions, lengths, counts, tree, *rest = inputs
        sinks = rest.pop(0) if self.has_sinks else None
        others = rest[len(rest) - self.others :]
        readers, slots = self._readers(rest, lengths, counts)

        def tile(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
            keys, values = self.module(*(read(start, stop) for read in readers), *others)
            return keys, values

        return stream_attention(
            q, tile, self.width, slots, positions, lengths, counts, tree, *self.numbers, sinks
        )

    def _readers(
        self, tensors: list[torch.Tensor], lengths: torch.Tensor, counts: torch.Tensor
    ) -> tuple[list[Reader], int]:
        """A function of (start, stop) for each source, and the number of slots."""
        taken = iter(tensors)
        given = [[next(taken) for _ in range(kind.tensors)] for kind in self.kinds]
        slots: int = next(
            own[-1].shape[2] for kind, own in zip(self.kinds, given, strict=True) if kind.name == "packed"
        )
        readers: list[Reader] = []
        for kind, own in zip(self.kinds, given, strict=True):
            if kind.name == "packed":
                cut = kind.tensors - 1 - kind.constants
                store = PackedStore.of(own[:cut], own[cut:-1], kind.codec, kind.page)
                readers.append(partial(read_tile, store, lengths, counts, slots))
            elif kind.name == "plain":
                readers.append(partial(_slots_of, own[0]))
            else:
                readers.append(partial(_positions_of, lengths, counts, slots))
        return readers, slots


def _slots_of(store: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return store[:, :, start:stop]


def _positions_of(
    lengths: torch.Tensor, counts: torch.Tensor, slots: int, start: int, stop: int
) -> torch.Tensor:
    return slot_numbers(lengths, counts, slots)[:, start:stop].clamp(min=0)


_RUNNERS: dict[str, torch._ops.OpOverload] = {}


def _stream_op(runner: _Runner) -> torch._ops.OpOverload:
    """The opaque op that runs a region; alike regions share one, so that alike layers stay alike."""
    name = f"region_{runner.key}"
    if name not in _RUNNERS:
        _LIBRARY.define(f"{name}(Tensor[] inputs) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, runner, "CompositeExplicitAutograd")
        width = runner.width

        def fake(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
            q = inputs[0]
            return q.new_empty((q.shape[0], q.shape[2], q.shape[1], width))

        torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_LIBRARY)
        _RUNNERS[name] = getattr(getattr(torch.ops, _NAMESPACE), name).default
    return _RUNNERS[name]
