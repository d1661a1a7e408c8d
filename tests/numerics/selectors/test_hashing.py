"""``hashing``: bits count angles, and several rounds the best of them."""

from __future__ import annotations

import math

import pytest
import torch

from tests.numerics.selectors.pages import HEADS, SHAPE, normal, summarize


def at_angle(q: torch.Tensor, share: float) -> torch.Tensor:
    """A vector at ``share`` of pi from ``q [D]``."""
    other = normal(q.shape[0], seed=9)
    other -= q * (other @ q) / (q @ q)
    return q / q.norm() * math.cos(share * math.pi) + other / other.norm() * math.sin(share * math.pi)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_bits_that_differ_are_the_share_of_the_angle(share: float) -> None:
    q = normal(SHAPE.features)
    keys = at_angle(q, share).expand(1, 1, SHAPE.groups, SHAPE.tokens, -1)
    score = summarize("hashing(bits=4096)", keys).score(q.expand(1, HEADS, 1, -1))
    assert torch.allclose(score, torch.full_like(score, -32 * share), atol=1.0)
    if share in (0.0, 1.0):
        assert torch.allclose(score, torch.full_like(score, -32 * share))


def test_a_page_is_nearly_as_good_as_its_best_key() -> None:
    q = normal(1, HEADS, 1, SHAPE.features)
    keys = normal(1, 3, SHAPE.groups, SHAPE.tokens, SHAPE.features, seed=2)
    found = summarize("hashing", keys)
    each = summarize("hashing", keys.flatten(1, 3)[:, :, None, None].expand(-1, -1, SHAPE.groups, -1, -1))
    apart = each.score(q).unflatten(-1, (3, SHAPE.groups, SHAPE.tokens))
    own = torch.stack([apart[:, head, :, :, head * SHAPE.groups // HEADS] for head in range(HEADS)], dim=1)
    assert torch.allclose(found.score(q), own.logsumexp(-1) - math.log(SHAPE.tokens))


def test_of_several_rounds_the_best_counts() -> None:
    q, keys = normal(1, HEADS, 2, SHAPE.features), normal(1, 6, SHAPE.groups, 1, SHAPE.features, seed=3)
    both, planes = summarize("hashing(bits=32, rounds=2)", keys), normal(64, SHAPE.features, seed=4)
    found = []
    for rows in (planes, planes[:32].repeat(2, 1), planes[32:].repeat(2, 1)):
        own = {"planes": rows}
        made = both.selector.summarize(keys.flatten(0, 1), own, None)["hashes"].unflatten(0, (1, 6))
        found.append(both._replace(summary={"hashes": made}, constants=own).score(q))
    assert torch.equal(found[0], torch.maximum(found[1], found[2]))
    assert not torch.equal(found[1], found[2])


def test_planes_are_the_same_in_every_run() -> None:
    planes = summarize("hashing(bits=8)", normal(1, 1, 1, 1, 2)).constants["planes"]
    assert planes.shape == (8, 2) and planes.dtype == torch.float32
    again = torch.randn(8, 2, generator=torch.Generator().manual_seed(0x484158))
    assert torch.equal(planes, again)
