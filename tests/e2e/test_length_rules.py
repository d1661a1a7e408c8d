"""Length rules: the same output with each of them, and the lengths that they promise."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from graphwright.cost_model.speculation import expected_tokens
from graphwright.ir.errors import InputError
from graphwright.passes.base import parse_pass
from graphwright.runtime.model import OptimizedModel
from graphwright.runtime.speculation import Drafter, NgramDrafter, Speculation, make_speculation
from graphwright.runtime.speculation.options import StepCosts, step_costs
from graphwright.runtime.speculation.rules.confidence import Confidence
from graphwright.runtime.speculation.rules.goodput import Goodput
from graphwright.runtime.speculation.rules.length_rule import RULES, LengthRule
from tests.e2e.fake_program import TableProgram
from tests.e2e.table_drafter import TableDrafter, speculation
from tests.e2e.test_generate import padded
from tests.e2e.test_trees import CONFIG, LAW, LOGITS, ROWS, continued, grown

CURVE = "1:1.0+2:1.25+4:1.45+8:1.9+16:2.5"


def model(drafter: Drafter, rule: LengthRule, tree: str = "chain") -> OptimizedModel:
    return OptimizedModel(
        TableProgram(LOGITS),
        config=CONFIG,
        generation_config=GenerationConfig(),
        speculation=speculation(drafter, tree, rule=rule),
    )


@pytest.mark.parametrize("rule", sorted(RULES.classes()))
@pytest.mark.parametrize("tree", ["none", "chain", "greedy"])
def test_greedy_output_is_the_same(rule: str, tree: str) -> None:
    drafter = NgramDrafter(min_ngram=1) if tree == "none" else TableDrafter(LAW)
    fast = model(drafter, RULES.parse(rule), "chain" if tree == "none" else tree)
    inputs = padded(ROWS, "left")
    out = fast.generate(**inputs, max_new_tokens=30)[:, inputs["input_ids"].shape[1] :]
    assert out.tolist() == [continued(row, 30) for row in ROWS]
    assert fast.stats()["last"]["accepted"] > 0


# --- confidence -----------------------------------------------------------------------------------


def test_confidence_stops_a_path_that_has_probably_gone_wrong() -> None:
    law = torch.tensor([[0.1, 0.9], [0.2, 0.8]])
    for threshold, length in ((0.95, 0), (0.9, 1), (0.7, 2), (0.5, 3), (0.4, 4)):  # 0.9 * 0.8 ** (n - 1)
        floor = Confidence(threshold).floor(0) - 1e-6
        assert len(grown("chain", law, 62, floor=floor)[0]) == length
    rule = Confidence(0.5, tokens=4)
    assert rule.budget(0) == 4


def test_confidence_bounds_what_is_drafted() -> None:
    loose, strict = (model(TableDrafter(LAW), Confidence(threshold)) for threshold in (0.0, 0.6))
    rates = []
    for fast in (loose, strict):
        fast.generate(**padded(ROWS, "left"), max_new_tokens=30)
        rates.append(fast.stats()["last"]["acceptance_rate"])
    assert 0 < 2 * rates[0] < rates[1]


# --- goodput --------------------------------------------------------------------------------------


def begun(rows: int = 1, **options: str | float) -> Goodput:
    rule = Goodput(**{"costs": CURVE, **options})  # type: ignore[arg-type]
    rule.begin(rows)
    return rule


def test_costs_are_straight_between_points() -> None:
    curve = step_costs(CURVE, "here")
    assert [curve(tokens) for tokens in (1, 2, 3, 4, 6, 16)] == pytest.approx(
        [1, 1.25, 1.35, 1.45, 1.675, 2.5]
    )
    assert curve.most == 16 and isinstance(curve, StepCosts)


@pytest.mark.parametrize("start", [0.0, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_the_budget_has_the_best_goodput(start: float) -> None:
    rule, curve = begun(start=start), step_costs(CURVE, "here")
    goodput = {n: expected_tokens(start, n) / curve(1 + n) for n in range(16)}
    assert goodput[rule.budget(0)] == pytest.approx(max(goodput.values()))
    if start <= 0.2:
        assert rule.budget(0) == 0


def test_speculation_goes_off_and_on_again_row_by_row() -> None:
    rule = begun(2, probe=5)
    lengths = []
    for _ in range(40):  # everything of row 0 is refused, everything of row 1 accepted
        lengths.append(rule.budget(0))
        if lengths[-1]:
            rule.update(0, lengths[-1], 0)
        rule.update(1, rule.budget(1), rule.budget(1))
    assert lengths[0] > 0 and rule.budget(1) == 15
    off = lengths[lengths.index(0) :]
    assert off[:10] == [0, 0, 0, 0, 1] * 2, "one token is tried after every four plain steps"
    cycles = 0
    while rule.budget(0) < 4 and cycles < 60:
        cycles += 1
        if now := rule.budget(0):
            rule.update(0, now, now)
    assert 5 < cycles < 60


def test_a_probe_waits_for_a_draft() -> None:
    rule = begun(start=0.1, probe=3)
    assert [rule.budget(0) for _ in range(6)] == [0, 0, 1, 1, 1, 1]  # the drafter had nothing to say
    rule.update(0, 1, 0)
    assert rule.budget(0) == 0


CHANCES = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=15).map(
    lambda found: sorted(found, reverse=True)
)


@settings(max_examples=40, deadline=None)
@given(CHANCES, st.booleans(), st.integers(0, 10))
def test_what_is_kept_of_a_draft_has_the_best_goodput(chances: list[float], right: bool, before: int) -> None:
    rule, curve = begun(probe=99), step_costs(CURVE, "here")
    promised = held = 2.0
    for _ in range(before):
        kept = rule.keep(0, [0.8, 0.7])
        if kept:
            rule.update(0, kept, kept if right else 0)
            promised = 0.9 * promised + sum([0.8, 0.7][:kept])
            held = 0.9 * held + (kept if right else 0)
    honesty = held / promised
    gained = [(1 + honesty * sum(chances[:n])) / curve(1 + n) for n in range(len(chances) + 1)]
    kept = rule.keep(0, chances)
    assert gained[kept] == pytest.approx(max(gained))
    # The floor never hides a token that would have been kept.
    assert all(chance >= rule.floor(0) - 1e-9 for chance in chances[:kept])


def test_chances_that_promise_too_much_are_not_believed() -> None:
    rule = begun(memory=0.2)
    first = rule.keep(0, [0.5] * 8)
    assert first > 0
    for _ in range(20):
        rule.budget(0)
        if kept := rule.keep(0, [0.5] * 8):
            rule.update(0, kept, 0)
    assert rule.keep(0, [0.5] * 8) == 0 and rule.budget(0) == 0
    for _ in range(2000):  # long after the last success there is still something to divide by
        rule.update(0, 1, 0)
    assert rule.floor(0) == 1 and rule.keep(0, [1.0]) == 0
    # and a row whose drafts state their chances is let grow, for the chances say where to stop
    honest = begun()
    honest.keep(0, [0.9] * 3)
    honest.update(0, 3, 3)
    assert honest.budget(0) == 15


class Wrong(TableDrafter):
    """Lists, with confidence, what never follows."""

    def __init__(self) -> None:
        order = LOGITS.argsort(-1)
        super().__init__(torch.full_like(LAW, 0.001).scatter(1, order[:, :1], 0.9))


@pytest.mark.parametrize("tree", ["chain", "greedy"])
def test_drafts_that_fail_stop(tree: str) -> None:
    fast, always = (
        model(Wrong(), Goodput(costs=CURVE), tree),
        model(Wrong(), RULES.parse("fixed(tokens=4)"), tree),
    )
    for one in (fast, always):
        one.generate(torch.tensor([ROWS[0]]), max_new_tokens=120)
    mine, theirs = (one.stats()["last"] for one in (fast, always))
    assert mine["accepted"] == theirs["accepted"] == 0
    assert mine["drafts"] < 25 and theirs["drafts"] > 100
    assert mine["draft_tokens"] < theirs["draft_tokens"] / 8


def test_drawn_drafts_take_their_length_from_acceptance() -> None:
    torch.manual_seed(1)
    rule = Goodput(costs=CURVE)
    kept: list[Sequence[float]] = []
    rule.keep = lambda row, chances: kept.append(chances) or 0  # type: ignore[method-assign,func-returns-value]
    fast = model(TableDrafter(torch.softmax(LOGITS, -1)), rule)
    fast.generate(torch.tensor([ROWS[0]]), max_new_tokens=60, do_sample=True, top_k=0)
    assert not kept, "a drawn draft is not cut"
    assert rule.budget(0) == 15  # the drafter is the target: everything is accepted


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("goodput(costs=1:1.0)", "what steps cost"),
        ("goodput(costs=2:1.0+4:2)", "what steps cost"),
        ("goodput(costs=1:1.0+4:0.5)", "what steps cost"),
        ("goodput(costs=1:1.0+4)", "what steps cost"),
        ("goodput(costs=1:1.0+4:nan)", "what steps cost"),
        ("goodput(memory=1)", "not a rule"),
        ("confidence(threshold=2)", "not a rule"),
    ],
)
def test_bad_options_are_refused(text: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        RULES.parse(text)


def test_a_pass_names_a_rule_with_costs() -> None:
    chosen = parse_pass("speculate{tokens=6,rule=goodput(costs=1:1.0+8:1.9,probe=4)}")
    assert parse_pass(str(chosen)) == chosen
    built = make_speculation(chosen.options())  # type: ignore[attr-defined]
    assert isinstance(built, Speculation) and built.rule == Goodput(costs="1:1.0+8:1.9", probe=4)
