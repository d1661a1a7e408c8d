"""A small pattern language over ATen nodes.

A pattern says what is computed and not how it was spelled: ``mul`` matches tensor and scalar
overloads in either order, ``casts`` looks through any number of dtype conversions, a capture that
occurs twice must be the same node. One meaning is one pattern.

Patterns are values that are built from functions::

    x = capture("x")
    variance = mean_last(square(x))
    pattern = mul(x, inverse_root(add(variance, scalar("eps"))))
    for match in find(graph, pattern):
        match["x"], match["eps"], match.root

**Sharing rule.** All ops in patterns are pure, so replacing a match's root never changes what others
read from its interior: they keep their nodes. But then the interior runs twice. A match is therefore
refused (:meth:`Match.refusal`) when an interior node that does arithmetic is read from outside the
match; views, slices and casts are free or nearly so and may be shared.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.node import Node

from graphwright.ir.graph import Graph, argument, value
from graphwright.ir.layout import same_shape

aten = torch.ops.aten


@dataclass(frozen=True)
class Family:
    """Overloads that mean the same.

    Args:
        targets: the overloads.
        operands: names of the schema arguments that are the operands, in order.
        commutative: whether two operands may be swapped.
        where: further conditions on a node, e.g. that ``alpha`` is 1.
    """

    targets: frozenset[Any]
    operands: tuple[str, ...]
    commutative: bool = False
    where: Callable[[Node], bool] = lambda node: True


def _no_alpha(node: Node) -> bool:
    return bool(argument(node, "alpha") == 1)


def _over_last(node: Node) -> bool:
    dims, rank = argument(node, "dim"), value(node.args[0]).dim()
    return len(dims) == 1 and dims[0] % rank == rank - 1 and bool(argument(node, "keepdim"))


def _joins_last(node: Node) -> bool:
    return bool(argument(node, "dim") % value(node).dim() == value(node).dim() - 1)


def _pointwise(name: str) -> Family:
    packet = getattr(aten, name)
    targets = (getattr(packet, overload) for overload in packet.overloads() if "out" not in overload)
    return Family(frozenset(targets), ("self",))


FAMILIES: dict[str, Family] = {
    "mul": Family(frozenset({aten.mul.Tensor, aten.mul.Scalar}), ("self", "other"), commutative=True),
    "add": Family(
        frozenset({aten.add.Tensor, aten.add.Scalar}), ("self", "other"), commutative=True, where=_no_alpha
    ),
    "sub": Family(frozenset({aten.sub.Tensor, aten.sub.Scalar}), ("self", "other"), where=_no_alpha),
    "div": Family(frozenset({aten.div.Tensor, aten.div.Scalar}), ("self", "other")),
    "pow": Family(frozenset({aten.pow.Tensor_Scalar}), ("self", "exponent")),
    "mean_last": Family(frozenset({aten.mean.dim}), ("self",), where=_over_last),
    "cat_last": Family(frozenset({aten.cat.default}), ("tensors",), where=_joins_last),
    "stack_last": Family(frozenset({aten.stack.default}), ("tensors",), where=_joins_last),
    "slice": Family(frozenset({aten.slice.Tensor}), ("self",)),
    "neg": _pointwise("neg"),
    "rsqrt": _pointwise("rsqrt"),
    "sqrt": _pointwise("sqrt"),
    "square": _pointwise("square"),
    "reciprocal": _pointwise("reciprocal"),
    "cast": Family(
        frozenset(
            {
                aten._to_copy.default,
                aten.to.dtype,
                aten.to.dtype_layout,
                aten.to.other,
                aten.type_as.default,
                torch.ops.prims.convert_element_type.default,
            }
        ),
        ("self",),
    ),
    "view": Family(
        frozenset(
            {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints}
        ),
        ("self",),
    ),
}

# Nodes of these targets move or convert data and do no arithmetic: see the sharing rule.
FREE: frozenset[Any] = (
    FAMILIES["cast"].targets
    | FAMILIES["view"].targets
    | FAMILIES["slice"].targets
    | frozenset(
        {
            aten.transpose.int,
            aten.permute.default,
            aten.t.default,
            aten.unsqueeze.default,
            aten.squeeze.dim,
            aten.expand.default,
            aten.select.int,
            aten.alias.default,
        }
    )
)


def is_a(node: object, family: str) -> bool:
    """Whether ``node`` is a call of the family."""
    if not isinstance(node, Node) or node.op != "call_function":
        return False
    found = FAMILIES[family]
    return node.target in found.targets and found.where(node)


# --- patterns --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What a partial match has bound so far, and the nodes that it runs through."""

    bindings: Mapping[str, Any]
    nodes: frozenset[Node]


