"""Overlapped drafting: tokens a round against simulation, and when it pays."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.cost_model.parallel_drafting import (
    DraftPrices,
    overlapped_tokens,
    price_overlap,
)
from graphwright.ir.errors import InputError


def simulated(acceptance: float, drafts: int, rounds: int) -> float:
    """Tokens a round, played out."""
    dice, tokens, after = random.Random(3), 0, False
    for _ in range(rounds):
        checked = drafts if after else 1
        kept = next((i for i in range(checked) if dice.random() >= acceptance), checked)
        tokens += min(kept + 1, checked)
        after = kept == checked
    return tokens / rounds


@pytest.mark.parametrize(("acceptance", "drafts"), [(0.6, 4), (0.9, 3), (0.3, 1), (0.85, 8)])
def test_tokens_of_a_round_are_those_of_the_scheme(acceptance: float, drafts: int) -> None:
    assert overlapped_tokens(acceptance, drafts) == pytest.approx(
        simulated(acceptance, drafts, 40_000), rel=0.03
    )


def test_ends_of_the_range() -> None:
    assert overlapped_tokens(0.0, 5) == 1
    assert overlapped_tokens(1.0, 5) == 5
    for wrong in [(1.2, 3), (0.5, 0)]:
        with pytest.raises(InputError, match="round"):
            overlapped_tokens(*wrong)
    with pytest.raises(InputError, match="share"):
        DraftPrices(0.1, lambda tokens: 1.0, shared=2.0)


def test_a_draft_model_of_a_fifth_hides_behind_verification() -> None:
    prices = DraftPrices(0.2, lambda tokens: 1.0)
    found = price_overlap(0.9, prices)
    assert found.pays and found.drafts == 5  # as many as fit into one verification, as PEARL has it
    # One after the other the same five drafts take twice as long.
    assert found.speedup > 1.2 * found.sequential_speedup


@settings(max_examples=30, deadline=None)
@given(st.floats(0.0, 1.0), st.floats(0.01, 1.0))
def test_on_shared_cores_it_never_pays(acceptance: float, draft: float) -> None:
    """A cycle in turn takes as long as a round, and its step chooses one token more."""
    assert not price_overlap(acceptance, DraftPrices(draft, lambda tokens: 1.0, shared=1.0)).pays


def test_guesses_that_are_refused_are_not_worth_the_overlap() -> None:
    prices = DraftPrices(0.02, lambda tokens: 1.0, sync_seconds=0.05)
    assert not price_overlap(0.4, prices).pays
