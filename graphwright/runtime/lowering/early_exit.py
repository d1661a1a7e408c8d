"""Early exits, lowered: the head behind the exit as calls of its own, and what is left to do if all exit.

Where every token of a step exits, the layers above still write the tokens' keys and values, computed from
the stream that left. That is a graph of its own, in which this stream is an input: everything else of these
layers is dead code there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.fx.node import Node

from graphwright.ir.graph import Graph, ancestors, argument, is_impure, value
from graphwright.runtime.lowering.split import Piece

if TYPE_CHECKING:
    from graphwright.runtime.lowering.lower import LoweredStep

#: The input of the rest's graph.
STREAM = "stream"


@dataclass(frozen=True)
class LoweredExit:
    """Where tokens of a lowered step can exit.

    Attributes:
        head, decision: indices of the calls that compute logits behind the exit, and who exits.
        stream, logits, passing: slots of the stream ``[B, T, H]`` there, of the logits, and of who exits.
        rest: what is left to do if all exit; its input :data:`STREAM` is that stream.
    """

    head: int
    decision: int
    stream: int
    logits: int
    passing: int
    rest: LoweredStep


def exit_of(graph: Graph) -> Node | None:
    """The node that says which tokens exit."""
    return next(iter(graph.calls("exits")), None)


def apart(graph: Graph) -> dict[Node, str]:
    """The calls of the head behind the exit, and the decision: pieces beside those of the layers."""
    decision = exit_of(graph)
    if decision is None:
        return {}
    needed = ancestors([argument(decision, "logits")])
    found: dict[Node, str] = {}
    behind = False
    for node in graph.nodes:
        if behind and node in needed:
            found[node] = "exit head"
        behind = behind or node is argument(decision, "stream")
    return {**found, decision: "exit decision"}


def rest_of(graph: Graph) -> Graph:
    """What is left to do of a step if all of its tokens exit.

    Args:
        graph: with an exit, before lowering; stays as it is.
    """
    rest = graph.copy()
    decision = exit_of(rest)
    assert decision is not None
    left = argument(decision, "stream")
    stream = rest.add_placeholder("input", STREAM, value(left))
    for node in (left, *rest.calls("bypass")):
        node.replace_all_uses_with(stream)
    rest.output.args = ((stream,),)
    above = _descendants(stream)
    for node in reversed(list(rest.nodes)):
        if node.op == "call_function" and is_impure(node) and node not in above:
            rest.fx.erase_node(node)
    rest.eliminate_dead_code()
    rest.drop_unused_placeholders()
    return rest


def lowered_exit(
    graph: Graph, pieces: Sequence[Piece], slots: Mapping[Node, int], rest: LoweredStep
) -> LoweredExit:
    """The exit of a graph that was split.

    Args:
        pieces: of it, in order.
        slots: of every node that goes from piece to piece.
        rest: :func:`rest_of`, lowered.
    """
    decision = exit_of(graph)
    assert decision is not None
    stream, logits = (argument(decision, name) for name in ("stream", "logits"))
    head, choice = (
        next(i for i, piece in enumerate(pieces) if node in piece.outputs) for node in (logits, decision)
    )
    return LoweredExit(head, choice, slots[stream], slots[logits], slots[decision], rest)


def _descendants(root: Node) -> set[Node]:
    seen: set[Node] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.users)
    return seen
