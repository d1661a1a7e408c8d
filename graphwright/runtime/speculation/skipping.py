"""Drafting with the target itself, some of its layers left out: no second model, weights or cache.

A draft reads the cache that the target wrote; what the remaining layers store of drafted tokens lies beyond
the committed ones, where the verification step writes over it.

Source: Zhang et al. 2023, "Draft & Verify: Lossless Large Language Model Acceleration via Self-Speculative
Decoding".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from graphwright.ir.errors import InputError
from graphwright.runtime.lowering.blocks import LoweredBlocks
from graphwright.runtime.speculation.drafter import Generation, Outcome
from graphwright.runtime.speculation.program_drafter import ProgramDrafter, ProgramSession


def layer_blocks(generation: Generation, where: str) -> LoweredBlocks:
    """The layers of the generation's program.

    Raises:
        InputError: it has none that can be left out, or no cache for drafts to read.
    """
    lowered = getattr(generation.program, "lowered", None)
    if lowered is not None and not lowered.states:
        raise InputError(
            "the program keeps no cache: a draft would run the whole text for every token",
            where=where,
            hint="add the pass place_cache, or use another drafter",
        )
    blocks = getattr(lowered, "blocks", None) or LoweredBlocks()
    if not blocks.found:
        reasons = [f"layer {layer}: {why}" for layer, why in list(blocks.obstacles.items())[:2]]
        raise InputError(
            f"no layer of this program can be left out ({'; '.join(reasons) or 'it has none'})",
            where=where,
            hint="use another drafter",
        )
    return blocks


def middle(layers: Sequence[int], count: int) -> frozenset[int]:
    """The ``count`` layers in the middle."""
    start = (len(layers) - count) // 2
    return frozenset(layers[start : start + count])


def share_of(layers: Sequence[int], share: float) -> int:
    """How many layers a share of them is; at least one, and one stays."""
    return min(max(round(share * len(layers)), 1), len(layers) - 1)


def check_share(share: float, where: str) -> None:
    """Raise :class:`InputError` unless it is a share of the layers."""
    if not 0 < share < 1:
        raise InputError(f"share={share} of the layers is not between 0 and 1", where=where)


@dataclass
class SkipDrafter(ProgramDrafter):
    """Base of drafters that leave layers out. Which ones, they set by :attr:`skip`, between drafts."""

    _running: ProgramSession = field(init=False, repr=False, compare=False)
    _blocks: LoweredBlocks = field(init=False, repr=False, compare=False)

    def open(self, generation: Generation) -> ProgramSession:
        self._blocks = layer_blocks(generation, f"drafter={self.name}")
        self._running = ProgramSession(generation.program, generation.state)
        return self._running

    @property
    def choices(self) -> list[int]:
        """The layers that can be left out, in the order in which they run."""
        return list(self._blocks.found)

    @property
    def skip(self) -> frozenset[int]:
        """The layers that are left out."""
        return self._running.skip

    @skip.setter
    def skip(self, layers: frozenset[int]) -> None:
        self._running.skip = layers

    def default_length(self) -> int:
        # A drafted token costs about half a step.
        return 4


def tried(outcome: Outcome) -> tuple[int, int]:
    """Of a verified draft, the tokens that were accepted, and those that had a chance to be.

    What comes after a rejected token had none.
    """
    accepted, last = len(outcome.path), outcome.path[-1] + 1 if outcome.path else 0
    went_on = bool(outcome.draft.tokens) and bool(outcome.draft.successors[last])
    return accepted, accepted + went_on
