"""``oracle``: the mass itself."""

from __future__ import annotations

import pytest
import torch

from tests.numerics.selectors.pages import HEADS, SHAPE, exact_mass, normal, summarize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_masses(dtype: torch.dtype) -> None:
    keys = normal(2, 5, SHAPE.groups, SHAPE.tokens, SHAPE.features, dtype=dtype)
    q = normal(2, HEADS, 3, SHAPE.features, seed=1, dtype=dtype) * 4
    assert torch.allclose(summarize("oracle", keys).score(q), exact_mass(q, keys))


def test_it_costs_what_keys_cost() -> None:
    keys = normal(1, 5, SHAPE.groups, SHAPE.tokens, SHAPE.features, dtype=torch.bfloat16)
    found = summarize("oracle", keys)
    assert found.selector.page_bytes(SHAPE, torch.bfloat16) * 5 == keys.nbytes
