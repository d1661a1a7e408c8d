"""What raisers edit the graph with, and the report that canonicalization returns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import Argument, Node

from graphwright.ir.graph import Graph, module_path, value
from graphwright.ir.layout import same_layout
from graphwright.ir.matcher import FAMILIES

aten = torch.ops.aten


@dataclass(frozen=True)
class NearMiss:
    """Something that looked like a semantic op and is not one.

    Args:
        op: the semantic op that was expected.
        node: name of the node where the resemblance ends.
        module: qualified name of the module that the node came from.
        reason: what differs.
    """

    op: str
    node: str
    module: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op} at {self.node} ({self.module or 'top level'}): {self.reason}"


@dataclass
class CanonicalizationReport:
    """What canonicalization found.

    Args:
        counts: calls of each semantic op in the canonical graph.
        near_misses: what looked like a semantic op and stayed as it was.
        simplified: how often each cleanup rule applied.
    """

    counts: dict[str, int] = field(default_factory=dict)
    near_misses: list[NearMiss] = field(default_factory=list)
    simplified: dict[str, int] = field(default_factory=dict)


class Rewriter:
    """Edits a graph for the raisers and keeps its metadata true."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._misses: list[tuple[str, Node, str]] = []
        self.simplified: Counter[str] = Counter()
        self._moved: set[Node] = set()  # nodes whose inputs changed their strides
        _adopt_one_mode(graph)

    def replace(
        self, old: Node, target: Callable[..., Any] | str, *args: Argument, **kwargs: Argument
    ) -> Node:
        """Put a call in the place of ``old`` and send all its uses there."""
        new = self.graph.emit(target, *args, before=old, **kwargs)
        self.redirect(old, new)
        return new

    def redirect(self, old: Node, new: Node) -> None:
        """Send every use of ``old`` to ``new``, a node that computes the same."""
        if not same_layout(value(old), value(new)):
            self._moved.update(old.users)
        old.replace_all_uses_with(new)
        self._moved.discard(new)

    def near_miss(self, op: str, node: Node, reason: str) -> None:
        """Report something that looked like ``op``."""
        self._misses.append((op, node, reason))

    @property
    def near_misses(self) -> list[NearMiss]:
        """What was reported, with the names that the nodes have now."""
        return [NearMiss(op, node.name, module_path(node), reason) for op, node, reason in self._misses]

    def settle(self) -> None:
        """Drop dead nodes and bring the strides in ``meta["val"]`` up to date.

        A raised op gives contiguous results where the original kept its input's strides, so a view
        further on can become impossible; such a view turns into a reshape, which copies if it must.
        """
        self.graph.eliminate_dead_code()
        moved = {node for node in self._moved if node.graph is self.graph.fx and not node._erased}
        self._moved = set()
        if not moved:
            return
        for node in list(self.graph.nodes):
            if node not in moved or node.op != "call_function":
                continue
            fresh = self._infer(node)
            before = node.meta["val"]
            node.meta["val"] = fresh
            if not _same_layouts(before, fresh):
                moved.update(node.users)

    def _infer(self, node: Node) -> Any:
        if node.target is aten.view.default:
            try:
                return self.graph.infer(node)
            except (RuntimeError, ValueError):
                node.target = aten.reshape.default
        return self.graph.infer(node)


def _adopt_one_mode(graph: Graph) -> None:
    """Make every fake tensor belong to one mode: dynamo gives placeholders another than the rest."""
    modes = Counter(node.meta["val"].fake_mode for node in graph.nodes if _is_fake(node))
    if len(modes) < 2:
        return
    graph.fake_mode = modes.most_common(1)[0][0]
    for node in graph.nodes:
        if _is_fake(node) and node.meta["val"].fake_mode is not graph.fake_mode:
            old = node.meta["val"]
            with graph.fake_mode:
                node.meta["val"] = torch.empty_strided(
                    old.shape, old.stride(), dtype=old.dtype, device=old.device
                )


def _is_fake(node: Node) -> bool:
    return isinstance(node.meta.get("val"), FakeTensor)


def _same_layouts(before: Any, after: Any) -> bool:
    if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
        return same_layout(before, after)
    if isinstance(before, list | tuple):
        return all(_same_layouts(a, b) for a, b in zip(before, after, strict=True))
    return True


def name_in_order(graph: Graph) -> None:
    """Name calls after their ops, numbered in execution order: ``linear``, ``linear_1``, ..."""
    namespace = torch.fx.graph._Namespace()
    for node in graph.nodes:
        base = node.name
        if isinstance(node.target, torch._ops.OpOverload):
            base = node.target._schema.name.split("::")[1]
        node.name = namespace.create_name(base, node)
    graph.fx._graph_namespace = namespace


def is_weight(node: object) -> bool:
    """Whether a node is a parameter, or a view or cast of one: known before anything runs."""
    while isinstance(node, Node) and node.op == "call_function" and node.target in _DERIVING:
        node = node.args[0]
    return isinstance(node, Node) and node.op == "placeholder" and node.meta.get("kind") == "parameter"


_DERIVING = (
    FAMILIES["cast"].targets
    | FAMILIES["view"].targets
    | frozenset(
        {
            aten.t.default,
            aten.transpose.int,
            aten.permute.default,
            aten.slice.Tensor,
            aten.select.int,
            aten.alias.default,
        }
    )
)
