"""Dense passes between sparse ones: the last tokens are run again, reading everything.

Keys and values of tokens that read only a part of the cache are a little off, and later tokens build on
them. Every n generated tokens the step runs the last n of them densely, which writes their keys and values
anew; drafts of that step follow behind as in any other. Source: Sun et al. 2025, "Rectified Sparse
Attention", section 2.2. At which tokens depends on how many were generated and on nothing else, so that
speculation changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphwright.runtime.speculation.draft import Draft
from graphwright.runtime.speculation.tree import chain


def until_pass(generated: int, every: int) -> int:
    """Tokens that a row may still gain before its next dense pass.

    Args:
        generated: tokens of the row so far, the newest one not in the cache yet.
        every: tokens between passes.
    """
    return every - generated % every


def dense_tokens(generated: int, every: int) -> int:
    """Tokens that the next step runs densely, the newest one and those that it runs again before it."""
    return every if every and generated % every == 0 else 0


def with_window(draft: Draft, window: Sequence[int]) -> Draft:
    """A draft behind ``window`` tokens that are not drafted: a chain from the step's first token on."""
    lead = len(window)
    if not lead:
        return draft
    parents = None
    if draft.parents is not None:
        parents = (*chain(lead), *(parent + lead for parent in draft.parents))
    return Draft((*window, *draft.tokens), parents)


def from_newest(logits: torch.Tensor, leads: Sequence[int], width: int) -> torch.Tensor:
    """Logits ``[B, T, V]`` from each row's newest token on, ``[B, width, V]``.

    Args:
        leads: ``[B]`` tokens of the step before the newest one.
        width: tokens from there on that anyone looks at.
    """
    lead = torch.tensor(leads, device=logits.device)[:, None]
    index = (lead + torch.arange(width, device=logits.device)).clamp(max=logits.shape[1] - 1)
    return logits.gather(1, index[:, :, None].expand(-1, -1, logits.shape[2]))
