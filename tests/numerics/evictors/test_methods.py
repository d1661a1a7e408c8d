"""What tells the evictors apart, one by one."""

from __future__ import annotations

import pytest
import torch

from graphwright.ir.evictors import parse_evictor
from graphwright.ir.evictors.kinds.actqkv import activation_bias
from graphwright.ir.evictors.similar import most_similar
from tests.numerics.evictors.rows import (
    FEATURES,
    GROUPS,
    HEADS,
    NEEDLE,
    WINDOW,
    evict,
    needle_row,
    noted,
    random_row,
    survivors,
)


def test_recent_keeps_the_newest() -> None:
    kept = survivors(parse_evictor("recent"), random_row(), 20, first=4)
    assert kept[0, 1].tolist() == [0, 1, 2, 3, *range(44, 60)]


def test_random_follows_its_seed_and_the_length() -> None:
    seen = random_row()
    one, again, other = (survivors(parse_evictor(f"random(seed={n})"), seen, 20) for n in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    longer = type(seen)(seen.queries, seen.keys, seen.values, seen.accumulated, seen.scale, 0.0, 61)
    assert not torch.equal(survivors(parse_evictor("random(seed=1)"), longer, 20), one)


def test_snapkv_keeps_the_surroundings_of_what_counts() -> None:
    kept = survivors(parse_evictor("snapkv(pool=5)"), needle_row(), WINDOW + 5)
    assert kept[0, :, :5].tolist() == [list(range(NEEDLE - 2, NEEDLE + 3))] * GROUPS
    alone = survivors(parse_evictor("snapkv(pool=1)"), needle_row(), WINDOW + 5)
    assert alone[0, 0, :5].tolist() != list(range(NEEDLE - 2, NEEDLE + 3))


def test_snapkv_chooses_for_each_head() -> None:
    seen = needle_row()
    seen.keys[:, 1, 40], seen.keys[:, 1, NEEDLE] = seen.keys[:, 1, NEEDLE].clone(), 0.0
    kept = survivors(parse_evictor("snapkv(pool=1)"), seen, WINDOW + 1)
    assert kept[0, :, 0].tolist() == [NEEDLE, 40]


def test_ems_remembers_what_counted_before() -> None:
    """A token that earlier windows looked at stays, though this one does not."""
    evictor, seen = parse_evictor("ems"), random_row()
    seen.queries.mul_(0.01)  # attention is even
    assert not (survivors(evictor, seen, WINDOW + 1) == 5).any()
    seen.accumulated[:, :, 5] = 1.0
    assert (survivors(evictor, seen, WINDOW + 1)[:, :, 0] == 5).all()


def test_ems_merges_what_is_alike_and_drops_the_rest() -> None:
    """One of the tokens that leave has the key of the needle: its value goes there by its weight."""
    evictor, seen = parse_evictor("ems(merged=1.0,threshold=0.99)"), needle_row()
    seen.keys[:, :, 30] = seen.keys[:, :, NEEDLE] * 0.97  # as good a match, by the cosine, and scored lower
    seen = noted(evictor, seen)
    found = evict(evictor, type(seen)(*_again(seen)), WINDOW + 1)
    weights = seen.accumulated[0, 0, [NEEDLE, 30]]
    expected = (weights[:, None] * seen.values[0, 0, [NEEDLE, 30]]).sum(0) / weights.sum()
    assert torch.allclose(found.values[0, 0, 0], expected, atol=1e-5)
    assert torch.equal(found.values[0, :, 1:], seen.values[0, :, -WINDOW:])
    apart = evict(parse_evictor("ems(merged=0.0)"), type(seen)(*_again(seen)), WINDOW + 1)
    assert torch.equal(apart.values[0, :, 0], seen.values[0, :, NEEDLE])


def _again(seen):
    """The row before anything was noted."""
    blank = torch.zeros_like(seen.accumulated)
    return seen.queries, seen.keys, seen.values, blank, seen.scale, seen.softcap, seen.length


def test_scope_lets_a_window_that_is_past_fade() -> None:
    evictor, seen = parse_evictor("scope"), random_row()
    seen.queries.mul_(0.01)
    seen.accumulated[:, :, 5], seen.accumulated[:, :, 9] = 0.5, 0.2
    kept = survivors(evictor, seen, WINDOW + 2)
    assert (kept[:, :, :2] == torch.tensor([5, 9])).all()
    assert torch.allclose(noted(evictor, seen).accumulated[0, 0, 5], 0.25 + seen.attention()[0, 0, 5])
    assert [parse_evictor(f"scope(decode={share})").anchored(100) for share in (0.25, 0.5)] == [75, 50]


def test_actqkv_listens_to_the_query_that_stands_out() -> None:
    seen = needle_row()
    others = torch.nn.functional.normalize(torch.tensor([1.0, -1.0] * (FEATURES // 2)), dim=0)
    seen.keys[:, :, 40] = 6 * others
    seen.queries[:, :, 3] = 6 * others  # one of eight asks for another token
    assert activation_bias(seen.queries).argmax(-1).tolist() == [[3] * HEADS]
    assert (survivors(parse_evictor("actqkv(probes=0.125)"), seen, WINDOW + 1)[:, :, 0] == 40).all()
    assert (survivors(parse_evictor("prefixkv"), seen, WINDOW + 1)[:, :, 0] == NEEDLE).all()


# --- prefixkv --------------------------------------------------------------------------------------


def test_prefixkv_gives_more_to_layers_that_spread_their_attention() -> None:
    sharp, even = torch.full((1, 1, 100), 1e-4), torch.full((1, 1, 100), 0.01)
    sharp[..., 7] = 1.0
    found = parse_evictor("prefixkv").shares([sharp, even, even], 0.25)
    assert found[0] < 0.05 and found[1] == pytest.approx(found[2])
    assert sum(found) / 3 == pytest.approx(0.25)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 1.0])
def test_prefixkv_keeps_the_sum(keep: float) -> None:
    layers = [torch.rand((2, 3, 80), generator=torch.Generator().manual_seed(n)) ** n for n in range(1, 6)]
    found = parse_evictor("prefixkv").shares(layers, keep)
    assert sum(found) / len(found) == pytest.approx(keep)
    assert max(found) <= 1 and min(found) > 0


# --- chelsea ---------------------------------------------------------------------------------------


def pairs_row():
    """Tokens 2i and 2i + 1 have one direction, another one for each i of a chunk."""
    seen = random_row(32, window=2)
    seen.keys.copy_(torch.nn.functional.normalize(seen.keys, dim=-1))
    seen.keys[:, :, 1::2] = seen.keys[:, :, ::2] * 1.5
    return seen


def test_chelsea_merges_pairs_into_their_means() -> None:
    seen = pairs_row()
    found = evict(parse_evictor("chelsea(chunk=16)"), seen, 16, newest=0)
    assert torch.allclose(found.keys, seen.keys[:, :, ::2] * 1.25, atol=1e-6)
    means = (seen.values[:, :, ::2] + seen.values[:, :, 1::2]) / 2
    assert torch.allclose(found.values, means, atol=1e-6)
    assert (found.accumulated == 2).all()


def test_chelsea_counts_what_was_merged_before() -> None:
    """A mean over all tokens that a centroid stands for, merged at different times."""
    seen = pairs_row()
    seen.accumulated[:, :, ::2] = 3.0
    found = evict(parse_evictor("chelsea(chunk=16)"), seen, 16, newest=0)
    means = (3 * seen.values[:, :, ::2] + seen.values[:, :, 1::2]) / 4
    assert torch.allclose(found.values, means, atol=1e-6)
    assert (found.accumulated == 4).all()


def test_chelsea_merges_the_most_similar_first() -> None:
    seen = pairs_row()
    noise = torch.linspace(0, 2, 16)[:, None] * torch.randn(1, GROUPS, 16, FEATURES)
    seen.keys[:, :, 1::2] += noise[:, :, torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    kept = survivors(parse_evictor("chelsea(chunk=32)"), seen, 28, newest=0)
    gone = [sorted(set(range(32)) - set(head)) for head in kept[0].tolist()]
    _, cosine = most_similar(seen.keys[:, :, 1::2], seen.keys[:, :, ::2])
    for head, left in enumerate(gone):
        closest = cosine[0, head].topk(4).indices
        assert left == sorted((2 * closest + 1).tolist())


def test_chelsea_goes_below_half_of_a_chunk() -> None:
    seen = random_row(64, window=0)
    found = evict(parse_evictor("chelsea(chunk=16)"), seen, 8, newest=0)
    assert found.accumulated.sum(-1).tolist() == [[64.0] * GROUPS]  # nothing is dropped, all is merged
    weighted = (found.values * found.accumulated[..., None]).sum(2)
    assert torch.allclose(weighted, seen.values.sum(2), atol=1e-4)
