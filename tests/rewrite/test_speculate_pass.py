"""Whether and how a program speculates, and how acceptance is measured on text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphwright.cost_model.workload import Workload
from graphwright.ir.errors import InputError, PassError
from graphwright.passes.base import parse_pass
from graphwright.passes.speculate import MOST_TOKENS, Speculate
from graphwright.runtime.speculation import (
    FixedLength,
    Generation,
    Outcome,
    Speculation,
    make_drafter,
    make_speculation,
)
from graphwright.runtime.speculation.acceptance import DraftRates, halves, measure_drafts
from graphwright.runtime.speculation.draft import NO_DRAFT, Draft
from graphwright.runtime.speculation.drafter import _REGISTRY, Drafter
from tests.rewrite.cached_programs import TARGET, WORKLOAD, rewrite


def test_the_choice_becomes_an_annotation(captured) -> None:
    graph, records = rewrite(captured("llama"), "place_cache", "speculate{tokens=4,rule=adaptive}")
    assert records[-1].status == "applied" and records[-1].fidelity == "distribution"
    assert graph.annotations["speculation"] == {
        "drafter": "ngram",
        "tokens": 4,
        "tree": "chain",
        "verifier": "auto",
        "rule": "adaptive",
    }


def test_the_options_build_the_drafter(captured) -> None:
    graph, _ = rewrite(captured("llama"), "place_cache", "speculate{drafter=ngram(max_ngram=4),tokens=5}")
    chosen = graph.annotations["speculation"]
    built = make_speculation(chosen)
    assert built.tokens == 5 and built.drafter == make_drafter("ngram", max_ngram=4)


def test_the_rest_of_the_graph_stays(captured) -> None:
    before, _ = rewrite(captured("llama"), "place_cache")
    after, _ = rewrite(captured("llama"), "place_cache", "speculate")
    assert [str(n) for n in after.nodes] == [str(n) for n in before.nodes]


def test_without_a_cache_nothing_can_be_rolled_back(captured) -> None:
    graph = captured("llama").canonical.copy()
    records = Speculate()(graph, WORKLOAD, TARGET, force=True)
    assert [r.status for r in records] == ["illegal"] and "no cache" in records[0].reason
    assert "speculation" not in graph.annotations


def test_a_program_speculates_once(captured) -> None:
    _, records = rewrite(captured("llama"), "place_cache", "speculate", "speculate{tokens=2}")
    assert records[-1].status == "illegal" and "already" in records[-1].reason


def test_the_price_follows_acceptance_and_batch(captured) -> None:
    graph, _ = rewrite(captured("llama"), "place_cache")

    def gain(acceptance: float, batch: int = 1) -> float:
        chosen = Speculate(acceptance=acceptance)
        workload = Workload(batch=batch)
        return chosen.gain(chosen.find(graph)[0], workload, TARGET).seconds_per_token

    assert gain(0.0) >= 0.0 > gain(0.9)  # nothing is accepted: a larger step for one token
    assert gain(0.9) < gain(0.5) < gain(0.1)


def test_a_price_that_is_a_loss_is_not_taken(captured) -> None:
    graph, _ = rewrite(captured("llama"), "place_cache")
    # So slow at arithmetic that nine tokens take nine times as long as one.
    slow = replace(TARGET, name="slow", peak_flops=dict.fromkeys(TARGET.peak_flops, 1e8))
    records = Speculate()(graph, WORKLOAD, slow)
    assert [r.status for r in records] == ["unprofitable"]
    assert "tokens a cycle at acceptance" in records[0].reason
    assert "speculation" not in graph.annotations


def test_the_drafter_is_always_printed() -> None:
    assert str(Speculate()) == "speculate{drafter=ngram}"
    assert str(Speculate(tokens=4)) == "speculate{drafter=ngram,tokens=4}"
    assert str(Speculate(drafter="suffix", rule="adaptive")) == "speculate{drafter=suffix,rule=adaptive}"
    assert parse_pass("speculate") == parse_pass("speculate{drafter=ngram}") == Speculate()


@pytest.mark.parametrize(
    "options",
    [
        "tokens=0",
        f"tokens={MOST_TOKENS + 1}",
        "rule=two words",
        "tree=fixed(",
        "acceptance=-0.1",
        "acceptance=nan",
        "drafter=two words",
    ],
)
def test_bad_options_are_refused(options: str) -> None:
    with pytest.raises(PassError):
        parse_pass(f"speculate{{{options}}}")


# --- acceptance ----------------------------------------------------------------------------------


class HalfRight(Drafter):
    """Guesses the next token of 0, 1, 2, ... rightly and the one after it wrongly."""

    def begin(self, generation: Generation) -> None:
        self.last = [row[-1] for row in generation.prompts]

    def propose(self, rows: Sequence[int], budget: Sequence[int]) -> list[Draft]:
        return [Draft([self.last[row] + 1, 0][:most]) for row, most in zip(rows, budget, strict=True)]

    def observe(self, row: int, outcome: Outcome) -> None:
        self.last[row] = outcome.tokens[-1]


class Tree(HalfRight):
    """Puts the right next token beside a wrong one."""

    def propose(self, rows: Sequence[int], budget: Sequence[int]) -> list[Draft]:
        return [Draft([0, self.last[row] + 1], [-1, -1]) for row in rows]


class Silent(HalfRight):
    """Never guesses."""

    def propose(self, rows: Sequence[int], budget: Sequence[int]) -> list[Draft]:
        return [NO_DRAFT for _ in rows]


class Curious(Silent):
    """Wants logits."""

    wants_logits = True


COUNTING = list(range(1, 41))


@pytest.fixture(scope="module", autouse=True)
def _known() -> Iterator[None]:
    """The drafters above have names in this module's tests only."""
    doubles = {"half_right": HalfRight, "tree": Tree, "silent": Silent, "curious": Curious}
    with pytest.MonkeyPatch.context() as patch:
        for name, cls in doubles.items():
            patch.setitem(_REGISTRY.known, name, dataclass(cls))
        yield