EMPTY = Found({}, frozenset())


class Pattern(ABC):
    """Something that a value in the graph can match, possibly in several ways."""

    @abstractmethod
    def match(self, candidate: Any, found: Found) -> Iterator[Found]:
        """Every way in which ``candidate`` (a node or a constant) extends ``found``."""


@dataclass(frozen=True)
class Capture(Pattern):
    """Binds a node to a name; a second occurrence must be the same node."""

    name: str
    where: Callable[[Node], bool] | None = None

    def match(self, candidate: Any, found: Found) -> Iterator[Found]:
        if not isinstance(candidate, Node):
            return
        if self.name in found.bindings:
            if found.bindings[self.name] is candidate:
                yield found
        elif self.where is None or self.where(candidate):
            yield Found({**found.bindings, self.name: candidate}, found.nodes)


@dataclass(frozen=True)
class Scalar(Pattern):
    """A number written into the graph; ``equals`` holds up to a relative 1e-6."""

    name: str | None = None
    equals: float | None = None

    def match(self, candidate: Any, found: Found) -> Iterator[Found]:
        if isinstance(candidate, bool) or not isinstance(candidate, int | float):
            return
        if self.equals is not None and not math.isclose(candidate, self.equals, rel_tol=1e-6):
            return
        if self.name is None:
            yield found
        elif found.bindings.get(self.name, candidate) == candidate:
            yield Found({**found.bindings, self.name: float(candidate)}, found.nodes)


@dataclass(frozen=True)
class Call(Pattern):
    """A call of a family whose operands match ``operands``."""

    family: str
    operands: tuple[Pattern, ...]
    where: Callable[[Node], bool] | None = None

    def match(self, candidate: Any, found: Found) -> Iterator[Found]:
        if not is_a(candidate, self.family) or (self.where is not None and not self.where(candidate)):
            return
        family = FAMILIES[self.family]
        actual = [argument(candidate, name) for name in family.operands]
        inside = Found(found.bindings, found.nodes | {candidate})
        yield from match_all(self.operands, actual, inside)
        if family.commutative:
            yield from match_all(self.operands, actual[::-1], inside)


@dataclass(frozen=True)
class Items(Pattern):
    """A list argument, item by item."""

    items: tuple[Pattern, ...]

    def match(self, candidate: Any, found: Found) -> Iterator[Found]:
        if isinstance(candidate, list | tuple) and len(candidate) == len(self.items):
            yield from match_all(self.items, candidate, found)


@dataclass(frozen=True)
class AnyOf(Pattern):
    """Alternatives, tried in order."""

    choices: tuple[Pattern, ...]

    def match(self, candidate: Any, found: Found) -> Iterator[Found]:
        for choice in self.choices:
            yield from choice.match(candidate, found)


@dataclass(frozen=True)
class Through(Pattern):
    """``inside``, below any number of calls of a family (casts, views); none first."""

    family: str
    inside: Pattern

    def match(self, candidate: Any, found: Found) -> Iterator[Found]:
        yield from self.inside.match(candidate, found)
        while is_a(candidate, self.family):
            found = Found(found.bindings, found.nodes | {candidate})
            candidate = candidate.args[0]
            yield from self.inside.match(candidate, found)


def match_all(patterns: Sequence[Pattern], values: Sequence[Any], found: Found) -> Iterator[Found]:
    """Every way in which all ``values`` match their patterns at once."""
    if not patterns:
        yield found
        return
    for extended in patterns[0].match(values[0], found):
        yield from match_all(patterns[1:], values[1:], extended)


# --- the words of the language -----------------------------------------------------------------------


