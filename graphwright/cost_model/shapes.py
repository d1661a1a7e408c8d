"""Shapes of a graph's tensors as expressions in batch, context and tokens."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx.node import Node
from torch.utils._sympy.functions import FloorDiv

from graphwright.cost_model.cost import ACTIVATIONS, CACHE, WEIGHTS, B, C, Expr, T
from graphwright.cost_model.listed_pages import Listing
from graphwright.cost_model.streaming import find_streaming
from graphwright.ir.graph import Graph, argument, op_name

# Not marked as views by their schema, and free all the same in a compiled program.
_FREE = (
    "aten._unsafe_view.default",
    "aten.reshape.default",
    "aten.dropout.default",
    "aten.flatten.using_ints",
)
# Any batch, context and tokens tell which of two sizes is the larger one.
_PROBE = {B: 7, C: 1000, T: 3}


class Shapes:
    """Reads fake tensors; what dynamo calls ``s44`` and ``s70`` become B and T.

    The batch and the tokens are the dimensions of ``input_ids``. A cache's batch is B too, a summary has
    an entry for so many tokens of the context; any other free size is a cache's number of slots and is
    priced as the context C.

    Attributes:
        streaming: what of the graph is read from packed stores.
        compiled: whether it will be compiled.
    """

    def __init__(self, graph: Graph) -> None:
        self.streaming = find_streaming(graph)
        self.compiled = bool(graph.annotations.get("compile", True))
        self._symbols: dict[Any, Any] = {}
        self._memo: dict[tuple[Any, ...], tuple[Expr, ...]] = {}
        inputs = graph.placeholders("input")
        ids = next((n for n in inputs if n.meta["name"] == "input_ids"), inputs[0] if inputs else None)
        if ids is not None:
            self._bind(ids, (B, T))
        for state in graph.placeholders("state"):
            about = state.meta.get("store", {})
            pages = (C / (about["page"] * about["span"]),) if about.get("role") == "summary" else ()
            self._bind(state, (B, *pages))

    def _bind(self, node: Node, symbols: tuple[Any, ...]) -> None:
        val = node.meta["val"]
        if not isinstance(val, torch.Tensor):
            return
        for size, symbol in zip(val.shape, symbols, strict=False):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                self._symbols.setdefault(size.node.expr, symbol)

    def expr(self, size: int | torch.SymInt) -> Expr:
        """One size as an expression in B, C and T."""
        if not isinstance(size, torch.SymInt):
            return sympy.Integer(int(size))
        found = size.node.expr
        # A floored quotient is priced as the quotient: bytes need no rounding, and sums stay simple.
        found = found.replace(FloorDiv, lambda base, divisor: base / divisor)
        return found.xreplace({symbol: self._symbols.get(symbol, C) for symbol in found.free_symbols})

    def shape(self, tensor: torch.Tensor) -> tuple[Expr, ...]:
        """All sizes of a fake tensor."""
        key = tuple(size if isinstance(size, int) else size.node.expr for size in tensor.shape)
        if key not in self._memo:
            self._memo[key] = tuple(self.expr(size) for size in tensor.shape)
        return self._memo[key]

    def numel(self, tensor: torch.Tensor) -> Expr:
        """How many elements a fake tensor has."""
        return sympy.Mul(*self.shape(tensor))

    def nbytes(self, tensor: torch.Tensor) -> Expr:
        """How many bytes a fake tensor has."""
        return self.numel(tensor) * tensor.dtype.itemsize


def tensors(node: Node) -> list[torch.Tensor]:
    """The fake tensors that a node produces: none, one or several."""
    val = node.meta.get("val")
    if isinstance(val, torch.Tensor):
        return [val]
    if isinstance(val, (list, tuple)):
        return [item for item in val if isinstance(item, torch.Tensor)]
    return []


def is_free(node: Node) -> bool:
    """Whether a call computes nothing: views, arithmetic on sizes, taking one of several results."""
    if node.op != "call_function":
        return True
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return True
    if not tensors(node) and not target._schema.is_mutable:
        return True
    aliases = [r.alias_info for r in target._schema.returns]
    is_view = bool(aliases) and all(a is not None and not a.is_write for a in aliases)
    return is_view or op_name(node) in _FREE


def source(node: Node) -> Node:
    """The node that computed (or holds) a value, found through views."""
    while node.op == "call_function" and is_free(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def kind_of(node: Node) -> str:
    """``weights`` for parameters, ``cache`` for state, ``activations`` for what was computed."""
    kind = source(node).meta.get("kind")
    return {"parameter": WEIGHTS, "state": CACHE}.get(kind, ACTIVATIONS)


def larger(first: Expr, second: Expr) -> Expr:
    """The larger of two sizes, told at one ordinary batch, context and number of tokens."""
    return first if first.xreplace(_PROBE) >= second.xreplace(_PROBE) else second


class Call:
    """One op call, with its arguments by schema name and their sizes as expressions."""

    def __init__(self, node: Node, shapes: Shapes) -> None:
        self.node = node
        self.shapes = shapes

    def arg(self, name: str) -> Any:
        """An argument by its name in the schema."""
        return argument(self.node, name)

    def nodes(self, *names: str) -> list[Node]:
        """The tensor arguments of these names, lists flattened, None left out."""
        found: list[Node] = []
        for name in names:
            given = self.arg(name)
            items = given if isinstance(given, (list, tuple)) else (given,)
            found.extend(item for item in items if isinstance(item, Node))
        return found

    def val(self, name: str) -> torch.Tensor:
        """The fake tensor of an argument."""
        return self.arg(name).meta["val"]

    def shape(self, name: str) -> tuple[Expr, ...]:
        """The shape of an argument."""
        return self.shapes.shape(self.val(name))

    def numel(self, name: str) -> Expr:
        """The number of elements of an argument."""
        return self.shapes.numel(self.val(name))

    @property
    def streams(self) -> bool:
        """Whether this is an attention over packed stores."""
        return self.node in self.shapes.streaming.attentions

    @property
    def in_kernel(self) -> bool:
        """Whether it is part of one kernel that reads packed stores and attends over them."""
        return self.node in self.shapes.streaming.in_kernel

    @property
    def listing(self) -> Listing | None:
        """The lists of pages that it reads a cache by; None if it reads everything."""
        return self.shapes.streaming.listings.get(self.node)

    @property
    def outputs(self) -> list[torch.Tensor]:
        """What the call produces."""
        return tensors(self.node)

    def out_numel(self) -> Expr:
        """Elements of all results."""
        return sympy.Add(*(self.shapes.numel(t) for t in self.outputs))

    def reads(self, *names: str) -> dict[str, Expr]:
        """Bytes of whole arguments, by kind."""
        return read_parts(self.shapes, self.nodes(*names))

    def writes(self) -> dict[str, Expr]:
        """Bytes of the results, as activations."""
        return {ACTIVATIONS: sympy.Add(*(self.shapes.nbytes(t) for t in self.outputs))}

    def dtype(self, name: str) -> str:
        """The dtype name of an argument, e.g. ``bfloat16``."""
        return dtype_name(self.val(name).dtype)


def read_parts(shapes: Shapes, nodes: list[Node]) -> dict[str, Expr]:
    """Bytes of values, by kind."""
    parts: dict[str, Expr] = {}
    for node in nodes:
        for tensor in tensors(node):
            kind = kind_of(node)
            parts[kind] = parts.get(kind, sympy.Integer(0)) + shapes.nbytes(tensor)
    return parts


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")
