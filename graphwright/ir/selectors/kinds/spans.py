"""``spans``: first the best stretches of many pages, then the best pages of those."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from graphwright.ir.codecs.part import PageShape
from graphwright.ir.errors import SelectorError
from graphwright.ir.selectors.products import page_products
from graphwright.ir.selectors.selector import Buffer, Selector, Tensors, register_selector


@register_selector
@dataclass(frozen=True)
class Spans(Selector):
    """A search in two steps, so that a query looks at about the square root of all mean keys.

    Of a query's candidate pages, the first ``pages``, the next ``pages`` and so on are spans. Each query
    head scores every whole span by its mean key (the mean of its pages' mean keys) and keeps the best;
    pages of these, and those after the last whole span, are scored by their own mean keys. The others take
    their span's score, moved below the worst page that was looked at: what is left of a budget goes to
    the best of the spans that were not kept. With a number of pages a span that is about the square root
    of all pages, both steps look at as many vectors.

    Args:
        pages: of a span.
        spans: that are kept; 0: the square root of a query's whole spans, rounded up.

    Source: "Superlinear Multi-Step Attention", the two-step search over spans; the paper's router is
    trained, here mean keys take its place.
    """

    name: ClassVar[str] = "spans"
    summary: ClassVar[str] = "the best spans of pages, then their best pages, by mean keys"
    source: ClassVar[str] = "Superlinear Multi-Step Attention"

    pages: int = 8
    spans: int = 0

    def __post_init__(self) -> None:
        if self.pages < 2:
            raise SelectorError(
                f"a span of pages={self.pages} is not longer than a page",
                where="spans",
                hint="2 or more; the selector named mean scores single pages",
            )
        if self.spans < 0:
            raise SelectorError(
                f"spans={self.spans} cannot be kept",
                where="spans",
                hint="1 or more, or 0 for the square root of all",
            )

    def layout(self, shape: PageShape, dtype: torch.dtype) -> dict[str, Buffer]:
        size = (shape.groups, shape.features)
        return {"mean": Buffer(size, dtype), "span_mean": Buffer(size, dtype, self.pages)}

    def summarize(
        self, keys: torch.Tensor, constants: Tensors, tokens: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        return {"mean": keys.double().mean(2).to(keys.dtype)}

    def summarize_span(self, pages: Tensors) -> dict[str, torch.Tensor]:
        means = pages["mean"]
        return {"span_mean": means.double().mean(1).to(means.dtype)}

    def score(
        self,
        q: torch.Tensor,
        summary: Tensors,
        constants: Tensors,
        shape: PageShape,
        scale: float,
        closed: torch.Tensor,
    ) -> torch.Tensor:
        closed = closed[:, None, :, None]
        by_page = page_products(q, summary["mean"]) * scale  # [B, H, T, N]
        # Rounded, so that spans that are alike are ranked alike whatever else is computed with them.
        by_span = (page_products(q, summary["span_mean"]) * scale).float().double()
        left_out = self._left_out(by_span, closed // self.pages)
        pages = by_page.shape[-1]
        skipped = self._of_pages(left_out, pages)
        candidate = torch.arange(pages, device=q.device) < closed
        worst = by_page.masked_fill(skipped | ~candidate, torch.inf).amin(-1, keepdim=True)
        best_left = by_span.masked_fill(~left_out, -torch.inf).amax(-1, keepdim=True)
        moved = by_span - (best_left - worst).clamp(min=0) - 1
        return torch.where(skipped, self._of_pages(moved, pages), by_page)

    def _left_out(self, scores: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """Which whole spans are not kept, ``[B, H, T, spans]``; ties: the earlier one is."""
        number = torch.arange(scores.shape[-1], device=scores.device)
        known = number < whole
        kept = self.spans or whole.double().sqrt().ceil()
        order = torch.where(known, scores, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(-1, order, number.expand_as(order).contiguous())
        return known & (rank >= kept)

    def _of_pages(self, x: torch.Tensor, pages: int) -> torch.Tensor:
        """What spans have, for each of their pages."""
        return x.repeat_interleave(self.pages, dim=-1)[..., :pages]