def capture(name: str, where: Callable[[Node], bool] | None = None) -> Pattern:
    """Any node that ``where`` accepts, bound to ``name``."""
    return Capture(name, where)


def scalar(name: str | None = None, equals: float | None = None) -> Pattern:
    """A constant number."""
    return Scalar(name, equals)


def either(*choices: Pattern) -> Pattern:
    """One of several spellings."""
    return AnyOf(choices)


def call(family: str, *operands: Pattern, where: Callable[[Node], bool] | None = None) -> Pattern:
    """A call of one of :data:`FAMILIES`."""
    return Call(family, operands, where)


def casts(inside: Pattern) -> Pattern:
    """``inside`` below any number of dtype conversions."""
    return Through("cast", inside)


def mul(a: Pattern, b: Pattern) -> Pattern:
    """``a * b`` in either order."""
    return call("mul", a, b)


def add(a: Pattern, b: Pattern) -> Pattern:
    """``a + b`` in either order."""
    return call("add", a, b)


def sub(a: Pattern, b: Pattern) -> Pattern:
    """``a - b``."""
    return call("sub", a, b)


def square(x: Pattern) -> Pattern:
    """``x ** 2``, ``x.square()`` or ``x * x``."""
    return either(call("pow", x, scalar(equals=2)), call("square", x), mul(x, x))


def mean_last(x: Pattern) -> Pattern:
    """``x.mean(-1, keepdim=True)``."""
    return call("mean_last", x)


def inverse_root(x: Pattern) -> Pattern:
    """``1 / sqrt(x)`` in any spelling."""
    root = call("sqrt", x)
    power = call("pow", x, scalar(equals=-0.5))
    return either(call("rsqrt", x), power, call("reciprocal", root), call("div", scalar(equals=1), root))


def cat_last(*items: Pattern) -> Pattern:
    """``torch.cat(items, dim=-1)``."""
    return call("cat_last", Items(items))


def interleave_last(*items: Pattern) -> Pattern:
    """``torch.stack(items, dim=-1).flatten(-2)``: item i of each in turn."""
    stacked = call("stack_last", Items(items))
    return call("view", stacked, where=_flattens_last)


def _flattens_last(node: Node) -> bool:
    return same_shape(value(node).shape[:-1], value(node.args[0]).shape[:-2])


# --- matches ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Match:
    """One place where a pattern holds."""

    root: Node
    bindings: Mapping[str, Any]
    nodes: frozenset[Node]

    def __getitem__(self, name: str) -> Any:
        return self.bindings[name]

    def get(self, name: str, default: Any = None) -> Any:
        """What was bound to ``name``, or ``default`` if the matched spelling has no such part."""
        return self.bindings.get(name, default)

    def refusal(self) -> str | None:
        """Why the match may not be replaced (the sharing rule), or None."""
        return shared_outside(self.nodes, self.root)


def shared_outside(nodes: frozenset[Node], root: Node) -> str | None:
    """The sharing rule: a reason if someone else reads arithmetic inside ``nodes``."""
    for node in nodes:
        if node is root or node.target in FREE:
            continue
        for user in node.users:
            if user not in nodes:
                return f"{node.name} inside it is also read by {user.name}"
    return None


def find(
    graph: Graph, pattern: Pattern, where: Callable[[Match], bool] = lambda match: True
) -> Iterator[Match]:
    """Places where ``pattern`` holds, last first, none of whose roots lies inside another's match.

    Last first makes the outermost spelling win, and keeps captured nodes alive while earlier matches
    are still to be replaced: it is safe to rewrite between two matches.

    Args:
        where: a condition on whole matches; the first way to match that satisfies it is taken.
    """
    taken: set[Node] = set()
    for root in reversed(list(graph.nodes)):
        if root.op != "call_function" or root in taken:
            continue
        match = match_at(root, pattern, where)
        if match is not None:
            taken |= match.nodes
            yield match


def match_at(
    root: Node, pattern: Pattern, where: Callable[[Match], bool] = lambda match: True
) -> Match | None:
    """The first way in which ``pattern`` holds at ``root``, or None."""
    for found in pattern.match(root, EMPTY):
        match = Match(root, found.bindings, found.nodes)
        if where(match):
            return match
    return None
