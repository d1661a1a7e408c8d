"""Which selections, and which lists of pages, the C++ kernels take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphwright.ir.selectors import parse_selector


def supports_score_pages(
    q: torch.Tensor, summary: Sequence[torch.Tensor], selector: str, **_: Any
) -> str | None:
    """None when ``score_pages`` takes these, else the reason."""
    chosen = parse_selector(selector)
    if not chosen.in_kernels:
        return f"no kernel scores pages by {chosen.name}"
    if q.dtype not in (torch.float32, torch.bfloat16):
        return f"{q.dtype} is not float32 or bfloat16"
    if summary[0].dtype != q.dtype:
        return f"q is {q.dtype} and the summary {summary[0].dtype}"
    if not _contiguous_from(summary[0], 3):
        return "a page's summary is not contiguous"
    return None


def _contiguous_from(x: torch.Tensor, dim: int) -> bool:
    """Do the dimensions from ``dim`` on lie together in memory?"""
    expected = 1
    for size, stride in zip(reversed(x.shape[dim:]), reversed(x.stride()[dim:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def supports_choose_pages(scores: torch.Tensor, **_: Any) -> str | None:
    """None when ``choose_pages`` takes these, else the reason."""
    return None if scores.dtype == torch.float32 else f"the scores are {scores.dtype}, not float32"


def lists_reason(pages: torch.Tensor | None, chosen: torch.Tensor | None, window: int) -> str | None:
    """Why attention cannot read these lists of pages; None if it can, or there are none."""
    if pages is None and chosen is None:
        return None
    if pages is None or chosen is None:
        return "lists of pages come with their lengths"
    if {pages.dtype, chosen.dtype} != {torch.int32}:
        return f"the lists are {pages.dtype} and their lengths {chosen.dtype}, not int32"
    return "lists of pages of a cache with a window are not read" if window else None
