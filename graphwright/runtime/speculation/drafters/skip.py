"""A fixed set of layers left out."""

from __future__ import annotations

import re
from dataclasses import dataclass

from graphwright.ir.errors import InputError
from graphwright.runtime.speculation.drafter import Generation, drafter
from graphwright.runtime.speculation.program_drafter import ProgramSession
from graphwright.runtime.speculation.skipping import SkipDrafter, middle

_RANGES = re.compile(r"\d+(-\d+)?(\+\d+(-\d+)?)*")


def parse_layers(text: str) -> frozenset[int]:
    """The numbers of ``10-20`` (both ends included) or ``3+5+9-12``.

    Raises:
        InputError: it is written in another way.
    """
    if not _RANGES.fullmatch(text):
        raise InputError(
            f"layers={text} is not a set of layers", where="drafter=skip", hint="layers=10-20 or 3+5+9-12"
        )
    found: set[int] = set()
    for part in text.split("+"):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


@drafter("skip")
@dataclass
class FixedSkip(SkipDrafter):
    """The program itself without a fixed set of its layers.

    Options:
        layers: their numbers, as ``10-20`` (both ends included) or ``3+5+9-12``.
        count: instead, so many layers in the middle.

    Source: Zhang et al. 2023, "Draft & Verify: Lossless Large Language Model Acceleration via
    Self-Speculative Decoding".
    """

    layers: str = ""
    count: int = -1

    def __post_init__(self) -> None:
        if (not self.layers) == (self.count < 0):
            raise InputError(
                "give either the layers to leave out, or how many", where="drafter=skip",
                hint="skip(layers=10-20) or skip(count=8)",
            )  # fmt: skip
        if self.layers:
            parse_layers(self.layers)

    def open(self, generation: Generation) -> ProgramSession:
        session = super().open(generation)
        most = len(self.choices)
        if self.count >= most:
            raise InputError(
                f"count={self.count} leaves nothing of {most} layers",
                where="drafter=skip",
                hint=f"count is at most {most - 1}",
            )
        self.skip = parse_layers(self.layers) if self.layers else middle(self.choices, self.count)
        self._blocks.check(self.skip, "drafter=skip")
        return session
