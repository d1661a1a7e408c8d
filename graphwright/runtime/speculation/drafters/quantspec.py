"""``quantspec``: the target drafts for itself, reading half of each code of its packed cache."""

from __future__ import annotations

from dataclasses import dataclass

from graphwright.runtime.speculation.draft_program import DraftProgramDrafter
from graphwright.runtime.speculation.drafter import drafter


@drafter("quantspec")
@dataclass
class QuantSpecDrafter(DraftProgramDrafter):
    """The same model over the same packed cache, of which it reads the upper half of each code.

    The cache has to be packed with hierarchical codes: ``quantize_cache{codec=quantspec}``.

    Source: Tiwari et al. 2025, "QuantSpec" (a hierarchical cache that draft and target share);
    weights stay as they are.
    """

    def draft_passes(self) -> tuple[str, ...]:
        return ("read_upper_half",)
