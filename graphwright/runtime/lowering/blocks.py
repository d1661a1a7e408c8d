"""Which calls of a lowered step are whole decoder layers, so that a step can leave them out.

A layer can be left out of a single step if it is one call, takes the residual stream in, gives it back in the
same form, and nothing else of it is read later: neither a result nor what it writes into a cache.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch.fx.node import Node

from graphwright.ir.blocks import find_blocks
from graphwright.ir.errors import InputError
from graphwright.ir.graph import Graph, is_impure
from graphwright.runtime.lowering.split import Piece


@dataclass(frozen=True)
class LoweredBlock:
    """A decoder layer as one call.

    Attributes:
        layer: its number.
        call: index of the call.
        entry, exit: slots of the residual stream ``[B, T, H]`` before and after.
    """

    layer: int
    call: int
    entry: int
    exit: int


@dataclass(frozen=True)
class LoweredBlocks:
    """The decoder layers of a lowered step.

    Attributes:
        found: by number, in the order in which they run.
        obstacles: by number, why other layers cannot be left out.
    """

    found: Mapping[int, LoweredBlock] = field(default_factory=dict)
    obstacles: Mapping[int, str] = field(default_factory=dict)

    def check(self, layers: Collection[int], where: str) -> None:
        """Raise :class:`InputError` unless a step can run without these layers.

        Args:
            layers: by number.
            where: for the message.
        """
        known = sorted({*self.found, *self.obstacles})
        for layer in sorted(layers):
            if layer in self.obstacles:
                raise InputError(f"layer {layer} cannot be left out: {self.obstacles[layer]}", where=where)
            if layer not in self.found:
                raise InputError(
                    f"there is no layer {layer} to leave out",
                    where=where,
                    hint=f"layers are {known[0]} to {known[-1]}" if known else "the program has no layers",
                )
        if known and len(set(layers)) == len(known):
            raise InputError(
                f"nothing is left without all {len(known)} layers",
                where=where,
                hint=f"leave out at most {len(known) - 1} of the layers {known[0]} to {known[-1]}",
            )


def lowered_blocks(graph: Graph, pieces: Sequence[Piece], slots: Mapping[Node, int]) -> LoweredBlocks:
    """The layers of a graph that are pieces of their own.

    Args:
        graph: that was split.
        pieces: of it, in order.
        slots: of every node that goes from piece to piece.
    """
    blocks = find_blocks(graph)
    found: dict[int, LoweredBlock] = {}
    obstacles = {layer: why for (layer, part), why in blocks.missing.items() if part == "whole"}
    for block in blocks.of("whole"):
        call = next((i for i, piece in enumerate(pieces) if block.exit in piece.outputs), None)
        if call is None or block.entry not in pieces[call].inputs:
            obstacles[block.layer] = "it does not run as one piece"
        elif others := [n.name for n in pieces[call].outputs if n is not block.exit]:
            obstacles[block.layer] = f"later layers read what it computes besides: {', '.join(others)}"
        elif shared := _written_for_others(pieces, call):
            obstacles[block.layer] = f"later layers read what it stores: {', '.join(shared)}"
        else:
            found[block.layer] = LoweredBlock(block.layer, call, slots[block.entry], slots[block.exit])
    return LoweredBlocks(dict(sorted(found.items(), key=lambda item: item[1].call)), obstacles)


def _written_for_others(pieces: Sequence[Piece], call: int) -> list[str]:
    """Caches that this piece writes and later ones have as inputs."""
    piece = pieces[call]
    placeholders = [n for n in piece.module.graph.nodes if n.op == "placeholder"]
    written = {
        outer
        for outer, inner in zip(piece.inputs, placeholders, strict=True)
        if outer.meta.get("kind") == "state" and any(is_impure(user) for user in inner.users)
    }
    later = {node for other in pieces[call + 1 :] for node in other.inputs}
    return sorted(node.meta["name"] for node in written & later)
