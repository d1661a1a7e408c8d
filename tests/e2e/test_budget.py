"""A budget on quality: what it allows is measured, layer by layer and then as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import graphwright as gw
from graphwright.cost_model.target import resolve_target
from graphwright.optimizer import check, loss, settle_drafts
from graphwright.optimizer.driver import capture_step
from graphwright.optimizer.loss import Losses
from graphwright.optimizer.planner import Request, plan_given
from graphwright.optimizer.quality import Quality, Sensitivity, store
from graphwright.optimizer.quality.text import sample_rows
from graphwright.optimizer.report import Status
from graphwright.passes.base import Site, parse_layers, parse_pass
from tests.architectures import tiny_config, tiny_model
from tests.planner.lossy_pass import register_rounding
from tests.quality.rounded_cache import RoundCache

LAYERS = 3
WORKLOAD = gw.Workload(prompt=32, generate=8)
ROUND = "round_cache"
Measured = dict[tuple[str, str], Sensitivity]


@pytest.fixture(scope="module")
def llama() -> Any:
    """Weights large enough that the model has opinions: a flat distribution loses nothing."""
    return tiny_model("llama", layers=LAYERS, initializer_range=0.3)


@pytest.fixture(scope="module")
def texts(llama: Any) -> list[list[int]]:
    """What losses are measured on: the model's own words, of which each rounding makes it less sure."""
    return sample_rows(llama, seed=0, rows=2, tokens=48)


