"""The decoder's blocks: what each layer, its attention and its feed-forward part add to the residual stream.

The residual stream is the chain of nodes that every path from the token ids to the logits passes through (the
dominators of the logits), as far as they have its shape ``[B, T, H]``. Where a layer's branches join the
stream again tells its halves apart: they join twice if attention and feed-forward follow each other (Llama),
once if both read the same input (GPT-NeoX). Nothing here knows a model's class; a node's layer is the number
in its module path.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import networkx as nx
from torch.fx.node import Node

from graphwright.ir.dominators import token_flow
from graphwright.ir.graph import Graph, is_impure, is_tensor, layer_number, module_path, op_name, value

Part = Literal["whole", "attention", "mlp"]
PARTS: tuple[Part, ...] = get_args(Part)

_ADD = "aten.add.Tensor"


@dataclass(frozen=True)
class Block:
    """A stretch of the residual stream that can be left out.

    Attributes:
        layer: its number in the module paths.
        part: the whole layer, or one of its halves.
        path: the layer's module path, ``model.layers.3``.
        entry, exit: nodes ``[B, T, H]`` of the stream before and after. Of a half that reads the same input
            as the other one, those of the whole layer.
        contribution: of such a half, what it adds to the stream ``[B, T, H]``; otherwise None.
    """

    layer: int
    part: Part
    path: str
    entry: Node
    exit: Node
    contribution: Node | None = None

    @property
    def name(self) -> str:
        """``model.layers.3``, ``model.layers.3.attention``."""
        return self.path if self.part == "whole" else f"{self.path}.{self.part}"

    def detour(self) -> tuple[Node, Node]:
        """What to read in the place of what: (old, new) leaves the block out."""
        if self.contribution is None:
            return self.exit, self.entry
        addition = next(iter(self.contribution.users))
        return addition, next(n for n in addition.all_input_nodes if n is not self.contribution)


@dataclass(frozen=True)
class Blocks:
    """All blocks of a graph.

    Attributes:
        found: by layer, and within a layer in the order of :data:`PARTS`.
        missing: by layer and part, why there is no such block.
    """

    found: tuple[Block, ...]
    missing: Mapping[tuple[int, Part], str] = field(default_factory=dict)

    @property
    def layers(self) -> list[int]:
        """The layers of the graph, with or without blocks."""
        return sorted({block.layer for block in self.found} | {layer for layer, _ in self.missing})

    def of(self, part: Part) -> list[Block]:
        """The blocks of one kind, by layer."""
        return [block for block in self.found if block.part == part]


def find_blocks(graph: Graph) -> Blocks:
    """The blocks of a graph, with a cache or without; the graph stays as it is."""
    flow = token_flow(graph)
    dominators = nx.immediate_dominators(flow, graph.placeholder("input_ids"))
    chain = _chain(graph, dominators)
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for index, node in enumerate(chain):
        layer = layer_number(module_path(node))
        if layer is not None:
            first.setdefault(layer, index)
            last[layer] = index
    finder = _Finder(graph, flow, dominators)
    found: list[Block] = []
    missing: dict[tuple[int, Part], str] = {}
    for layer in sorted({x for n in flow if (x := layer_number(module_path(n))) is not None}):
        stretch = finder.stretch(chain[: last.get(layer, -1) + 1], first.get(layer, 0))
        made = finder.blocks(layer, stretch)
        for part in PARTS:
            own = made[part]
            if isinstance(own, Block):
                found.append(own)
            else:
                missing[layer, part] = own
    return Blocks(tuple(found), missing)


def skip_blocks(graph: Graph, blocks: Iterable[Block], skipped: dict[Node, Node] | None = None) -> None:
    """Leave blocks out; what nothing reads any more goes, what the layers would have stored included.

    A store stays, and is written, where other layers take the number of slots from it (caches of which keys
    are computed again): skip before the cache is placed.

    Args:
        graph: with these blocks; unused placeholders stay (``drop_unused_placeholders``).
        blocks: of one :func:`find_blocks`, in any order; a layer at most as a whole or in its halves.
        skipped: what was skipped before since then, as old to new; extended.
    """
    skipped = {} if skipped is None else skipped
    before = live_nodes(graph)
    for block in blocks:
        old, new = block.detour()
        while new in skipped:  # the neighbour's exit is this block's entry
            new = skipped[new]
        old.replace_all_uses_with(new)
        skipped[old] = new
    after = live_nodes(graph)
    gone = before - after
    for node in reversed(list(graph.nodes)):
        unread = node.op == "call_function" and is_impure(node) and node not in after
        if unread and not gone.isdisjoint((node, *node.all_input_nodes)):
            graph.fx.erase_node(node)
    graph.eliminate_dead_code()


def live_nodes(graph: Graph, detours: Mapping[Node, Node] | None = None) -> set[Node]:
    """What the outputs depend on: writes to a state are live if the state is read.

    Args:
        detours: reads of a key count as reads of its value.
    """
    writers: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and is_impure(node):
            for state in node.all_input_nodes:
                if state.meta.get("kind") == "state":
                    writers.setdefault(state, []).append(node)
    seen: set[Node] = set()
    stack = [graph.output]
    while stack:
        node = stack.pop()
        node = (detours or {}).get(node, node)
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
            stack.extend(writers.get(node, ()))
    return seen


# --- the stream ----------------------------------------------------------------------------------


def _chain(graph: Graph, dominators: Mapping[Node, Node]) -> list[Node]:
    """The dominators of the logits, first to last."""
    (logits, *_) = graph.output.all_input_nodes
    chain = [logits]
    while (above := dominators.get(chain[-1], chain[-1])) is not chain[-1]:
        chain.append(above)
    return chain[::-1]


class _Finder:
    """Finds the blocks of one layer after the other.

    Args:
        flow, dominators: of the graph.
    """

    def __init__(self, graph: Graph, flow: nx.DiGraph, dominators: Mapping[Node, Node]) -> None:
        self._flow, self._dominators = flow, dominators
        # Of whatever form and provider: ``cache_attention``, ``packed_attention``.
        self._attentions = [n for n in graph.nodes if "attention" in (op_name(n) or "")]
        self._tokens = tuple(map(str, value(graph.placeholder("input_ids")).shape))

    def stretch(self, chain: Sequence[Node], first: int) -> list[Node]:
        """The part of the chain from the stream's last node before ``first`` to its last node."""
        entry = next((i for i in reversed(range(min(first, len(chain)))) if self._in_stream(chain[i])), None)
        if entry is None:
            return []
        while not self._in_stream(chain[-1]):
            chain = chain[:-1]
        return list(chain[entry:])

    def blocks(self, layer: int, chain: Sequence[Node]) -> dict[Part, Block | str]:
        """The layer's blocks, or why there is none of a kind.

        Args:
            layer: its number.
            chain: :meth:`stretch`.
        """
        if len(chain) < 2:
            return dict.fromkeys(PARTS, "no node of it is on every path from the token ids to the logits")
        entry, end = chain[0], chain[-1]
        if not _alike(entry, end):
            return dict.fromkeys(PARTS, f"it turns {_form(entry)} into {_form(end)}")
        parts = module_path(end).split(".")
        at = next(i for i, part in enumerate(parts) if part.isdigit())
        whole = Block(layer, "whole", ".".join(parts[: at + 1]), entry, end)
        return {"whole": whole, **self._halves(whole, chain)}

    def _halves(self, whole: Block, chain: Sequence[Node]) -> dict[Part, Block | str]:
        # Where branches join: more than one of the node's inputs depends on the tokens.
        joins = [i for i in range(1, len(chain)) if self._flow.in_degree(chain[i]) > 1]
        own = [n for n in self._attentions if layer_number(module_path(n)) == whole.layer]
        starts = {self._start(node, chain) for node in own}
        if not starts or starts - {i - 1 for i in joins}:
            return dict.fromkeys(PARTS[1:], "its attention is in no branch beside the residual stream")
        if len(joins) == 1:
            return self._parallel(whole, chain[joins[0] - 1], chain[joins[0]], own)
        if len(joins) != 2 or len(starts) != 1:
            reason = f"it has {len(joins)} residual connections, {len(starts)} of them with attention"
            return dict.fromkeys(PARTS[1:], reason)
        # A norm behind the first connection belongs to the first half.
        between = [n for n in chain[joins[0] : joins[1]] if self._in_stream(n)]
        if not between or not _alike(between[-1], whole.entry):
            return dict.fromkeys(PARTS[1:], "between its halves the stream has another shape")
        order: tuple[Part, Part] = ("attention", "mlp")
        first, second = order if starts == {joins[0] - 1} else order[::-1]
        return {
            first: replace(whole, part=first, exit=between[-1]),
            second: replace(whole, part=second, entry=between[-1]),
        }

    def _start(self, node: Node, chain: Sequence[Node]) -> int:
        """The place in the chain of the last node that another one depends on; -1 if none of it."""
        while node not in chain and self._dominators.get(node, node) is not node:
            node = self._dominators[node]
        return chain.index(node) if node in chain else -1

    def _parallel(self, whole: Block, start: Node, end: Node, own: Sequence[Node]) -> dict[Part, Block | str]:
        """Halves that read one input and are added to it: each is one of the addends."""
        addends = _addends(end, start)
        behind = nx.descendants(self._flow, start)
        attention = {n for node in own for n in (node, *nx.descendants(self._flow, node))}
        found: dict[Part, Block | str] = {}
        for part in PARTS[1:]:
            terms = [n for n in addends if n in behind and (n in attention) == (part == "attention")]
            if addends.count(start) != 1 or not terms:
                found[part] = "it is no addend of the residual stream by itself"
            elif len(terms) > 1:
                found[part] = f"it is {len(terms)} addends of the residual stream"
            elif len(terms[0].users) != 1 or not self._in_stream(terms[0]) or not _alike(terms[0], end):
                found[part] = "it is not added to the residual stream as it is"
            else:
                found[part] = replace(whole, part=part, contribution=terms[0])
        return found

    def _in_stream(self, node: Node) -> bool:
        """Whether it is ``[B, T, ...]``."""
        if not is_tensor(node) or value(node).dim() != 3 or not value(node).dtype.is_floating_point:
            return False
        return tuple(map(str, value(node).shape[:2])) == self._tokens


def _addends(end: Node, start: Node) -> list[Node]:
    """The terms of a sum, seen through sums that only it reads."""
    found: list[Node] = []
    stack = [end]
    while stack:
        node = stack.pop()
        is_sum = op_name(node) == _ADD and not node.kwargs and len(node.all_input_nodes) == 2
        if is_sum and node is not start and (node is end or len(node.users) == 1):
            stack.extend(node.all_input_nodes)
        else:
            found.append(node)
    return found


def _alike(a: Node, b: Node) -> bool:
    """Whether one can be read in the place of the other."""
    return _form(a) == _form(b) and value(a).device == value(b).device


def _form(node: Node) -> str:
    return f"{value(node).dtype} of {value(node).shape[-1]} features"
