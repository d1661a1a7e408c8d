"""``channels``: which are chosen, what they are worth, and in how many bits."""

from __future__ import annotations

import pytest
import torch

from graphwright.ir.selectors import parse_selector
from graphwright.ir.selectors.selector import Samples
from tests.numerics.selectors.pages import HEADS, SHAPE, exact_mass, normal, summarize

LARGE = [[2, 5, 11], [0, 5, 15]]
EVERYTHING = f"count={SHAPE.features}"


def loud(large: list[list[int]], heads: int, seed: int) -> torch.Tensor:
    """``[heads, n, D]`` in which some features of each group are large."""
    x = normal(heads, 64, SHAPE.features, seed=seed)
    for head in range(heads):
        x[head, :, large[head * len(large) // heads]] *= 8
    return x


def chosen(samples: Samples) -> list[list[int]]:
    """The channels of each group."""
    found: list[list[int]] = (
        parse_selector("channels(count=3)").constants(SHAPE, HEADS, samples)["channels"].tolist()
    )
    return found


def test_channels_that_are_large_are_chosen() -> None:
    assert chosen(Samples(loud(LARGE, SHAPE.groups, 0))) == LARGE


def test_queries_count_as_much_as_keys_and_each_group_has_its_own() -> None:
    flat, other = normal(SHAPE.groups, 64, SHAPE.features), [[1, 4, 6], [3, 7, 9]]
    assert chosen(Samples(flat, loud(other, HEADS, 1))) == other
    silent = loud(LARGE, SHAPE.groups, 0)
    silent[0, :, 2] = 0  # however large its queries
    queries = loud(LARGE, HEADS, 1)
    assert 2 not in chosen(Samples(silent, queries))[0] and chosen(Samples(silent, queries))[1] == LARGE[1]


def test_without_samples_the_first_ones_stand_in() -> None:
    assert chosen(Samples()) == [[0, 1, 2]] * SHAPE.groups


def test_scores_are_the_mass_of_what_is_kept() -> None:
    keys = normal(2, 5, SHAPE.groups, SHAPE.tokens, SHAPE.features)
    q = normal(2, HEADS, 3, SHAPE.features, seed=1)
    found = summarize("channels(count=3)", keys, samples=Samples(loud(LARGE, SHAPE.groups, 0)))
    for group, kept in enumerate(LARGE):
        rest = [i for i in range(SHAPE.features) if i not in kept]
        keys[:, :, group, :, rest] = 0
    assert torch.allclose(found.score(q), exact_mass(q, keys))


@pytest.mark.parametrize(("bits", "error"), [(16, 1e-12), (8, 0.01), (4, 0.2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_channels_are_the_mass_but_for_rounding(bits: int, error: float, dtype: torch.dtype) -> None:
    keys = normal(2, 5, SHAPE.groups, SHAPE.tokens, SHAPE.features, dtype=dtype)
    q = normal(2, HEADS, 3, SHAPE.features, seed=1, dtype=dtype)
    found = summarize(f"channels({EVERYTHING}, bits={bits})", keys)
    away = (found.score(q) - exact_mass(q, keys)).abs()
    assert away.mean() < (error if dtype == torch.float32 or bits == 16 else error + 0.02)


def test_few_bits_take_few_bytes() -> None:
    sizes = [
        parse_selector(f"channels(count=16, bits={bits})").page_bytes(SHAPE, torch.bfloat16)
        for bits in (16, 8, 4)
    ]
    tokens = SHAPE.groups * SHAPE.tokens
    assert sizes == [tokens * 32, tokens * (16 + 4), tokens * (8 + 4)]


def test_labels_that_are_all_alike_are_kept_exactly() -> None:
    keys = torch.full((1, 2, SHAPE.groups, SHAPE.tokens, SHAPE.features), 1.75)
    q = normal(1, HEADS, 2, SHAPE.features)
    found = summarize(f"channels({EVERYTHING}, bits=4)", keys)
    assert torch.allclose(found.score(q), exact_mass(q, keys))
