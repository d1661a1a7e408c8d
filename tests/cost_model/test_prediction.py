from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.cost_model import Cost, predict, predict_prefill, roofline
from graphwright.cost_model.cost import B, C, T
from graphwright.cost_model.graph_cost import GraphCost

STEP = Cost({"bfloat16": 2 * B * T * 10**6}, {"weights": 2 * 10**6, "cache": 1000 * B * C}, {}, 3)


def two_groups():
    """A graph of two ops: a projection and the head."""
    import torch.fx

    fx = torch.fx.Graph()
    body, head = fx.placeholder("body"), fx.placeholder("head")
    costs = {body: STEP, head: Cost({"bfloat16": 10**6 * B * T}, {"weights": 10**6}, {}, 1)}
    return GraphCost(costs, {body: "linear", head: "lm_head"})


def test_time_is_the_larger_of_the_two_plus_launches(machine):
    memory_bound = predict(STEP, machine, batch=1, context=100)
    moved = 2 * 10**6 + 1000 * 100
    assert memory_bound.seconds == pytest.approx(moved / 1e11 + 3e-6)
    assert memory_bound.memory_seconds == pytest.approx(moved / 1e11)
    assert memory_bound.bound == "memory"
    compute_bound = predict(STEP, machine, batch=1000, tokens=10)
    assert compute_bound.seconds == pytest.approx(2 * 10**4 * 10**6 / 1e13 + 3e-6)
    assert compute_bound.bound == "compute"
    assert predict(Cost(launches=9), machine).bound == "launches"


def test_groups_are_bound_each_on_its_own(machine):
    compute, memory = Cost({"bfloat16": 10**10}), Cost(read={"weights": 10**8})
    apart = predict(compute, machine).seconds + predict(memory, machine).seconds
    together = predict(compute + memory, machine).seconds
    assert together == pytest.approx(1e-3)
    assert apart == pytest.approx(2e-3)


def test_a_dtype_without_a_peak_runs_as_a_wider_one(machine):
    half = predict(Cost({"float16": 10**10}), machine).compute_seconds
    assert half == pytest.approx(10**10 / 1e13)
    assert predict(Cost({"float64": 10**10}), machine).compute_seconds == pytest.approx(10**10 / 1e12)


def test_activations_are_free_until_they_outgrow_the_chip(machine):
    cost = Cost(read={"activations": 1000 * B * T}, written={"activations": 1000 * B * T}, launches=1)
    assert predict(cost, machine, tokens=10).memory_seconds == 0
    tokens = 2**30
    assert predict(cost, machine, tokens=tokens).memory_seconds == pytest.approx(2000 * tokens / 1e11)


def test_measured_fractions_slow_their_ops_down(machine):
    slow = replace(machine, measured={"linear_bandwidth": 0.5, "linear_flops": 0.25})
    graph = two_groups()
    fast_time, slow_time = (predict(graph, m, context=0) for m in (machine, slow))
    assert slow_time.memory_seconds == pytest.approx(2 * fast_time.memory_seconds)
    assert slow_time.compute_seconds == pytest.approx(4 * fast_time.compute_seconds)


def test_small_steps_read_from_caches(machine):
    cached = replace(machine, bandwidths=((1e6, 4e11), (1e8, 1e11)))
    part = Cost(read={"weights": 10**6})
    assert predict(part, cached, step_bytes=10**6).seconds == pytest.approx(10**6 / 4e11)
    assert predict(part, cached, step_bytes=10**9).seconds == pytest.approx(10**6 / 1e11)
    assert predict(part, cached).seconds == pytest.approx(10**6 / 1e11)
    # Halfway between the sizes, halfway between the times.
    middle = predict(part, cached, step_bytes=(10**6 + 10**8) / 2).seconds
    assert middle == pytest.approx((10**6 / 4e11 + 10**6 / 1e11) / 2)
    # A graph is a whole step: here it reads 3 MB and a little.
    step = predict(two_groups(), cached)
    assert step.memory_seconds == pytest.approx(step.bytes_read / cached.read_rate(3 * 10**6))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 64), st.integers(0, 10**5), st.integers(1, 64),
    st.sampled_from(["bandwidth", "launch_overhead", "peak_flops"]), st.floats(1.0, 8.0),
)  # fmt: skip
def test_a_better_machine_is_never_slower(batch, context, tokens, figure, factor):
    from graphwright.cost_model import resolve_target

    base = resolve_target("a100")
    if figure == "peak_flops":
        better = replace(base, peak_flops={name: rate * factor for name, rate in base.peak_flops.items()})
    elif figure == "bandwidth":
        better = replace(base, bandwidth=base.bandwidth * factor)
    else:
        better = replace(base, launch_overhead=base.launch_overhead / factor)
    point = {"batch": batch, "context": context, "tokens": tokens}
    assert predict(STEP, better, **point).seconds <= predict(STEP, base, **point).seconds


def test_predictions_add_and_scale(machine):
    one = predict(two_groups(), machine)
    both = one + one
    assert both.seconds == pytest.approx(2 * one.seconds)
    assert both.by_op == pytest.approx((2 * one).by_op)
    assert sum(one.by_op.values()) == pytest.approx(one.seconds)


def test_prefill_is_the_sum_of_its_steps_and_one_head(machine):
    graph = two_groups()
    whole = predict_prefill(graph, machine, batch=2, prompt=250, chunk=100)
    body = [
        predict(STEP, machine, batch=2, context=start, tokens=tokens).seconds
        for start, tokens in ((0, 100), (100, 100), (200, 50))
    ]
    head = predict(graph.by_op["lm_head"], machine, batch=2).seconds
    assert whole.seconds == pytest.approx(sum(body) + head)
    assert whole.flops == 2 * 2 * 250 * 10**6 + 2 * 10**6


def test_a_very_long_prefill_is_sampled_without_losing_work(machine):
    graph = two_groups()
    whole = predict_prefill(graph, machine, batch=1, prompt=1000 * 10, chunk=10)
    assert whole.flops == pytest.approx(2 * 10**4 * 10**6 + 10**6)
    reads = sum(2 * 10**6 + 1000 * 10 * step for step in range(1000)) + 10**6
    assert whole.bytes_read == pytest.approx(reads)


def test_roofline(machine):
    values = Cost({"bfloat16": 10**9}, {"weights": 10**8}).at()
    line = roofline(values, machine)
    assert line["intensity"] == 10
    assert line["ridge"] == 100
    assert line["attainable_bytes_per_second"] == pytest.approx(1e11)
    assert line["attainable_flops_per_second"] == pytest.approx(1e12)
