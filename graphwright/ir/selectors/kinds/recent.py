"""``recent``: the newest pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from graphwright.ir.codecs.part import PageShape
from graphwright.ir.selectors.selector import Buffer, Selector, Tensors, register_selector

#: From a page to the next one. Small, so that the softmax of a million pages stays within float32, and
#: hundreds of times what float32 tells apart.
_STEP = 2.0**-14


@register_selector
@dataclass(frozen=True)
class Recent(Selector):
    """A later page is a better one: with pages at the start that are always read, a window and its sinks.

    The summary is a byte that says that the page is there.

    Source: Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks", section 3.2.
    """

    name: ClassVar[str] = "recent"
    summary: ClassVar[str] = "the newest pages: a window, and the sinks before it"
    source: ClassVar[str] = "StreamingLLM, Xiao et al. 2023"
    estimates: ClassVar[bool] = False

    def layout(self, shape: PageShape, dtype: torch.dtype) -> dict[str, Buffer]:
        return {"written": Buffer((1,), torch.uint8)}

    def summarize(
        self, keys: torch.Tensor, constants: Tensors, tokens: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        return {"written": torch.ones((keys.shape[0], 1), dtype=torch.uint8, device=keys.device)}

    def score(
        self,
        q: torch.Tensor,
        summary: Tensors,
        constants: Tensors,
        shape: PageShape,
        scale: float,
        closed: torch.Tensor,
    ) -> torch.Tensor:
        pages = summary["written"].shape[1]
        number = torch.arange(pages, dtype=torch.float64, device=q.device)
        return (number * _STEP).expand(*q.shape[:3], pages)
