"""Cut the step into pieces, one a decoder layer, so that alike layers are compiled once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
from torch.fx.node import Node, map_arg

from graphwright.ir.graph import Graph, is_impure, is_tensor
from graphwright.runtime.lowering.kernels import layer_of


@dataclass
class Piece:
    """A run of nodes as a module of its own.

    Attributes:
        module: takes ``inputs`` in order, returns ``outputs`` in order.
        inputs, outputs: nodes of the whole graph.
        structure: equal for pieces that differ in their tensors only.
    """

    module: torch.fx.GraphModule
    inputs: list[Node]
    outputs: list[Node]
    structure: tuple[Any, ...] = field(repr=False)


def split_layers(graph: Graph, apart: Mapping[Node, str] | None = None) -> list[Piece]:
    """Pieces in execution order: before the layers, each layer, after the layers.

    Args:
        apart: nodes that are pieces of their own, by the name of the piece.
    """
    nodes = [n for n in graph.nodes if n.op == "call_function" and _carries_data(n)]
    layers = [(apart or {}).get(n) or layer_of(n) for n in nodes]
    last = max((i for i, layer in enumerate(layers) if layer is not None), default=len(nodes))
    groups: list[list[Node]] = []
    current: Any = None
    for index, (node, layer) in enumerate(zip(nodes, layers, strict=True)):
        if index > last:
            key: Any = "tail"
        else:  # a node outside the layer list joins the layer it stands in
            key = current if layer is None else layer
        if not groups or key != current:
            groups.append([])
            current = key
        groups[-1].append(node)
    return [_piece(graph, group) for group in groups]


def _carries_data(node: Node) -> bool:
    """Tensors, tuples of tensors and writes; sizes are rebuilt where they are needed."""
    return is_tensor(node) or is_impure(node) or isinstance(node.meta.get("val"), tuple | list)


def _piece(graph: Graph, nodes: list[Node]) -> Piece:
    inside = set(nodes)
    inputs: dict[Node, None] = {}
    for node in nodes:
        for used in node.all_input_nodes:
            if used not in inside and _carries_data(used):
                inputs.setdefault(used)
    outputs = [n for n in nodes if is_tensor(n) and any(user not in inside for user in n.users)]
    builder = Builder(list(inputs))
    for node in nodes:
        builder.copy(node)
    module = builder.finish(outputs)
    return Piece(module, list(inputs), outputs, structure(module.graph))


class Builder:
    """Copies nodes into a graph of their own; sizes come from the shapes of its inputs."""

    def __init__(self, inputs: list[Node]) -> None:
        self.graph = torch.fx.Graph()
        self.mapping: dict[Node, Any] = {}
        self.sizes: dict[str, tuple[Node, int]] = {}
        for i, node in enumerate(inputs):
            new = self.graph.placeholder(f"input_{i}")
            new.meta["val"] = node.meta["val"]
            self.mapping[node] = new
            for dim, size in enumerate(getattr(node.meta["val"], "shape", ())):
                if isinstance(size, torch.SymInt):
                    self.sizes.setdefault(str(size), (new, dim))

    def copy(self, node: Node) -> None:
        for used in node.all_input_nodes:
            if used not in self.mapping:
                self.mapping[used] = self._size(used)
        new = self.graph.node_copy(node, self.mapping.__getitem__)
        new.meta = {"val": node.meta["val"]}
        self.mapping[node] = new

    def _size(self, node: Node) -> Node:
        """A symbolic size, from an input's shape or by copying the arithmetic that made it."""
        size = node.meta["val"]
        if str(size) in self.sizes:
            source, dim = self.sizes[str(size)]
            new = self.graph.call_function(torch.ops.aten.sym_size.int, (source, dim))
        else:
            for used in node.all_input_nodes:
                if used not in self.mapping:
                    self.mapping[used] = self._size(used)
            new = self.graph.node_copy(node, self.mapping.__getitem__)
        new.meta = {"val": size}
        return new

    def finish(self, outputs: list[Node]) -> torch.fx.GraphModule:
        self.graph.output(tuple(self.mapping[n] for n in outputs))
        return torch.fx.GraphModule(torch.nn.Module(), self.graph)


def structure(graph: torch.fx.Graph) -> tuple[Any, ...]:
    """Everything that matters to a compiler, with nodes by number instead of name."""
    number = {node: i for i, node in enumerate(graph.nodes)}
    rows: list[Any] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            rows.append(_metadata(node.meta["val"]))
        else:
            args = map_arg((node.args, node.kwargs), lambda n: f"%{number[n]}")
            rows.append((node.op, str(node.target), repr(args)))
    return tuple(rows)


def _metadata(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        strides = tuple(map(str, value.stride()))
        return (str(value.dtype), str(value.device), tuple(map(str, value.shape)), strides)
    return str(value)