@pytest.fixture(autouse=True)
def _world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A lossy pass, nothing measured yet, and a clock that says that every step is faster than predicted."""
    register_rounding(monkeypatch)
    monkeypatch.setattr(store, "cache_folder", lambda: tmp_path)
    step = {"seconds_per_token": 1e-9, "tokens_per_second": 1e9, "context": 8.0, "cache_bytes": 0.0}
    monkeypatch.setattr(check, "measure_decode", lambda *_: dict(step))
    monkeypatch.setattr(check, "measure_stock", lambda *_: dict(step))
    monkeypatch.setattr(settle_drafts, "continue_prompts", lambda *_: [])


@pytest.fixture
def optimize(llama: Any, texts: list[list[int]]) -> Callable[..., gw.OptimizedModel]:
    """``optimize(kl=..., perplexity=...)`` on the texts."""

    def call(**budget: float) -> gw.OptimizedModel:
        chosen = gw.Budget(**budget) if budget else None  # type: ignore[arg-type]
        return gw.optimize(llama, "cpu", workload=WORKLOAD, budget=chosen, calibration=texts)

    return call


@pytest.fixture
def losses(llama: Any, texts: list[list[int]]) -> Measured:
    """What rounding loses in each layer, really measured."""
    graph, _ = capture_step(llama)
    request = Request(resolve_target("h100"), WORKLOAD, gw.Budget(), None)
    exact = plan_given(graph.copy(), ["place_cache{cut=kv}"], request)
    return dict(Losses(llama, graph, texts, 0).measure(exact.graph, [RoundCache()]))


def rounded(fast: gw.OptimizedModel) -> set[int]:
    """The layers that the program rounds, by its plan; all of them without ``layers=``."""
    found: set[int] = set()
    for chosen in map(parse_pass, fast.plan.passes):
        if chosen.name == ROUND:
            found |= parse_layers(chosen.layers) or set(range(LAYERS))
    applied = {
        Site(d.site).layer
        for d in fast.report.by_status(Status.APPLIED)
        if parse_pass(d.pass_name).name == ROUND
    }
    assert applied == found
    assert bool(found) == bool(fast.graph.calls("aten.round.default"))
    return found


def cheapest(losses: Measured, count: int) -> set[int]:
    """The layers in which rounding loses least."""
    by_layer = {Site(site).layer: loss.kl for (site, _), loss in losses.items()}
    return set(sorted(by_layer, key=lambda layer: by_layer[layer])[:count])  # type: ignore[arg-type]


def combined(monkeypatch: pytest.MonkeyPatch, measured: Iterator[tuple[float, float]]) -> None:
    """What the measurements of whole programs find: KL and perplexity ratio, one after the other."""

    def measure(_: Any) -> Quality:
        kl, ratio = next(measured)
        return Quality(kl, ratio, 0.9, 80)

    monkeypatch.setattr(Losses, "_reference", lambda *_: SimpleNamespace(measure=measure))


# --- what is allowed -----------------------------------------------------------------------------


def test_without_a_budget_nothing_is_lost(optimize: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Losses, "measure", lambda *_: pytest.fail("measured a loss that nothing allows"))
    fast = optimize()
    assert not rounded(fast)
    assert fast.plan.kl == 0 and fast.plan.perplexity_ratio == 1
    refused = [d for d in fast.report.decisions if d.pass_name == ROUND]
    assert [(d.status, d.reason) for d in refused] == [(Status.ILLEGAL, "the budget allows no loss")]
    assert fast.report.measured["quality"]["mean_kl"] < 1e-6


def test_a_budget_is_spent_on_the_layers_that_lose_least(optimize: Any, losses: Measured) -> None:
    """Two of three layers fit; what the program really loses stands beside what was added up."""
    found = sorted(loss.kl for loss in losses.values())
    assert len(found) == LAYERS and found[0] > 0
    budget = (sum(found[:2]) + found[2]) / 2
    fast = optimize(kl=budget)
    assert rounded(fast) == cheapest(losses, 2)
    assert not fast.report.by_status(Status.UNDONE)
    added = sum(loss.kl for (site, _), loss in losses.items() if Site(site).layer in rounded(fast))
    assert fast.plan.kl == pytest.approx(added)
    report = fast.report
    assert report.predicted["quality"]["mean_kl"] == fast.plan.kl
    assert 0 < report.measured["quality"]["mean_kl"] <= budget
    assert report.plans[0]["predicted"]["kl"] == fast.plan.kl
    assert {d.fidelity for d in report.by_status(Status.APPLIED) if d.pass_name.startswith(ROUND)} == {
        "lossy"
    }


def test_a_budget_below_every_loss_is_exact(optimize: Any, losses: Measured) -> None:
    fast = optimize(kl=0.5 * min(loss.kl for loss in losses.values()))
    assert not rounded(fast) and fast.plan.kl == 0
    refused = next(d for d in fast.report.decisions if d.pass_name == ROUND)
    assert refused.status is Status.UNPROFITABLE and "not within the budget" in refused.reason


def test_perplexity_bounds_the_loss_likewise(optimize: Any, losses: Measured) -> None:
    """Logarithms add up; the bound is just below what all layers together add."""
    every = sum(loss.log_perplexity for loss in losses.values())
    assert every > 0
    fast = optimize(perplexity=math.exp(0.99 * every))
    found = rounded(fast)
    assert found and found != set(range(LAYERS))
    added = sum(loss.log_perplexity for (site, _), loss in losses.items() if Site(site).layer in found)
    assert fast.plan.perplexity_ratio == pytest.approx(math.exp(added))
    assert added <= 0.99 * every
    assert fast.report.measured["quality"]["perplexity_ratio"] <= math.exp(0.99 * every)


# --- the whole against the sum of its parts ------------------------------------------------------


def test_a_program_that_loses_more_than_its_parts_is_chosen_again(
    optimize: Any, losses: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three times the sum: the second choice is made under a third of the budget, and stays."""
    every = sum(loss.kl for loss in losses.values())
    budget = 1.001 * every
    combined(monkeypatch, iter([(3 * every, 1.0), (0.5 * budget, 1.0)]))
    fast = optimize(kl=budget)
    found = rounded(fast)
    assert found < set(range(LAYERS))
    assert fast.plan.kl <= budget / 3 * 1.001
    undone = fast.report.by_status(Status.UNDONE)
    assert [(d.pass_name, d.fidelity) for d in undone] == [(ROUND, "lossy")]
    assert f"measured KL {3 * every:.3g}" in undone[0].reason
    assert f"the KL budget is {budget:.3g}" in undone[0].reason
    assert undone[0].predicted == {"mean_kl": pytest.approx(every)}
    assert undone[0].measured == {"mean_kl": 3 * every}
    if found:
        assert fast.report.measured["quality"]["mean_kl"] == 0.5 * budget


