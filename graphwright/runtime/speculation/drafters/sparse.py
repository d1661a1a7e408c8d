"""``sparse``: the target drafts for itself, reading few pages of its cache."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from graphwright.ir.errors import InputError
from graphwright.ir.selectors import parse_selector
from graphwright.runtime.speculation.draft_program import DraftProgramDrafter
from graphwright.runtime.speculation.drafter import drafter


@drafter("sparse")
@dataclass
class SparseDrafter(DraftProgramDrafter):
    """The same model over the same cache, of which it reads few pages; long contexts gain.

    Options:
        selector: which pages: ``recent`` for a window and the sinks before it, or one that looks at the
            query, such as ``mean`` and ``bounds``.
        keep: pages that a draft token reads at most, as a share of all so far.
        page: tokens of a page; 0 for the codec's pages where the cache is packed, and 16 elsewhere.
        recent: newest tokens that are always read; -1 for what a cycle's drafts need.
        sinks: pages at the start that are always read.

    Source: Sadhukhan et al. 2024, "MagicDec" (windows and sinks, or selected pages, for drafts);
    Zhang et al. 2025, "Sparse-to-Dense" (the sparse model drafts, the dense one verifies).
    """

    selector: str = "recent"
    keep: float = 0.0625
    page: int = 0
    recent: int = -1
    sinks: int = 1

    def __post_init__(self) -> None:
        chosen = parse_selector(self.selector)
        if chosen.needs_samples or chosen.needs_tokens:
            lacks = "is calibrated on text" if chosen.needs_samples else "needs the tokens of a page"
            raise InputError(
                f"selector={self.selector} {lacks}, which a draft program does not have",
                where=f"drafter={self.name}",
                hint="selector=recent, mean or bounds",
            )

    def draft_passes(self) -> tuple[str, ...]:
        said = [f"selector={self.selector}", f"keep={self.keep}"]
        said += [
            f"{option.name}={getattr(self, option.name)}"
            for option in dataclasses.fields(self)
            if option.name in ("page", "recent", "sinks") and getattr(self, option.name) != option.default
        ]
        return (f"sparsify_attention{{{','.join(said)}}}",)
