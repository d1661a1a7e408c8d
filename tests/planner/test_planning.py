"""The planner on a captured model: prices that add up, the fastest plan within the budget, and reasons."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest

import graphwright as gw
from graphwright.cost_model.stores import default_stores
from graphwright.cost_model.target import resolve_target
from graphwright.ir.errors import BudgetError
from graphwright.ir.graph import Graph
from graphwright.optimizer.driver import capture_step
from graphwright.optimizer.planner import Planned, Request, plan_best, plan_given
from graphwright.optimizer.planner import menu as planner_menu
from graphwright.optimizer.planner.alternatives import Alternative, ProgramChoice
from graphwright.optimizer.planner.menu import Menu, make_menu
from graphwright.optimizer.planner.store_kernels import kernel_family
from graphwright.optimizer.quantities import quantity
from graphwright.optimizer.report import Status
from graphwright.passes import base
from graphwright.passes.base import parse_pass, registered_passes
from graphwright.passes.speculate import Speculate
from tests.architectures import POSITIONS, tiny_model

LAYERS = 3
WORKLOAD = gw.Workload(batch=4, prompt=128, generate=64)
# One layer keeps 128 elements a token of keys and values, or 64 of its input, of 4 bytes each.
KV = 128 * 4 * WORKLOAD.batch * WORKLOAD.capacity
MINIMUM = KV // 2


@pytest.fixture(scope="module")
def gpt2() -> Graph:
    """Multi-head attention: keys and values, or half as much; the feed-forward takes the most workspace."""
    return canonical("gpt2", layers=LAYERS, n_inner=2048)


@pytest.fixture(scope="module")
def menu(gpt2: Graph) -> Menu:
    """Everything that can be chosen for it, priced once."""
    return make_menu(plain(gpt2), request())


@pytest.fixture(scope="module")
def best(gpt2: Graph) -> Planned:
    """The plan without a budget."""
    return plan_best(gpt2, request())


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that do not look at other plans: no front, which takes as long as everything else."""
    monkeypatch.setattr(planner_menu, "front", lambda *_: [])


def canonical(name: str, **options: Any) -> Graph:
    return capture_step(tiny_model(name, device="meta", **options))[0]


def plain(graph: Graph) -> Graph:
    """As the planner prices it: op by op unless a pass compiles it, with the target's kernels."""
    graph = graph.copy()
    graph.annotations["compile"] = False
    graph.annotations["decode_kernels"] = kernel_family(resolve_target("h100"))
    return graph


def request(budget: gw.Budget | None = None, workload: gw.Workload = WORKLOAD, **options: Any) -> Request:
    options = {"program_passes": (Speculate(tokens=4),), **options}
    return Request(resolve_target("h100"), workload, budget or gw.Budget(), POSITIONS, **options)


def cuts(planned: Planned) -> list[str]:
    """The cut of each layer."""
    found = {}
    for decision in planned.decisions:
        if decision.status is Status.APPLIED and decision.site:
            chosen = parse_pass(decision.pass_name)
            found[base.Site(decision.site).layer] = chosen.cut  # type: ignore[attr-defined]
    return [found[layer] for layer in sorted(found, key=str)]


@dataclass(frozen=True)
class Price:
    """What the menu says of one alternative everywhere, under one program choice."""

    seconds_per_token: float
    step_seconds: float
    memory_bytes: float


def price(menu: Menu, alternative: Alternative, choice: ProgramChoice) -> Price:
    """Added up by hand from the per-layer prices."""
    options = [next(o for o in found if o.name == alternative.name) for found in menu.prices.sites().values()]
    outside = next(p for p in menu.prices.programs(menu.fixed_bytes) if p.name == choice.name)
    step = outside.seconds + sum(o.seconds[choice.name] for o in options)
    memory = outside.memory_bytes + sum(o.memory_bytes for o in options)
    return Price(step / outside.tokens_per_step, step, memory)


# --- prices --------------------------------------------------------------------------------------


def test_layers_and_the_rest_add_up_to_the_whole(menu: Menu, gpt2: Graph) -> None:
    """The price of every alternative, compiled or not, is that of the rewritten graph, to 0.1 per cent."""
    steps = [c for c in menu.choices if c.shape.tokens == 1]
    names = {(a.name, c.name) for a, c in itertools.product(menu.usable, steps)}
    assert ("place_cache{cut=kv}", "plain") in names and len(names) == 6
    for alternative, choice in itertools.product(menu.usable, steps):
        whole = plan_given(gpt2.copy(), [*alternative.passes, *choice.passes], menu.request)
        predicted = whole.predicted["decode"]["seconds_per_token"]
        assert price(menu, alternative, choice).step_seconds == pytest.approx(predicted, rel=1e-3)
        assert whole.plan.seconds_per_token == predicted


