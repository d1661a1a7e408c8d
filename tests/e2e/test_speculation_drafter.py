"""Drafters, their registry, length rules and statistics."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphwright.ir.errors import InputError
from graphwright.runtime.speculation import (
    AdaptiveLength,
    Draft,
    FixedLength,
    Generation,
    NgramDrafter,
    Outcome,
    Speculation,
    describe_drafters,
    make_drafter,
)
from graphwright.runtime.speculation.drafters.ngram import NgramIndex
from graphwright.runtime.speculation.stats import DraftStats, GenerationStats


def rescan(text: Sequence[int], low: int, high: int, budget: int) -> list[int]:
    """The definition: the latest earlier occurrence of the longest suffix, found by looking everywhere."""
    for size in range(min(high, len(text)), low - 1, -1):
        suffix = list(text[len(text) - size :])
        for start in range(len(text) - 1, size - 1, -1):
            if list(text[start - size : start]) == suffix:
                out = list(text)
                for step in range(budget):
                    out.append(out[start + step])
                return out[len(text) :]
    return []


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=40),
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), max_size=6),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(1, 8),
)
def test_incremental_index_equals_a_rescan(
    prompt: list[int], growth: list[list[int]], low: int, more: int, budget: int
) -> None:
    index, text = NgramIndex(prompt, low, low + more), list(prompt)
    assert index.continuation(budget) == rescan(text, low, low + more, budget)
    for tokens in growth:
        index.extend(tokens)
        text += tokens
        assert index.continuation(budget) == rescan(text, low, low + more, budget)


def test_ngram_keeps_rows_apart_and_budgets() -> None:
    drafter = NgramDrafter(max_ngram=3, tokens=4)
    drafter.begin(Generation([[1, 2, 3, 4, 5, 1, 2], [9, 8, 7], [1, 2, 1, 2]]))
    assert drafter.propose([0, 1, 2], [9, 9, 1]) == [Draft([3, 4, 5, 1]), Draft(), Draft([1])]
    drafter.observe(1, Outcome([9, 8]))
    assert drafter.propose([1, 0], [2, 1]) == [Draft([7, 9]), Draft([3])]
    drafter.begin(Generation([[1, 2]]))
    assert drafter.propose([0], [4]) == [Draft()]


def test_registry_lists_and_builds() -> None:
    assert "prompt lookup" in describe_drafters()["ngram"]
    drafter = make_drafter("ngram", tokens=5)
    assert isinstance(drafter, NgramDrafter) and drafter.tokens == 5 and drafter.name == "ngram"
    assert str(drafter) == "ngram(tokens=5)"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ngrams", {}, "did you mean ngram"),
        ("ngram", {"token": 3}, "has no option token"),
        ("ngram", {"tokens": 0}, "drafts nothing"),
        ("ngram", {"max_ngram": 1}, "no n-gram to look up"),
    ],
)
def test_bad_drafters_are_refused(name: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_drafter(name, **options)


def test_length_rules() -> None:
    rule = AdaptiveLength(start=3, low=1, high=6)
    rule.begin(2)
    for proposed, accepted, expected in ((3, 3, 5), (5, 5, 6), (6, 2, 5), (0, 0, 5), (5, 0, 4)):
        rule.update(0, proposed, accepted)
        assert rule.budget(0) == expected and rule.budget(1) == 3
    for _ in range(9):
        rule.update(1, 3, 0)
    assert rule.budget(1) == 1
    default = Speculation(make_drafter("ngram", tokens=6)).rule
    assert isinstance(default, FixedLength) and default.budget(0) == 6
    for wrong in (lambda: FixedLength(-1), lambda: AdaptiveLength(start=9, high=4)):
        with pytest.raises(InputError):
            wrong()


def test_stats_add_up() -> None:
    one, two = DraftStats(), DraftStats()
    one.record(5, 2)
    two.record(4, 4)
    two.record(3, 0)
    one.add(two)
    out = one.as_dict()
    assert out["accepted_per_position"] == [2, 2, 1, 1]
    assert (out["drafts"], out["draft_tokens"], out["accepted"]) == (3, 12, 6)
    assert out["acceptance_rate"] == 0.5 and out["mean_acceptance_length"] == 3.0
    total = GenerationStats(calls=1, tokens=4, by_drafter={"a": one})
    total.add(GenerationStats(calls=1, tokens=3, by_drafter={"a": two, "b": two}))
    data = total.as_dict()
    assert data["calls"] == 2 and data["tokens"] == 7 and data["drafts"] == 7
    assert set(data["by_drafter"]) == {"a", "b"}
    assert GenerationStats().as_dict()["acceptance_rate"] == 0.0
