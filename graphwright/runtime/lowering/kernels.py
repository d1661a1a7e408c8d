"""Turn semantic ops into the calls that run: expand what compiles well, select kernels for the rest."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.node import Node

from graphwright.ir.graph import Graph, argument, module_path, op_name, value
from graphwright.ir.ops import SEMANTIC_OPS
from graphwright.ir.page_lists import BEFORE_LISTS
from graphwright.kernels.registry import REFERENCE, Kernel, select

_ACTIVATION_CALLS = {
    "silu": (torch.ops.aten.silu.default, {}),
    "gelu": (torch.ops.aten.gelu.default, {}),
    "gelu_tanh": (torch.ops.aten.gelu.default, {"approximate": "tanh"}),
    "relu": (torch.ops.aten.relu.default, {}),
}
# The ops that kernels are chosen for; the others are plain arithmetic that Inductor fuses.
KERNEL_OPS = (
    "linear", "linear_group", "routed_linear", "attention", "cache_append", "cache_attention",
    "append_attention", "rotary_append", "packed_attention", "prefix_attention", "score_pages",
    "choose_pages",
)  # fmt: skip


@dataclass(frozen=True)
class KernelUse:
    """One line of the report: an op, who runs it, how often, and why."""

    op: str
    provider: str
    sites: int
    reason: str


def expand_feed_forward(graph: Graph) -> None:
    """``gated_mlp`` and ``mlp`` as linears around an activation, so that linears can share a launch."""
    for node in graph.calls("gated_mlp"):
        x, gate, up, down = (argument(node, name) for name in ("x", "gate", "up", "down"))
        gated = graph.emit("linear", x, gate, argument(node, "gate_bias"), before=node)
        raised = graph.emit("linear", x, up, argument(node, "up_bias"), before=node)
        hidden = graph.emit(torch.ops.aten.mul.Tensor, _activation(graph, gated, node), raised, before=node)
        _finish(graph, node, graph.emit("linear", hidden, down, argument(node, "down_bias"), before=node))
    for node in graph.calls("mlp"):
        x, up, down = (argument(node, name) for name in ("x", "up", "down"))
        raised = graph.emit("linear", x, up, argument(node, "up_bias"), before=node)
        hidden = _activation(graph, raised, node)
        _finish(graph, node, graph.emit("linear", hidden, down, argument(node, "down_bias"), before=node))


def _activation(graph: Graph, x: Node, mlp: Node) -> Node:
    call, options = _ACTIVATION_CALLS[argument(mlp, "activation")]
    return graph.emit(call, x, before=mlp, **options)


def _finish(graph: Graph, old: Node, new: Node) -> None:
    graph.replace(old, new)
    graph.fx.erase_node(old)


def group_linears(graph: Graph) -> None:
    """Linears of one module tree that read the same tensor become one ``linear_group``."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    readers: dict[Node, list[Node]] = {}
    for node in graph.calls("linear"):
        readers.setdefault(argument(node, "x"), []).append(node)
    for x, linears in readers.items():
        first = min(linears, key=order.__getitem__)
        ready = [n for n in linears if _ready(n, order[first], order)]
        if len(ready) < 2:
            continue
        weights = [argument(n, "weight") for n in ready]
        biases = [argument(n, "bias") for n in ready]
        group = graph.emit("linear_group", x, weights, biases, before=first)
        parts = [graph.emit(operator.getitem, group, i, before=first) for i in range(len(ready))]
        for node, part in zip(ready, parts, strict=True):
            _finish(graph, node, part)


def _ready(node: Node, position: int, order: dict[Node, int]) -> bool:
    """Whether all inputs of a linear but x exist at a position."""
    others = [argument(node, "weight"), argument(node, "bias")]
    return all(n is None or order[n] <= position for n in others)


def fuse_appends(graph: Graph) -> None:
    """``cache_append`` of keys and values followed by ``cache_attention`` becomes one launch."""
    for node in graph.calls("cache_attention"):
        keys, values = argument(node, "keys"), argument(node, "values")
        appends = [a for a in graph.calls("cache_append") if a.args[0] in (keys, values)]
        if argument(node, "pages") is not None:
            continue  # which pages to read is found out in between
        if keys is values or len(appends) != 2 or {a.args[0] for a in appends} != {keys, values}:
            continue
        if any(len(store.users) != 2 for store in (keys, values)):
            continue
        new = {a.args[0]: a.args[1] for a in appends}
        given = [argument(node, name) for name in BEFORE_LISTS]
        fused = graph.emit("append_attention", given[0], new[keys], new[values], *given[1:], before=node)
        _finish(graph, node, fused)
        for append in appends:
            graph.fx.erase_node(append)


