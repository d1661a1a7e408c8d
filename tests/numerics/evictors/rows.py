"""Hand-made rows for evictors: a needle that all observed queries look for, and tokens that are alike."""

from __future__ import annotations

import torch

from graphwright.ir.evictors import Evictor, Kept, Seen, choose

HEADS, GROUPS, FEATURES = 4, 2, 8
TOKENS, WINDOW, NEEDLE = 60, 8, 23


def random_row(tokens: int = TOKENS, window: int = WINDOW, seed: int = 0, rows: int = 1) -> Seen:
    """Keys, values and queries of no particular kind; nothing noted."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return Seen(
        queries=randn(rows, HEADS, window, FEATURES),
        keys=randn(rows, GROUPS, tokens, FEATURES),
        values=randn(rows, GROUPS, tokens, 3),
        accumulated=torch.zeros(rows, GROUPS, tokens),
        scale=FEATURES**-0.5,
        length=tokens,
    )


def needle_row(at: int = NEEDLE) -> Seen:
    """Every observed query points at one key, which is far from all others."""
    seen = random_row()
    direction = torch.nn.functional.normalize(torch.ones(FEATURES), dim=0)
    seen.queries.copy_(6 * direction + 0.1 * seen.queries)
    seen.keys[:, :, at] = 6 * direction
    return seen


def noted(evictor: Evictor, seen: Seen) -> Seen:
    """As the runtime hands it on: what the evictor notes first."""
    return Seen(
        seen.queries, seen.keys, seen.values, evictor.note(seen), seen.scale, seen.softcap, seen.length
    )


def evict(evictor: Evictor, seen: Seen, count: int, first: int = 0, newest: int = WINDOW) -> Kept:
    """What is left of a row."""
    seen = noted(evictor, seen)
    return evictor.merge(seen, choose(evictor.score(seen), count, first, newest))


def survivors(evictor: Evictor, seen: Seen, count: int, first: int = 0, newest: int = WINDOW) -> torch.Tensor:
    """The numbers of the tokens that stay, ``[B, G, count]``."""
    seen = noted(evictor, seen)
    return choose(evictor.score(seen), count, first, newest)