def test_a_mixed_plan_costs_what_its_layers_cost(menu: Menu, gpt2: Graph) -> None:
    """One layer with the minimum cut, the others with keys and values: within two per cent."""
    kv, minimum = menu.usable[:2]
    compiled = next(c for c in menu.choices if c.name == "compile_layers")
    passes = ["place_cache{cut=kv,layers=0+2}", "place_cache{cut=minimum,layers=1}", "compile_layers"]
    mixed = plan_given(gpt2.copy(), passes, menu.request)
    low, high = (price(menu, a, compiled).step_seconds for a in (kv, minimum))
    expected = low + (high - low) / LAYERS
    assert low < expected < high
    assert mixed.plan.seconds_per_token == pytest.approx(expected, rel=0.02)
    assert mixed.predicted["memory"]["cache_bytes"] == 2 * KV + MINIMUM


def test_stores_are_priced_as_they_are_kept(menu: Menu) -> None:
    for options in menu.prices.sites().values():
        kept = {o.name: o.memory_bytes for o in options}
        assert kept["place_cache{cut=kv}"] == KV
        assert kept["place_cache{cut=minimum}"] == MINIMUM


# --- the choice ----------------------------------------------------------------------------------


def test_the_chosen_plan_is_the_fastest_of_all_uniform_ones(menu: Menu, best: Planned) -> None:
    prices = {
        (a.name, c.name): price(menu, a, c).seconds_per_token
        for a, c in itertools.product(menu.usable, menu.choices)
    }
    assert best.plan.seconds_per_token == pytest.approx(min(prices.values()), rel=1e-9)
    chosen = min(prices, key=lambda key: prices[key])
    assert " + ".join(best.plan.passes) == " + ".join(chosen)


def test_the_graph_is_left_as_it_was(gpt2: Graph) -> None:
    before = str(gpt2.fx)
    plan_best(gpt2, request(gw.Budget(memory="1GiB")))
    assert str(gpt2.fx) == before and "compile" not in gpt2.annotations


def test_the_same_request_gets_the_same_answer(gpt2: Graph, best: Planned) -> None:
    budget = gw.Budget(memory=int(best.plan.memory_bytes - 1))
    first, second = (plan_best(gpt2, request(budget)) for _ in range(2))
    assert first.plan == second.plan
    assert first.others == second.others and first.decisions == second.decisions


def test_a_memory_bound_pushes_layers_to_the_smaller_cut_one_by_one(gpt2: Graph, few: None) -> None:
    """Each tighter bound gives up the speed of as many layers as it must."""
    whole = plan_given(gpt2.copy(), ["place_cache{cut=minimum}"], request()).predicted["memory"]
    fixed = whole["weights_bytes"] + whole["workspace_bytes"]
    seconds, stores = [], []
    for small in range(1, LAYERS + 1):
        limit = fixed + (LAYERS - small) * KV + small * MINIMUM
        planned = plan_best(gpt2, request(gw.Budget(memory=limit)))
        assert sorted(cuts(planned)) == ["kv"] * (LAYERS - small) + ["minimum"] * small
        assert planned.plan.memory_bytes <= limit and planned.predicted["memory"]["fits"]
        seconds.append(planned.plan.seconds_per_token)
        stores.append(planned.predicted["memory"]["cache_bytes"])
    assert seconds == sorted(seconds) and len(set(seconds)) == LAYERS
    assert stores == [(LAYERS - small) * KV + small * MINIMUM for small in range(1, LAYERS + 1)]


def test_each_layer_of_a_mixed_plan_stores_what_its_alternative_does(gpt2: Graph, few: None) -> None:
    whole = plan_given(gpt2.copy(), ["place_cache{cut=minimum}"], request()).predicted["memory"]
    limit = whole["weights_bytes"] + whole["workspace_bytes"] + KV + 2 * MINIMUM
    planned = plan_best(gpt2, request(gw.Budget(memory=limit)))
    widths: dict[int, int] = {}
    for store in default_stores(planned.graph):
        layer = base.Site(store.name).layer
        assert layer is not None
        widths[layer] = widths.get(layer, 0) + store.elements_per_token
    expected = {"kv": 128, "minimum": 64}
    assert [widths[layer] for layer in range(LAYERS)] == [expected[cut] for cut in cuts(planned)]
    assert set(cuts(planned)) == {"kv", "minimum"}
    # The plan reproduces itself: its strings, applied by name, give the same program.
    again = plan_given(gpt2.copy(), planned.plan.passes, request())
    assert again.plan.passes == planned.plan.passes and again.graph.counts() == planned.graph.counts()


# --- budgets that nothing meets ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (gw.Budget(memory="8KiB"), r"needs at least .*MiB of memory, the limit is 8 KiB"),
        (gw.Budget(latency=1e-9), r"takes .* us a token, 0\.001 us are allowed"),
        (gw.Budget(memory="8KiB", latency=1e-9), r"of memory.*; .*a token"),
    ],
)
def test_an_unmeetable_budget_names_the_closest_plan(gpt2: Graph, budget: gw.Budget, words: str) -> None:
    with pytest.raises(BudgetError, match=words) as caught:
        plan_best(gpt2, request(budget))
    assert "the closest plan is ['place_cache" in str(caught.value.hint)
    assert "h100" in str(caught.value.where)


