"""Where one limit gives way to another, against the predictor on both sides of the edge."""

from __future__ import annotations

import json

import pytest
import torch.fx
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.cost_model import Cost, Workload, breakeven, crossovers, estimate, graph_cost, predict
from graphwright.cost_model.cost import B, C, T
from graphwright.cost_model.graph_cost import GraphCost
from tests.architectures import tiny_config

MLP = Cost({"bfloat16": 10**8 * B * T}, {"weights": 10**8}, {}, 1)
ATTENTION = Cost({"bfloat16": 10**3 * B * C * T}, {"cache": 10**4 * B * C}, {}, 1)
WORKLOAD = Workload(batch=2, prompt=50, generate=2)


@pytest.fixture
def cost() -> GraphCost:
    """Two ops: one reads weights only, the other the cache only."""
    fx = torch.fx.Graph()
    mlp, attention = fx.placeholder("mlp"), fx.placeholder("attention")
    return GraphCost({mlp: MLP, attention: ATTENTION}, {mlp: "linear", attention: "cache_attention"})


def by_name(found):
    names = [(entry["what"], entry["quantity"]) for entry in found]
    assert len(set(names)) == len(names)
    for entry in found:
        assert set(entry) == {"what", "quantity", "value", "note"}
        assert entry["value"] is None or isinstance(entry["value"], float)
        assert entry["note"].endswith(".") and entry["note"].count(". ") == 0
    return dict(zip(names, found, strict=True))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 3000))
def test_edges_are_found_exactly(start, length, limit):
    """Of one range that a doubling size falls into, both ends; of none, nothing."""
    stop = start + length
    edge = breakeven(lambda size: start <= size < stop, limit)
    tried = {min(2**n, limit) for n in range(limit.bit_length() + 1)}
    if not any(start <= size < stop for size in tried):
        assert edge.never
        return
    assert edge.starts == start
    assert edge.stops == (stop if stop <= limit else None)
    assert edge.always == (start == 1 and stop > limit)


def test_the_batch_at_which_decoding_is_compute_bound(cost, machine):
    found = by_name(crossovers(cost, machine, WORKLOAD))["decode becomes compute-bound", "batch"]
    batch = found["value"]
    sides = [predict(cost, machine, batch=b, context=50).bound for b in (batch - 1, batch)]
    assert sides == ["memory", "compute"]
    # Reading: 1 ms of weights, and 5 us of cache for each sequence. Arithmetic: 10 us for each.
    assert batch == pytest.approx(200, abs=1)
    assert f"{batch:,.0f}" in found["note"]


def test_a_long_cache_is_never_compute_bound(cost, machine):
    long = Workload(batch=2, prompt=1000, generate=2)
    found = by_name(crossovers(cost, machine, long))["decode becomes compute-bound", "batch"]
    assert found["value"] is None
    assert "not compute-bound" in found["note"]


def test_the_context_at_which_the_cache_takes_longer(cost, machine):
    name = ("reading the cache takes longer than reading the weights", "context")
    found = by_name(crossovers(cost, machine, WORKLOAD))[name]
    # 10^4 bytes a token and sequence, two sequences, against 10^8 bytes of weights.
    assert found["value"] == 10**8 / (2 * 10**4) + 1
    bounded = by_name(crossovers(cost, machine, WORKLOAD, max_positions=1000))[name]
    assert bounded["value"] is None
    assert "1,000" in bounded["note"]


def test_speculation_is_in_the_list_only_with_an_acceptance(cost, machine):
    whats = {what for what, _ in by_name(crossovers(cost, machine, WORKLOAD))}
    assert "speculation stops paying" not in whats
    found = by_name(crossovers(cost, machine, WORKLOAD, acceptance=0.6, drafts=4))
    batch = found["speculation stops paying", "batch"]
    context = found["speculation stops paying", "context"]
    assert batch["value"] > 2
    assert context["value"] is None
    assert "Drafting 4 tokens" in batch["note"] and "pays at every context" in context["note"]
    never = by_name(crossovers(cost, machine, WORKLOAD, acceptance=0.0))
    for quantity in ("batch", "context"):
        entry = never["speculation stops paying", quantity]
        assert entry["value"] is None
        assert f"pays at no {quantity}" in entry["note"]


def test_a_better_drafter_pays_for_longer(cost, machine):
    def stops(acceptance: float) -> float:
        found = by_name(crossovers(cost, machine, WORKLOAD, acceptance=acceptance, drafts=4))
        return found["speculation stops paying", "batch"]["value"]

    assert stops(0.4) < stops(0.6) < stops(0.8)


@pytest.mark.parametrize(
    ("largest", "positions", "value", "words"),
    [
        (5000, 8192, 5001, "From 5,001 tokens on"),
        (8192, 8192, None, "all 8,192 positions fits"),
        (None, None, None, "any context fits"),
        (0, 8192, 1, "leave no room"),
    ],
)
def test_the_context_at_which_the_cache_outgrows_the_memory(cost, machine, largest, positions, value, words):
    memory = {"largest_context": largest, "limit_bytes": 80 * 10**9}
    found = by_name(crossovers(cost, machine, WORKLOAD, max_positions=positions, memory=memory))
    entry = found["the cache outgrows the memory", "context"]
    assert entry["value"] == value
    assert words in entry["note"] and "80 GB" in entry["note"]


def test_a_captured_model(captured, machine):
    graph = captured(tiny_config("llama"))
    cost = graph_cost(graph)
    memory = estimate(graph, machine, WORKLOAD, cost=cost, max_positions=256)["memory"]
    found = crossovers(cost, machine, WORKLOAD, acceptance=0.9, drafts=2, max_positions=256, memory=memory)
    assert len(by_name(found)) == 5
    assert json.loads(json.dumps(found)) == found
