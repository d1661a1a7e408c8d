"""``oracle``: the mass that each page has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from graphwright.ir.codecs.part import PageShape
from graphwright.ir.selectors.products import key_products
from graphwright.ir.selectors.selector import Buffer, Selector, Tensors, register_selector


@register_selector
@dataclass(frozen=True)
class Oracle(Selector):
    """All keys of a page: its score is its mass.

    Its summaries are as large as the keys, so it saves nothing but the values of pages that are not read.
    It is here to measure the others: none can choose better for a query head by itself.

    Source: the choice of the largest attention scores, Zhang et al. 2023, "H2O: Heavy-Hitter Oracle for
    Efficient Generative Inference of Large Language Models", section 3.
    """

    name: ClassVar[str] = "oracle"
    summary: ClassVar[str] = "each page's exact attention mass, as costly as the keys: to measure the others"
    source: ClassVar[str] = "the oracle of H2O, Zhang et al. 2023"

    def layout(self, shape: PageShape, dtype: torch.dtype) -> dict[str, Buffer]:
        return {"keys": Buffer((shape.groups, shape.tokens, shape.features), dtype)}

    def summarize(
        self, keys: torch.Tensor, constants: Tensors, tokens: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        return {"keys": keys}

    def score(
        self,
        q: torch.Tensor,
        summary: Tensors,
        constants: Tensors,
        shape: PageShape,
        scale: float,
        closed: torch.Tensor,
    ) -> torch.Tensor:
        return (key_products(q, summary["keys"]) * scale).logsumexp(-1)
