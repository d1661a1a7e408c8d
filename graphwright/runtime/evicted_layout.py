"""The layers of a program whose tokens are evicted, without their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch.fx.node import Node

from graphwright.ir.eviction_ops import HELD, KEPT, RING, Retention
from graphwright.ir.evictors import Evictor, parse_evictor

Pace = tuple[Retention, Evictor]


@dataclass(frozen=True)
class EvictedLayout:
    """A layer whose tokens are evicted, without its tensors.

    Attributes:
        name: of the layer's attention.
        evictor: chooses what stays.
        kept: how much.
        keys, values, held: states by name.
        ring: the state with its newest queries, for evictors that observe them.
        scale, softcap: of its attention.
    """

    name: str
    evictor: Evictor
    kept: Retention
    keys: str
    values: str
    held: str
    ring: str | None
    scale: float
    softcap: float

    @property
    def pace(self) -> Pace:
        """Layers of one pace hold as many tokens at any time."""
        return self.kept, self.evictor

    @property
    def noted(self) -> str:
        """The name of what the evictor noted of each token."""
        return f"{self.name}.noted"


def evicted_layouts(states: Mapping[str, Node]) -> list[EvictedLayout]:
    """The layers of a program whose tokens are evicted, from its states."""
    parts: dict[str, dict[str, str]] = {}
    about: dict[str, dict[str, object]] = {}
    for name, node in states.items():
        found = node.meta.get("store", {})
        if found.get("role") in (KEPT, HELD, RING):
            parts.setdefault(found["name"], {})[found.get("part", found["role"])] = name
            about[found["name"]] = found
    return [_layout(name, mine, about[name]) for name, mine in parts.items()]


def _layout(name: str, parts: Mapping[str, str], about: Mapping[str, object]) -> EvictedLayout:
    return EvictedLayout(
        name=name,
        evictor=parse_evictor(str(about["method"])),
        kept=Retention.of(about),
        keys=parts["keys"],
        values=parts["values"],
        held=parts[HELD],
        ring=parts.get(RING),
        scale=float(str(about["scale"])),
        softcap=float(str(about["softcap"])),
    )
