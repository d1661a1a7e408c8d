"""``bounds`` and ``mean``: what holds of every key of a page."""

from __future__ import annotations

import torch

from tests.numerics.selectors.pages import HEADS, SCALE, SHAPE, exact_mass, normal, summarize


def test_no_key_is_above_the_bound_and_the_mass_is_above_the_mean() -> None:
    keys = normal(2, 5, SHAPE.groups, SHAPE.tokens, SHAPE.features)
    q = normal(2, HEADS, 3, SHAPE.features, seed=1)
    repeated = keys.repeat_interleave(HEADS // SHAPE.groups, dim=2).double()
    best = torch.einsum("bhtd,bnhpd->bhtnp", q.double(), repeated).amax(-1) * SCALE
    bound = summarize("bounds", keys).score(q)
    assert (bound >= best).all() and (bound < best + 8).all()
    mass = exact_mass(q, keys) - torch.tensor(SHAPE.tokens).log()
    mean = summarize("mean", keys).score(q)
    assert (mean <= mass + 1e-6).all() and (mean > mass - 5).all()


def test_a_page_of_one_key_is_that_key() -> None:
    keys = normal(1, 5, SHAPE.groups, 1, SHAPE.features).expand(-1, -1, -1, SHAPE.tokens, -1)
    q = normal(1, HEADS, 2, SHAPE.features, seed=1)
    wanted = exact_mass(q, keys) - torch.tensor(SHAPE.tokens).double().log()
    for text in ("bounds", "mean"):
        assert torch.allclose(summarize(text, keys).score(q).double(), wanted, atol=1e-6)
