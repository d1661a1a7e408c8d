"""Inner products that scores of pages are made of, in float64: the same for any number of rows and tokens."""

from __future__ import annotations

import torch


def page_products(q: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """``[B, H, T, N]`` of ``q [B, H, T, D]`` with one vector a page, ``[B, N, G, D]``."""
    batch, _, tokens, width = q.shape
    grouped = q.double().reshape(batch, vectors.shape[2], -1, tokens, width)
    return torch.einsum("bghtd,bngd->bghtn", grouped, vectors.double()).flatten(1, 2)


def key_products(q: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """``[B, H, T, N, K]`` of ``q [B, H, T, D]`` with K vectors a page, ``[B, N, G, K, D]``."""
    batch, _, tokens, width = q.shape
    grouped = q.double().reshape(batch, vectors.shape[2], -1, tokens, width)
    return torch.einsum("bghtd,bngkd->bghtnk", grouped, vectors.double()).flatten(1, 2)