def fuse_rotary_appends(graph: Graph, device: torch.device) -> None:
    """Rotary embeddings of queries and keys with both appends of their attention become one launch.

    Only where a kernel of the device does that. What attention reads may be the stores themselves or
    packed stores, whose tails are then what is appended to.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    appends: dict[Node, list[Node]] = {}
    for node in graph.calls("cache_append"):
        appends.setdefault(argument(node, "store"), []).append(node)
    for attention in graph.calls("cache_attention", "prefix_attention", "prefill_attention"):
        stores = [_written(argument(attention, name)) for name in ("keys", "values")]
        found = [appends.get(store, []) for store in stores]
        if stores[0] is stores[1] or any(len(own) != 1 for own in found):
            continue
        q, keys, values = argument(attention, "q"), found[0][0], found[1][0]
        k, last = argument(keys, "new"), max((q, keys, values), key=order.__getitem__)
        readers = {user for store in stores for user in store.users} - {keys, values}
        if not _rotate_alike(q, k) or not _append_alike(keys, values, attention):
            continue
        if any(order[user] < order[last] for user in q.users):
            continue
        if any(order[reader] < order[last] for reader in readers):
            continue
        inputs = [argument(q, "x"), argument(k, "x"), argument(values, "new")]
        inputs += [argument(q, "cos"), argument(q, "sin"), *stores]
        inputs += [argument(keys, "lengths"), argument(keys, "counts"), argument(q, "layout")]
        fused = graph.emit("rotary_append", *inputs, after=last)
        if select("rotary_append", device, **_fake_arguments(fused)).provider == REFERENCE:
            graph.fx.erase_node(fused)
            continue
        _finish(graph, q, fused)
        for node in (keys, values, k):
            graph.fx.erase_node(node)
        for store in stores:
            del appends[store]


def _written(read: Node) -> Node:
    """What tokens are appended to where attention reads ``read``."""
    if op_name(read) != "cache_read":
        return read
    tail: Node = argument(read, "store")[1]
    return tail


def _rotate_alike(q: Node, k: Node) -> bool:
    """Whether both are rotated by the same angles, and keys are used once."""
    if any(op_name(n) != "rotary" for n in (q, k)) or len(k.users) != 1:
        return False
    return all(argument(q, name) == argument(k, name) for name in ("cos", "sin", "layout"))


def _append_alike(*nodes: Node) -> bool:
    """Whether these are of the same step."""
    return all(len({argument(node, name) for node in nodes}) == 1 for name in ("lengths", "counts"))


def select_kernels(graph: Graph, device: torch.device) -> list[KernelUse]:
    """Give every kernel op its implementation for the device; the choice and its reason are returned."""
    uses: Counter[tuple[str, str, str]] = Counter()
    chosen: dict[object, Kernel] = {}
    for node in graph.calls(*KERNEL_OPS):
        name = op_name(node)
        assert name is not None
        key = (name, tuple(_signature(a) for a in node.args), tuple(node.kwargs.items()))
        if key not in chosen:
            chosen[key] = select(name, device, **_fake_arguments(node))
        kernel = chosen[key]
        node.target = kernel.op
        uses[name, kernel.provider, kernel.reason] += 1
    return [KernelUse(op, provider, n, reason) for (op, provider, reason), n in uses.items()]


def _fake_arguments(node: Node) -> dict[str, Any]:
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    found = {}
    for spec in target._schema.arguments:
        found[spec.name] = torch.fx.node.map_arg(argument(node, spec.name), lambda n: n.meta["val"])
    return found


def _signature(arg: object) -> object:
    if isinstance(arg, Node):
        fake = value(arg)
        return (fake.dtype, str(tuple(fake.shape)), str(fake.stride()))
    if isinstance(arg, list | tuple):
        return tuple(_signature(a) for a in arg)
    return arg


def semantic_name(node: Node) -> str | None:
    """The semantic op that a call implements, whoever provides it."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return None
    name = target._schema.name.split("::")[1]
    return name if target.namespace.startswith("graphwright") and name in SEMANTIC_OPS else None


def layer_of(node: Node) -> tuple[str, int] | None:
    """``("model.layers", 3)`` for a node of ``model.layers.3.self_attn``; None outside a layer list."""
    parts = module_path(node).split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:i]), int(part)
    return None
