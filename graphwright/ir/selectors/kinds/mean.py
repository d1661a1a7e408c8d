"""``mean``: a page is as relevant as its mean key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from graphwright.ir.codecs.part import PageShape
from graphwright.ir.selectors.selector import Buffer, Selector, Tensors, register_selector


@register_selector
@dataclass(frozen=True)
class Mean(Selector):
    """The mean key of a page. By Jensen's inequality its score is a lower bound of the page's mass.

    Source: MiniCPM4 (MiniCPM Team 2025), section 2.2 (InfLLM v2), and the routing between regions of
    Zhu et al. 2023, "BiFormer: Vision Transformer with Bi-Level Routing Attention", section 3.2.
    """

    name: ClassVar[str] = "mean"
    summary: ClassVar[str] = "the mean key of each page"
    source: ClassVar[str] = "InfLLM v2 in MiniCPM4, 2025; BiFormer, Zhu et al. 2023"
    in_kernels: ClassVar[bool] = True

    def layout(self, shape: PageShape, dtype: torch.dtype) -> dict[str, Buffer]:
        return {"mean": Buffer((shape.groups, shape.features), dtype)}

    def summarize(
        self, keys: torch.Tensor, constants: Tensors, tokens: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        return {"mean": keys.float().mean(2).to(keys.dtype)}

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
        grouped = q.double().view(batch, shape.groups, -1, tokens, width)
        scores = torch.einsum("bghtd,bngd->bghtn", grouped, summary["mean"].double())
        return scores.flatten(1, 2) * scale
