"""Lists of pages: which tokens of a cache a query reads. See :mod:`graphwright.ir.sparse_ops`."""

from __future__ import annotations

import torch

#: Arguments of ``cache_attention``: those that ``append_attention`` shares, and those that say what is read.
BEFORE_LISTS = (
    "q", "keys", "values", "positions", "lengths", "counts", "tree", "scale", "window", "softcap", "sinks",
)  # fmt: skip
LISTS = ("pages", "chosen", "page", "first")


def listed_tokens(
    pages: torch.Tensor, chosen: torch.Tensor, page: int, first: int, lengths: torch.Tensor, slots: int
) -> torch.Tensor:
    """Which token numbers below ``slots`` are read, ``[B, T, G, S]`` bool: those on the lists.

    The first tokens and those of the step itself always are: in a tree, a token may lie in a page beyond
    that of its position.
    """
    number = torch.arange(slots, device=pages.device)
    place = torch.arange(pages.shape[3], device=pages.device)
    valid = place < chosen[..., None]
    # One more page than there are: entries that are not valid go there.
    flags = torch.zeros((*pages.shape[:3], pages.shape[3] + 1), dtype=torch.bool, device=pages.device)
    flags.scatter_(3, torch.where(valid, pages.long(), pages.shape[3]), True)
    of_token = ((number - first).clamp(min=0) // page).clamp(max=pages.shape[3])
    flags[..., -1] = False
    held = flags[..., of_token] | (number < first) | (number >= lengths[:, None, None, None])
    return held | (chosen < 0)[..., None]
