"""From dynamo's graph to functional ATen, one distinct call at a time.

Exporting a deep model node by node through AOT autograd takes longer than capturing it, although its
layers are alike. What a call expands to depends only on its target and on the metadata of its
arguments, so each distinct call is exported once and its expansion is pasted wherever it recurs. A
graph that writes in place is exported whole: there the expansion depends on aliases.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx
from torch._functorch.aot_autograd import aot_export_module
from torch.fx.node import Node, map_aggregate
from torch.utils._pytree import tree_flatten, tree_unflatten


def export_aten(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Functional, pre-dispatch ATen for a dynamo graph; same placeholders in the same order.

    Every node carries ``meta["val"]`` and the ``nn_module_stack`` of the call that it came from.
    """
    if any(needs_whole_export(node) for node in gm.graph.nodes):
        return _export_module(gm, [n.meta["example_value"] for n in gm.graph.find_nodes(op="placeholder")])
    return _Exporter(gm).run()


_IN_PLACE_OPERATORS = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.ipow,
    operator.imod, operator.iand, operator.ior, operator.ixor, operator.setitem,
}  # fmt: skip


def needs_whole_export(node: Node) -> bool:
    """Whether a call of dynamo's graph may write in place, or refers to something outside the graph."""
    if node.op in ("get_attr", "call_module"):
        return True
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    if node.target in _IN_PLACE_OPERATORS or "out" in node.kwargs or node.kwargs.get("inplace") is True:
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    return name.endswith("_") and not name.startswith("_") and not name.endswith("__")


def _export_module(module: torch.nn.Module, fakes: list[Any]) -> torch.fx.GraphModule:
    with torch.no_grad():
        exported, _ = aot_export_module(module, fakes, trace_joint=False, pre_dispatch=True)
    return exported


class _Exporter:
    """Builds the ATen graph by pasting expansions. ``values`` maps dynamo nodes to trees of new nodes."""

    def __init__(self, gm: torch.fx.GraphModule) -> None:
        self.gm = gm
        self.graph = torch.fx.Graph()
        self.values: dict[Node, Any] = {}
        self.sizes: dict[Any, Node] = {}
        self.expansions: dict[Any, torch.fx.GraphModule] = {}

    def run(self) -> torch.fx.GraphModule:
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "output":
                self.graph.output(self._mapped(node.args[0]))
            elif not node.users:
                continue
            elif _is_structure(node):
                self.values[node] = self._structure(node)
            elif _only_sizes(node):
                self._copy_size_arithmetic(node)
            else:
                self._paste(node)
        return torch.fx.GraphModule(torch.nn.Module(), self.graph)

    def _placeholder(self, node: Node) -> None:
        new = self.graph.placeholder(node.name)
        new.meta["val"] = value = node.meta["example_value"]
        self.values[node] = new
        if isinstance(value, torch.SymInt):
            self.sizes.setdefault(value.node.expr, new)

    def _mapped(self, args: Any) -> Any:
        return map_aggregate(args, lambda a: self.values[a] if isinstance(a, Node) else a)

    def _structure(self, node: Node) -> Any:
        args = self._mapped(node.args)
        if node.target is torch.Size:
            return tuple(args[0])
        return args[0][args[1]]

    def _copy_size_arithmetic(self, node: Node) -> None:
        new = self.graph.call_function(node.target, self._mapped(node.args), self._mapped(node.kwargs))  # type: ignore[arg-type]
        new.meta["val"] = node.meta["example_value"]
        self.values[node] = new

    def _paste(self, node: Node) -> None:
        leaves, spec = tree_flatten((self._mapped(node.args), self._mapped(node.kwargs)))
        inputs = [leaf for leaf in leaves if isinstance(leaf, Node)]
        key = (node.op, node.target, spec, tuple(_signature(leaf) for leaf in leaves))
        if key not in self.expansions:
            self.expansions[key] = self._expand(node, leaves, spec)
        flat = self._inline(self.expansions[key], inputs, node)
        _, structure = tree_flatten(node.meta["example_value"])
        self.values[node] = tree_unflatten(flat, structure)

    def _expand(self, node: Node, leaves: list[Any], spec: Any) -> torch.fx.GraphModule:
        """Export one call as a module of its own, with its node arguments as inputs."""
        graph = torch.fx.Graph()
        fakes: list[Any] = []
        names = []
        for leaf in leaves:
            if isinstance(leaf, Node):
                fakes.append(leaf.meta["val"])
                names.append(graph.placeholder(f"a{len(fakes)}"))
        # The graph's size inputs come along, so that every symbol in a shape has a source.
        for size in self.sizes.values():
            fakes.append(size.meta["val"])
            graph.placeholder(f"a{len(fakes)}")
        stand_ins = iter(names)
        rebuilt = tree_unflatten([next(stand_ins) if isinstance(x, Node) else x for x in leaves], spec)
        args, kwargs = rebuilt
        call = graph.create_node(node.op, node.target, tuple(args), kwargs)
        outputs = call
        if isinstance(node.meta["example_value"], tuple | list):
            outputs = [
                graph.call_function(_getitem, (call, i)) for i in range(len(node.meta["example_value"]))
            ]  # type: ignore[assignment]
        graph.output(tuple(outputs) if isinstance(outputs, list) else (outputs,))
        return _export_module(torch.fx.GraphModule(torch.nn.Module(), graph), fakes)

    def _inline(self, expansion: torch.fx.GraphModule, inputs: list[Node], origin: Node) -> list[Any]:
        mapping: dict[Node, Any] = {}
        sources = [*inputs, *self.sizes.values()]
        placeholders = expansion.graph.find_nodes(op="placeholder")
        for old, new in zip(placeholders, sources, strict=True):
            mapping[old] = new
        for old in expansion.graph.nodes:
            if old.op == "placeholder":
                continue
            if old.op == "output":
                return [mapping[x] if isinstance(x, Node) else x for x in old.args[0]]
            if old.op == "get_attr":
                raise RuntimeError(f"graphwright: a constant tensor inside {origin.target}")
            value = old.meta.get("val")
            if isinstance(value, torch.SymInt) and value.node.expr in self.sizes:
                mapping[old] = self.sizes[value.node.expr]
                continue
            new = self.graph.node_copy(old, lambda n: mapping[n])
            new.meta = {"val": value, "nn_module_stack": origin.meta.get("nn_module_stack")}
            if "stack_trace" in origin.meta:
                new.meta["stack_trace"] = origin.meta["stack_trace"]
            mapping[old] = new
        raise AssertionError("an exported graph has an output")


def _getitem(sequence: Any, index: int) -> Any:
    return sequence[index]


def _is_structure(node: Node) -> bool:
    """Calls that only arrange values: building a size, picking from a tuple of tensors."""
    if node.target is torch.Size:
        return True
    is_getitem = getattr(node.target, "__name__", "") == "getitem"
    first = node.args[0] if node.args else None
    return (
        node.op == "call_function"
        and is_getitem
        and isinstance(first, Node)
        and isinstance(first.meta.get("example_value"), tuple | list)
    )


def _only_sizes(node: Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.SymInt | torch.SymBool | torch.SymFloat | bool | int | float)


def _signature(leaf: Any) -> Any:
    """What the expansion of a call depends on: metadata of tensors and sizes, constants by value."""
    if not isinstance(leaf, Node):
        return (type(leaf).__name__, repr(leaf))
    value = leaf.meta["val"]
    if isinstance(value, torch.Tensor):
        strides = tuple(map(str, value.stride()))
        return (value.dtype, value.device, tuple(map(str, value.shape)), strides, type(value).__name__)
    return str(value)
