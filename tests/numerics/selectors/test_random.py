"""``random``: its choice depends on the query, the head and the page, and on nothing else."""

from __future__ import annotations

import pytest
import torch

from tests.numerics.selectors.pages import HEADS, SHAPE, normal, summarize


def scores(q: torch.Tensor, pages: int = 64) -> torch.Tensor:
    """``[B, H, T, N]``."""
    keys = torch.zeros(q.shape[0], pages, SHAPE.groups, SHAPE.tokens, SHAPE.features)
    return summarize("random", keys.to(q.dtype)).score(q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_uniform_and_of_one_kind_with_nothing(dtype: torch.dtype) -> None:
    drawn = scores(normal(4, HEADS, 16, SHAPE.features, dtype=dtype))
    assert drawn.min() >= 0 and drawn.max() < 1
    assert abs(float(drawn.mean()) - 0.5) < 0.01 and abs(float(drawn.var()) - 1 / 12) < 0.003
    flat = drawn.flatten(0, 2)
    assert len({tuple(row) for row in flat.tolist()}) == len(flat)
    apart = torch.corrcoef(flat) - torch.eye(len(flat))
    assert apart.abs().max() < 0.65 and apart.abs().mean() < 0.13  # 64 pages: 1 / 8 by chance
    assert torch.corrcoef(flat.T).fill_diagonal_(0).abs().max() < 0.3


def test_the_same_query_draws_the_same_wherever_it_stands() -> None:
    q = normal(2, HEADS, 6, SHAPE.features)
    drawn = scores(q)
    assert torch.equal(scores(q.flip(2)), drawn.flip(2)) and torch.equal(scores(q.flip(0)), drawn.flip(0))
    assert torch.equal(scores(q, pages=9), drawn[..., :9])


def test_a_query_that_differs_in_one_bit_draws_otherwise_and_one_in_the_sign_of_zero_does_not() -> None:
    q = normal(1, HEADS, 1, SHAPE.features)
    q[..., 3] = 0.0
    other, negative = q.clone(), q.clone()
    other[..., 5] = torch.nextafter(q[..., 5], torch.tensor(9.0))
    negative[..., 3] = -0.0
    assert not (scores(other) == scores(q)).any()
    assert torch.equal(scores(negative), scores(q))
    assert (scores(q)[:, 0] != scores(q[:, [1, 0, 2, 3]])[:, 1]).all(), "heads draw by themselves"
