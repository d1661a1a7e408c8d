"""Lossy passes in the planner: where the losses that were measured fit, and what is never free."""

from __future__ import annotations

import math
from typing import Any

import pytest

import graphwright as gw
from graphwright.cost_model.target import resolve_target
from graphwright.ir.errors import BudgetError
from graphwright.ir.graph import Graph
from graphwright.optimizer.driver import capture_step
from graphwright.optimizer.planner import Planned, Request, menu, plan_best
from graphwright.optimizer.quality import Sensitivity
from graphwright.optimizer.report import Status
from graphwright.passes import base
from tests.architectures import POSITIONS, tiny_model
from tests.planner.lossy_pass import register_rounding


@pytest.fixture(scope="module")
def gpt2() -> Graph:
    """Three layers."""
    return capture_step(tiny_model("gpt2", device="meta", layers=3))[0]


def request(budget: gw.Budget | None = None, **options: Any) -> Request:
    workload = gw.Workload(batch=4, prompt=128, generate=64)
    return Request(resolve_target("h100"), workload, budget or gw.Budget(), POSITIONS, **options)


@pytest.fixture
def lossy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lossy pass that the cost model sees as profitable. Other plans are not looked at here."""
    monkeypatch.setattr(menu, "front", lambda *_: [])
    register_rounding(monkeypatch)


LOSSES = (0.01, 0.04, 0.02)


def measured(graph: Graph, passes: Any) -> dict[tuple[str, str], Sensitivity]:
    """As if measured: some layers lose more than others."""
    return {
        (f"transformer.h.{layer}.attn", str(p)): Sensitivity(kl, kl / 2)
        for p in passes
        for layer, kl in enumerate(LOSSES)
    }


def rounded(planned: Planned) -> set[int]:
    """The layers that a lossy pass was applied to."""
    return {
        layer
        for d in planned.decisions
        if d.status is Status.APPLIED and d.pass_name.startswith("round_cache")
        and (layer := base.Site(d.site).layer) is not None
    }  # fmt: skip


@pytest.mark.parametrize(
    ("budget", "layers"),
    [
        (gw.Budget(kl=0.005), set()),
        (gw.Budget(kl=0.031), {0, 2}),
        (gw.Budget(kl=0.071), {0, 1, 2}),
        (gw.Budget(perplexity=1.0152), {0, 2}),  # exp(0.015) is 1.0151
        (gw.Budget(perplexity=1.0151), {0}),
        (gw.Budget(kl=0.015, perplexity=2.0), {0}),
    ],
)
def test_losses_are_spent_where_they_fit(
    gpt2: Graph, lossy: None, budget: gw.Budget, layers: set[int]
) -> None:
    """As many layers as the sum of what they lose allows; the plan says how much that is."""
    planned = plan_best(gpt2, request(budget, measure_loss=measured))
    assert rounded(planned) == layers
    assert planned.plan.kl == pytest.approx(sum(LOSSES[layer] for layer in layers))
    assert planned.plan.perplexity_ratio == pytest.approx(math.exp(planned.plan.kl / 2))


def test_without_a_budget_nothing_lossy_is_tried(gpt2: Graph, lossy: None) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("measured although nothing may be lost")

    planned = plan_best(gpt2, request(measure_loss=never))
    assert not rounded(planned) and planned.plan.kl == 0
    found = [d for d in planned.decisions if d.pass_name == "round_cache"]
    assert [(d.status, d.reason) for d in found] == [(Status.ILLEGAL, "the budget allows no loss")]


def test_losses_that_cannot_be_measured_are_refused(gpt2: Graph, lossy: None) -> None:
    planned = plan_best(gpt2, request(gw.Budget(kl=1.0)))
    assert not rounded(planned)
    found = [d for d in planned.decisions if d.pass_name == "round_cache"]
    assert found and all(d.status is Status.ILLEGAL and "cannot be measured" in d.reason for d in found)


def test_a_layer_that_was_not_measured_is_not_free(gpt2: Graph, lossy: None) -> None:
    def some(graph: Graph, passes: Any) -> Any:
        return {key: loss for key, loss in measured(graph, passes).items() if ".1." not in key[0]}

    planned = plan_best(gpt2, request(gw.Budget(kl=1.0), measure_loss=some))
    assert rounded(planned) == {0, 2}


def test_what_breaks_a_layer_is_no_option_there(gpt2: Graph, lossy: None) -> None:
    def broken(graph: Graph, passes: Any) -> Any:
        found = measured(graph, passes)
        return {k: Sensitivity(float("inf"), 0.0) if ".2." in k[0] else loss for k, loss in found.items()}

    planned = plan_best(gpt2, request(gw.Budget(kl=1.0), measure_loss=broken))
    assert rounded(planned) == {0, 1}


def test_a_tightened_budget_allows_less_and_in_the_end_nothing(gpt2: Graph, lossy: None) -> None:
    for tighten, layers in ((0.5, {0, 2}), (0.2, {0})):
        planned = plan_best(gpt2, request(gw.Budget(kl=0.071), measure_loss=measured, tighten=tighten))
        assert rounded(planned) == layers

    # A text on which every loss looks like a gain: exact all the same.
    def better(graph: Graph, passes: Any) -> Any:
        return {key: Sensitivity(loss.kl, -0.1) for key, loss in measured(graph, passes).items()}

    budget = gw.Budget(perplexity=1.01)
    assert rounded(plan_best(gpt2, request(budget, measure_loss=better))) == {0, 1, 2}
    assert not rounded(plan_best(gpt2, request(budget, measure_loss=better, tighten=0.0)))


def test_memory_and_losses_are_bounded_together(gpt2: Graph, lossy: None) -> None:
    """No plan meets both bounds on quality and a memory below the smallest: the closest is exact."""
    with pytest.raises(BudgetError) as caught:
        plan_best(gpt2, request(gw.Budget(kl=1e-9, memory="8KiB"), measure_loss=measured))
    assert "round_cache" not in str(caught.value.hint)
