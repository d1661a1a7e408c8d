"""Which tokens are alike, by the cosine of their keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F

#: Tokens that are compared at a time: bounds the products that exist at once.
_TILE = 1024


def most_similar(keys: torch.Tensor, centers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The center that each key is most similar to, and the cosine.

    Args:
        keys: ``[B, G, n, D]``.
        centers: ``[B, G, k, D]``.

    Returns:
        ``[B, G, n]`` int64 in 0..k-1, of equal ones the first; ``[B, G, n]`` float32.
    """
    unit = F.normalize(centers.float(), dim=-1).transpose(2, 3)
    index, cosine = [], []
    for start in range(0, keys.shape[2], _TILE):
        found = (F.normalize(keys[:, :, start : start + _TILE].float(), dim=-1) @ unit).max(dim=-1)
        index.append(found.indices)
        cosine.append(found.values)
    return torch.cat(index, dim=2), torch.cat(cosine, dim=2)