def rates(drafter: str, rows: Sequence[Sequence[int]], tokens: int, **options: Any) -> DraftRates:
    """What a drafter gives on the second halves of texts."""
    speculation = Speculation(make_drafter(drafter, **options), FixedLength(tokens), tokens=tokens)
    return measure_drafts(speculation, halves(rows))


def test_every_second_guess_is_right() -> None:
    # Two at a time: in each cycle one is accepted, one refused, and the model's own token follows.
    assert rates("half_right", [COUNTING], 2).tokens_per_cycle == 2.0
    # One at a time: every guess is right.
    one = rates("half_right", [COUNTING], 1)
    assert (one.tokens_per_cycle, one.acceptance, one.hit_rate) == (2.0, 1.0, 1.0)


def test_a_tree_is_followed_to_the_right_child() -> None:
    assert rates("tree", [COUNTING], 2).tokens_per_cycle == 2.0


def test_silence_is_no_hit_and_no_refusal() -> None:
    silent = rates("silent", [COUNTING], 4)
    assert (silent.tokens_per_cycle, silent.hit_rate, silent.acceptance) == (1.0, 0.0, 0.0)


def test_ngrams_on_text_that_repeats_and_text_that_does_not() -> None:
    period = [5, 9, 7, 3]
    repeating = rates("ngram", [period * 10], 8)
    assert (repeating.acceptance, repeating.tokens_per_cycle) == (1.0, 9.0)
    assert rates("ngram", [COUNTING], 8).tokens_per_cycle == 1.0
    both = rates("ngram", [period * 10, COUNTING], 8)
    assert 0.0 < both.hit_rate < 1.0
    assert both.acceptance == 1.0


@given(st.lists(st.lists(st.integers(0, 3), max_size=30), max_size=4), st.integers(1, 8), st.integers(2, 4))
def test_the_price_gives_back_what_was_measured(rows: list[list[int]], tokens: int, max_ngram: int) -> None:
    found = rates("ngram", rows, tokens, max_ngram=max_ngram)
    assert 0.0 <= found.acceptance <= 1.0
    priced = Speculate(
        tokens=tokens, acceptance=found.acceptance, hit_rate=found.hit_rate, verified=found.verified
    ).step_shape()
    assert priced.tokens_per_step == pytest.approx(found.tokens_per_cycle)


def test_nothing_to_guess_is_a_plain_step() -> None:
    for rows in ([], [[4]]):
        assert rates("ngram", rows, 8).tokens_per_cycle == 1.0


def test_bad_measurements_are_refused() -> None:
    with pytest.raises(InputError, match="no drafter"):
        rates("n-gramme", [COUNTING], 8)
    with pytest.raises(InputError, match="no option"):
        rates("ngram", [COUNTING], 8, depth=3)
    with pytest.raises(InputError, match="drafts nothing"):
        rates("ngram", [COUNTING], 0)
    with pytest.raises(InputError, match="needs the model's logits"):
        rates("curious", [COUNTING], 8)