def test_the_closest_plan_to_too_little_memory_is_the_smallest(gpt2: Graph) -> None:
    with pytest.raises(BudgetError) as caught:
        plan_best(gpt2, request(gw.Budget(memory="8KiB")))
    assert "['place_cache{cut=minimum}'" in str(caught.value.hint)


def test_a_bound_that_only_the_whole_plan_breaks_is_named_as_given(gpt2: Graph) -> None:
    """Stores fit, the workspace of recomputing does not: the message has the caller's limit and true need."""
    long = gw.Workload(batch=4, prompt=8, generate=248)
    kv, minimum = (
        plan_given(gpt2.copy(), [f"place_cache{{cut={cut}}}"], request(workload=long)).predicted["memory"]
        for cut in ("kv", "minimum")
    )
    assert kv["workspace_bytes"] < minimum["workspace_bytes"]
    limit = minimum["weights_bytes"] + kv["workspace_bytes"] + minimum["cache_bytes"]
    with pytest.raises(BudgetError) as caught:
        plan_best(gpt2, request(gw.Budget(memory=limit), long))
    needed = quantity("bytes", minimum["total_bytes"])
    assert f"at least {needed} of memory, the limit is {quantity('bytes', limit)}" in caught.value.what


def test_what_need_not_fit_is_planned_all_the_same(gpt2: Graph, best: Planned) -> None:
    free = request(gw.Budget(memory="8KiB"), must_fit=False)
    planned = plan_best(gpt2, free)
    assert not planned.predicted["memory"]["fits"]
    assert planned.plan.passes == best.plan.passes


# --- what was not chosen -------------------------------------------------------------------------


def test_every_pass_that_was_not_chosen_has_a_reason(gpt2: Graph) -> None:
    planned = plan_best(gpt2, request(program_passes=()))
    named = {d.pass_name for d in planned.decisions}
    for cls in registered_passes().values():
        assert named >= {str(p) for p in cls.variants()}
    refused = [d for d in planned.decisions if d.status is not Status.APPLIED]
    assert refused and all(d.reason for d in planned.decisions)
    assert not {d.pass_name for d in refused if d.status is Status.UNPROFITABLE} & set(planned.plan.passes)
    slower = next(d for d in refused if d.pass_name == "place_cache{cut=minimum}")
    assert slower.predicted is not None and slower.predicted["seconds_per_token"] > 0
    assert slower.predicted["memory_bytes"] < 0 and "slower" in slower.reason


def test_a_cut_that_is_no_alternative_says_so() -> None:
    """Grouped heads: the minimum cut is keys and values."""
    planned = plan_best(canonical("llama"), request())
    found = [d for d in planned.decisions if d.pass_name == "place_cache{cut=minimum}"]
    assert [(d.status, d.site) for d in found] == [(Status.UNPROFITABLE, "")]
    assert "what another placement does" in found[0].reason


def test_runners_up_are_listed_and_none_is_better(gpt2: Graph, best: Planned) -> None:
    tight = gw.Budget(memory=int(best.plan.memory_bytes - 1))
    for planned in (best, plan_best(gpt2, request(tight))):
        own = planned.plan
        assert planned.others
        assert own.passes not in [other.passes for other in planned.others]
        assert len({other.passes for other in planned.others}) == len(planned.others)
        times = [other.seconds_per_token for other in planned.others]
        assert times == sorted(times) and times[0] >= own.seconds_per_token * (1 - 1e-9)
        assert all(other.reason and other.kl == 0 for other in planned.others)


def test_runners_up_are_priced_with_and_without_their_drafts(gpt2: Graph, best: Planned) -> None:
    """A step without drafts is what can be timed against another program's."""
    for other in best.others:
        steps = [p for p in other.passes if not p.startswith("speculate")]
        whole = plan_given(gpt2.copy(), steps, request())
        assert other.step_seconds == pytest.approx(whole.plan.seconds_per_token, rel=0.02)


# --- program-wide passes -------------------------------------------------------------------------


def test_passes_of_the_request_replace_the_variants(gpt2: Graph) -> None:
    """Drafts at a measured acceptance are weighed, and no others."""
    good, bad = Speculate(tokens=4, acceptance=0.9), Speculate(tokens=2, acceptance=0.0)
    planned = plan_best(gpt2, request(program_passes=(bad, good)))
    assert planned.plan.passes[-1] == str(good)
    drafts = [d for d in planned.decisions if d.pass_name.startswith("speculate")]
    assert {(d.pass_name, d.status) for d in drafts} == {
        (str(good), Status.APPLIED),
        (str(bad), Status.UNPROFITABLE),
    }
    lost = next(d for d in drafts if d.pass_name == str(bad))
    assert lost.predicted is not None and lost.predicted["seconds_per_token"] > 0


def test_drafts_that_nothing_accepts_are_refused(gpt2: Graph) -> None:
    never = tuple(Speculate(tokens=n, acceptance=0.0) for n in (2, 8))
    planned = plan_best(gpt2, request(program_passes=never))
    assert not any(p.startswith("speculate") for p in planned.plan.passes)
    assert "speculation" not in planned.graph.annotations
