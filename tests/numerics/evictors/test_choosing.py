"""What all evictors have in common: the budget, the tokens that always stay, the registry."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.ir.errors import PassError
from graphwright.ir.eviction_ops import Retention, observe_queries
from graphwright.ir.evictors import choose, parse_evictor, registered_evictors
from graphwright.ir.evictors.evictor import leaving, merge_into, places
from tests.numerics.evictors.rows import GROUPS, NEEDLE, WINDOW, evict, needle_row, random_row, survivors

METHODS = sorted(registered_evictors())
#: Those that score by what observed queries attend to.
OBSERVING = [name for name in METHODS if registered_evictors()[name].observes]


def test_the_names() -> None:
    assert set(METHODS) == {
        "recent", "snapkv", "ems", "scope", "prefixkv", "chelsea", "actqkv", "random"
    }  # fmt: skip
    assert set(METHODS) - set(OBSERVING) == {"recent", "random", "chelsea"}


@pytest.mark.parametrize("name", METHODS)
def test_each_says_where_it_comes_from_and_parses_back(name: str) -> None:
    evictor = parse_evictor(name)
    assert parse_evictor(str(evictor)) == evictor
    assert evictor.summary and (evictor.source or name == "random")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("count", [13, 30, 59, 60])
def test_the_budget_is_exact_and_both_ends_stay(name: str, count: int) -> None:
    seen = random_row()
    kept = survivors(parse_evictor(name), seen, count, first=4)
    assert kept.shape == (1, GROUPS, count)
    for head in kept[0].tolist():
        assert head == sorted(set(head))
        assert {0, 1, 2, 3, *range(60 - WINDOW, 60)} <= set(head)
    found = evict(parse_evictor(name), seen, count, first=4)
    assert found.keys.shape == (1, GROUPS, count, 8) and found.values.shape == (1, GROUPS, count, 3)
    assert found.accumulated.shape == (1, GROUPS, count)
    assert found.keys.isfinite().all() and found.values.isfinite().all()


@pytest.mark.parametrize("name", METHODS)
def test_rows_do_not_depend_on_one_another(name: str) -> None:
    seen = random_row(rows=3)
    together = evict(parse_evictor(name), seen, 20)
    one = type(seen)(
        seen.queries[1:2], seen.keys[1:2], seen.values[1:2], seen.accumulated[1:2], seen.scale, 0.0, 60
    )
    alone = evict(parse_evictor(name), one, 20)
    assert torch.equal(together.keys[1:2], alone.keys)


@pytest.mark.parametrize("name", OBSERVING)
def test_a_needle_that_all_queries_look_for_stays(name: str) -> None:
    kept = survivors(parse_evictor(name), needle_row(), WINDOW + 1)
    assert (kept[:, :, 0] == NEEDLE).all()


@pytest.mark.parametrize("name", ["recent", "chelsea"])
def test_without_queries_the_needle_is_a_token_like_others(name: str) -> None:
    """What the test before would not tell: a method that kept it by chance."""
    kept = survivors(parse_evictor(name), needle_row(at=21), WINDOW + 1)
    assert not (kept == 21).any()


def test_equal_scores_keep_the_earlier_token() -> None:
    assert choose(torch.ones(1, 1, 9), 4, 1, 1).tolist() == [[[0, 1, 2, 8]]]


def test_infinite_scores_do_not_push_out_what_must_stay() -> None:
    scores = torch.full((1, 1, 6), float("inf"))
    scores[..., 2] = float("nan")
    assert choose(scores, 3, 1, 1).tolist() == [[[0, 1, 5]]]


@given(st.integers(1, 30), st.integers(0, 5), st.integers(1, 8), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_merging_keeps_weighted_sums(more: int, first: int, newest: int, seed: int) -> None:
    """The sum of weight times value is that of all tokens that went somewhere."""
    tokens, count = first + newest + more, first + newest + 1
    generator = torch.Generator().manual_seed(seed)
    seen = random_row(tokens, seed=seed)
    kept = choose(torch.rand((1, GROUPS, tokens), generator=generator), count, first, newest)
    weights = torch.rand((1, GROUPS, tokens), generator=generator) + 0.1
    target = torch.randint(0, count + 1, (1, GROUPS, tokens), generator=generator)
    into = torch.where(leaving(kept, tokens), target, places(kept, tokens))
    found = merge_into(seen, kept, into, weights)
    total = torch.zeros(1, GROUPS, count + 1).scatter_add_(2, into, weights)[..., :count]
    arrived = (into < count)[..., None] * weights[..., None] * seen.values
    assert torch.allclose((found.values * total[..., None]).sum(2), arrived.sum(2), atol=1e-5)


def test_a_token_by_itself_is_not_rounded() -> None:
    seen = random_row()
    kept = torch.arange(60).expand(1, GROUPS, 60)
    found = merge_into(seen, kept, kept.clone(), torch.rand(1, GROUPS, 60) + 0.1)
    assert torch.equal(found.keys, seen.keys) and torch.equal(found.values, seen.values)


# --- what a query sees -----------------------------------------------------------------------------


def test_attention_is_causal_within_the_window() -> None:
    """Of the last token, only the last query knows."""
    seen = random_row()
    shares = seen.attention()
    assert torch.allclose(shares.sum(-1), torch.ones(1, GROUPS), atol=1e-5)
    grouped = seen.queries.view(1, GROUPS, 2, WINDOW, 8)
    scores = torch.einsum("bghwd,bgnd->bghwn", grouped, seen.keys) * seen.scale
    late = torch.arange(60) > torch.arange(60 - WINDOW, 60)[:, None]
    expected = scores.masked_fill(late, float("-inf")).softmax(-1).mean((2, 3))
    assert torch.allclose(shares, expected, atol=1e-6)


def test_softcap_flattens() -> None:
    seen = needle_row()
    capped = type(seen)(seen.queries, seen.keys, seen.values, seen.accumulated, seen.scale, 1.0)
    assert capped.attention()[..., NEEDLE].max() < seen.attention()[..., NEEDLE].min()


# --- how much is kept ------------------------------------------------------------------------------


def test_budgets() -> None:
    kept = Retention(0.25, 0, 4, 32, 128)
    assert [kept.budget(n) for n in (10, 148, 149, 1000, 1001)] == [37, 37, 38, 250, 251]
    assert kept.slots(1000) == 250 + 128 and kept.slots(1000, 512) == 250 + 64 + 512
    assert kept.limit(1000) == 250 + 64
    assert [kept.evicts(n) for n in (100, 171, 172, 1000)] == [False, False, True, True]
    assert Retention(0.1, 0, 4, 32, 128).budget(1000) == 100  # and not 101
    fixed = Retention(0.5, 200, 4, 32, 128)
    assert fixed.budget(10**6) == 200 and fixed.slots(300) == 300


def test_a_ring_holds_the_newest_queries() -> None:
    """Whatever the steps were, and after a step that was rolled back."""
    window, total = 16, 500
    queries = torch.randn(1, 2, total, 4)
    for steps in ([1] * 40, [64, 3, 100, 64], [300, 1, 64]):
        ring, at = torch.zeros(1, 2, window + 64, 4), 0
        for tokens in steps:
            refused = torch.randn(1, 2, 64, 4)
            observe_queries(ring, refused, torch.tensor([at]), torch.tensor([64]))
            step = queries[:, :, at : at + tokens]
            observe_queries(ring, step, torch.tensor([at]), torch.tensor([tokens]))
            at += tokens
            newest = torch.arange(max(0, at - window), at)
            assert torch.equal(ring[:, :, newest % (window + 64)], queries[:, :, newest])


# --- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("snapvk", "did you mean snapkv"),
        ("snapkv(pool=4)", "no middle"),
        ("ems(merged=2)", "no fraction"),
        ("scope(decode=1)", "not a share"),
        ("actqkv(probes=0)", "not a fraction"),
        ("chelsea(chunk=1)", "no pairs"),
        ("recent(pool=3)", "no option"),
    ],
)
def test_what_does_not_parse(text: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        parse_evictor(text)