@pytest.mark.parametrize("bound", ["kl", "perplexity"])
def test_what_never_fits_ends_exact(
    optimize: Any, losses: Measured, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    """Every measurement is just above the budget: fewer layers each time, and none in the end."""
    every = sum(loss.kl for loss in losses.values())
    budget = {"kl": 1.001 * every} if bound == "kl" else {"perplexity": 4.0}
    over = (1.2 * every, 1.0) if bound == "kl" else (every, 4.1)
    combined(monkeypatch, iter([over] * 9))
    fast = optimize(**budget)
    assert not rounded(fast)
    assert fast.plan.kl == 0 and fast.plan.perplexity_ratio == 1
    assert fast.plan.budget == gw.Budget(**budget)
    undone = fast.report.by_status(Status.UNDONE)
    assert undone and all("budget is" in d.reason and d.fidelity == "lossy" for d in undone)
    assert len({d.pass_name for d in undone}) == len(undone)  # another program each time
    assert fast.report.measured["quality"]["mean_kl"] < 1e-6  # of the exact program


def test_a_loss_out_of_nowhere_ends_exact_at_once(optimize: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that measured as free, and a whole that is not: sums say nothing here."""
    monkeypatch.setattr(Losses, "measure", lambda _, graph, passes: free(graph, passes))
    combined(monkeypatch, iter([(0.5, 1.5)]))
    fast = optimize(perplexity=1.2)
    assert not rounded(fast)
    assert len(fast.report.by_status(Status.UNDONE)) == 1
    refused = [d for d in fast.report.decisions if d.pass_name == ROUND and d.status is Status.ILLEGAL]
    assert [d.reason for d in refused] == ["plans with it lose more than the budget allows"]


def free(graph: Any, passes: Any) -> Measured:
    """Nothing is lost anywhere, and some text even predicted better."""
    sites = {site.name for p in passes for site in p.find(graph)}
    return {(site, str(p)): Sensitivity(0.0, -0.01) for p in passes for site in sites}


# --- measured once, or not at all ----------------------------------------------------------------


def test_losses_are_measured_once(optimize: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second call lowers no program to measure layers with, and chooses alike."""
    lowered = []
    lower = loss.op_by_op
    monkeypatch.setattr(loss, "op_by_op", lambda *args: lowered.append(1) or lower(*args))
    first = optimize(kl=10.0)
    count = len(lowered)
    assert count >= LAYERS + 1  # the exact program, and one for each layer
    second = optimize(kl=10.0)
    assert len(lowered) - count <= 1  # the exact program, beside the whole
    assert second.plan == first.plan and rounded(second) == set(range(LAYERS))


def test_a_plan_without_weights_refuses_what_it_cannot_measure() -> None:
    config = tiny_config("llama", layers=LAYERS)
    report = gw.plan(config, "h100", workload=WORKLOAD, budget=gw.Budget(kl=1.0))
    refused = [d for d in report.decisions if d.pass_name == ROUND]
    assert refused and all(d.status is Status.ILLEGAL for d in refused)
    assert {d.reason for d in refused} == {"what it loses cannot be measured here"}
    assert not any(ROUND in p for plan in report.plans for p in plan["passes"])


def test_rivals_of_a_lossy_plan_lose_no_more(optimize: Any, losses: Measured) -> None:
    """Every plan that is listed keeps the budget."""
    budget = 0.999 * sum(loss.kl for loss in losses.values())
    plans = optimize(kl=budget).report.plans
    assert len(plans) > 1
    assert all(plan["predicted"]["kl"] <= budget for plan in plans)
    assert any(plan["predicted"]["kl"] == 0 for plan in plans)
