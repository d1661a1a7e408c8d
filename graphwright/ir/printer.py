"""Prints a graph as a Python function that runs and gives the same result.

The text is what a person reads when they ask what a pass did: one statement a call, grouped by the
module that it came from, with dtype and shape beside it, parameters under their own names.
"""

from __future__ import annotations

import builtins
import keyword
import math
import operator
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx.node import Node

from graphwright.ir.graph import Graph, module_path, sanitize

_INFIX = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.floordiv: "//",
    operator.truediv: "/",
    operator.mod: "%",
    operator.pow: "**",
}
_RESERVED = frozenset({"torch", "math", "operator", "parameters", "states", "Tensor", "forward"})


def to_python(graph: Graph) -> str:
    """The graph as the source of ``forward(<inputs>, parameters, states)``.

    ``parameters`` and ``states`` are dictionaries by qualified name. The source needs torch and
    graphwright; executing it gives the tuple that the graph returns, bit for bit.
    """
    printer = _Printer(graph)
    return "\n".join(printer.lines()) + "\n"


class _Printer:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.names: dict[Node, str] = {}
        self.symbols = _symbols(graph)
        taken = set(_RESERVED) | set(keyword.kwlist) | set(dir(builtins))
        for node in graph.nodes:
            kind = node.meta.get("kind") if node.op == "placeholder" else None
            if kind == "parameter":
                self.names[node] = f"parameters[{node.meta['name']!r}]"
            elif kind == "state":
                self.names[node] = f"states[{node.meta['name']!r}]"
            else:
                wanted = sanitize(node.meta["name"] if kind == "input" else node.name)
                self.names[node] = _unused(wanted, taken)
                taken.add(self.names[node])

    def lines(self) -> Iterator[str]:
        """The module's source, line by line."""
        yield from ("import math", "import operator", "", "import torch", "from torch import Tensor", "")
        yield "import graphwright.ir.ops  # registers torch.ops.graphwright"
        yield from ("", "")
        yield "def forward("
        for node in self.graph.placeholders("input"):
            yield f"    {self.names[node]}: Tensor,  # {self.describe(node.meta['val'])}"
        yield "    parameters: dict[str, Tensor],"
        yield "    states: dict[str, Tensor],"
        yield ") -> tuple[Tensor, ...]:"
        yield from self.signature_comment()
        path = None
        for node in self.graph.nodes:
            if node.op == "call_function":
                if module_path(node) != path:
                    path = module_path(node)
                    yield f"    # {path or 'top level'}"
                yield f"    {self.statement(node)}"
        results = ", ".join(self.render(result) for result in self.results())
        yield f"    return ({results},)"

    def signature_comment(self) -> Iterator[str]:
        """What the dictionaries hold, as comments."""
        for kind in ("parameter", "state"):
            for node in self.graph.placeholders(kind):  # type: ignore[arg-type]
                yield f"    # {self.names[node]}: {self.describe(node.meta['val'])}"

    def results(self) -> tuple[Any, ...]:
        """The graph's outputs."""
        found = self.graph.output.args[0]
        return tuple(found) if isinstance(found, list | tuple) else (found,)

    def statement(self, node: Node) -> str:
        """``name = op(arguments)  # dtype[shape]``."""
        value = node.meta.get("val")
        call = self.call(node)
        if value is None and not node.users:
            return call  # an op that only writes to a state
        return f"{self.names[node]} = {call}  # {self.describe(value)}"

    def call(self, node: Node) -> str:
        """A node's call as an expression."""
        if node.target is operator.getitem:
            return f"{self.render(node.args[0])}[{self.render(node.args[1])}]"
        if node.target in _INFIX and len(node.args) == 2:
            left, right = (self.render(a) for a in node.args)
            return f"{left} {_INFIX[node.target]} {right}"
        arguments = [self.render(a) for a in node.args]
        arguments += [f"{key}={self.render(value)}" for key, value in node.kwargs.items()]
        return f"{self.target(node.target)}({', '.join(arguments)})"

    @staticmethod
    def target(target: Any) -> str:
        """Where an op is found in Python."""
        if isinstance(target, torch._ops.OpOverload):
            namespace, name = target._schema.name.split("::")
            return f"torch.ops.{namespace}.{name}.{target._overloadname}"
        module = getattr(target, "__module__", "torch") or "torch"
        return f"{module.lstrip('_')}.{target.__name__}"

    def render(self, value: Any) -> str:
        """An argument as an expression."""
        if isinstance(value, Node):
            return self.names[value]
        if isinstance(value, tuple):
            return f"({''.join(self.render(item) + ', ' for item in value).strip()})"
        if isinstance(value, list):
            return f"[{', '.join(self.render(item) for item in value)}]"
        if isinstance(value, slice):
            return f"slice({self.render(value.start)}, {self.render(value.stop)}, {self.render(value.step)})"
        if isinstance(value, torch.device):
            return f"torch.device({str(value)!r})"
        if isinstance(value, float) and not math.isfinite(value):
            return f"float({str(value)!r})"
        return repr(value)  # numbers, strings, None, torch.float32, torch.strided, torch.contiguous_format

    def describe(self, value: Any) -> str:
        """``float32[B, T, 64]``."""
        if isinstance(value, torch.Tensor):
            sizes = ", ".join(self.size(size) for size in value.shape)
            return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"
        if isinstance(value, list | tuple):
            return f"({', '.join(self.describe(item) for item in value)})"
        return self.size(value)

    def size(self, size: Any) -> str:
        """A size with B and T for the symbols of batch and tokens."""
        return re.sub(r"[su]\d+", lambda found: self.symbols.get(found[0], found[0]), str(size))


def _symbols(graph: Graph) -> dict[str, str]:
    """The names that shapes are usually written with, by symbol: B and T of the token ids."""
    found: dict[str, str] = {}
    for node in graph.placeholders("input"):
        if node.meta["name"] == "input_ids":
            found.update(zip((str(size) for size in node.meta["val"].shape), ("B", "T"), strict=False))
    return found


def _unused(wanted: str, taken: set[str]) -> str:
    name = wanted if wanted and not wanted[0].isdigit() else f"_{wanted}"
    serial = 0
    candidate = name
    while candidate in taken:
        serial += 1
        candidate = f"{name}_{serial}"
    return candidate
