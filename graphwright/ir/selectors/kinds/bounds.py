"""``bounds``: no key of a page can score higher than its extremes allow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from graphwright.ir.codecs.part import PageShape
from graphwright.ir.selectors.selector import Buffer, Selector, Tensors, register_selector


@register_selector
@dataclass(frozen=True)
class Bounds(Selector):
    """The lowest and the highest key of each channel; the score is the highest that a key could reach.

    As ``low <= high``, ``sum_d max(q_d low_d, q_d high_d)`` is ``max(q, 0) . high + min(q, 0) . low``.

    Source: Tang et al. 2024, "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
    section 3.3.
    """

    name: ClassVar[str] = "bounds"
    summary: ClassVar[str] = "an upper bound, from each channel's lowest and highest key"
    source: ClassVar[str] = "Quest, Tang et al. 2024"
    in_kernels: ClassVar[bool] = True

    def layout(self, shape: PageShape, dtype: torch.dtype) -> dict[str, Buffer]:
        return {"extremes": Buffer((shape.groups, 2, shape.features), dtype)}

    def summarize(
        self, keys: torch.Tensor, constants: Tensors, tokens: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        return {"extremes": torch.stack((keys.amin(2), keys.amax(2)), dim=2)}

    def score(
        self,
        q: torch.Tensor,
        summary: Tensors,
        constants: Tensors,
        shape: PageShape,
        scale: float,
        closed: torch.Tensor,
    ) -> torch.Tensor:
        batch, _, tokens, width = q.shape
        extremes = summary["extremes"].double()
        grouped = q.double().view(batch, shape.groups, -1, tokens, width)
        low, high = extremes[:, :, :, 0], extremes[:, :, :, 1]
        scores = torch.einsum("bghtd,bngd->bghtn", grouped.clamp(min=0), high)
        scores += torch.einsum("bghtd,bngd->bghtn", grouped.clamp(max=0), low)
        return scores.flatten(1, 2) * scale
