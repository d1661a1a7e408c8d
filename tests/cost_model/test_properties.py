"""What holds for every model, machine and workload: monotonicity, additivity, units, closed forms."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphwright.cost_model import (
    Cost,
    GraphCost,
    StoreSpec,
    cache_bytes,
    graph_cost,
    predict,
    resolve_target,
    targets,
    weights_bytes,
)
from graphwright.ir.canonicalize import canonicalize
from tests.architectures import tiny_config

NAMES = ("llama", "mixtral", "gemma3_text")
CONFIGS = {name: tiny_config(name) for name in NAMES}
MACHINES = sorted(set(targets()) - {"cpu"})
PLACES = st.fixed_dictionaries(
    {"batch": st.integers(1, 256), "context": st.integers(0, 200_000), "tokens": st.integers(1, 64)}
)
SLOWLY = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
_COSTS: dict[str, GraphCost] = {}


@pytest.fixture(params=NAMES)
def cost(request, captured) -> GraphCost:
    """The cost of a tiny canonical model, kept: hypothesis asks for it many times."""
    if request.param not in _COSTS:
        graph = captured(CONFIGS[request.param]).copy()
        canonicalize(graph)
        _COSTS[request.param] = graph_cost(graph)
    return _COSTS[request.param]


@SLOWLY
@given(place=PLACES, name=st.sampled_from(MACHINES), factor=st.floats(1.0, 100.0))
def test_a_better_machine_is_never_slower(cost, place, name, factor):
    base = resolve_target(name)
    seconds = predict(cost, base, **place).seconds
    faster = {
        "bandwidth": base.bandwidth * factor,
        "peak_flops": {dtype: rate * factor for dtype, rate in base.peak_flops.items()},
        "launch_overhead": base.launch_overhead / factor,
    }
    # What is sane bounds a target's figures, not this property.
    bounds = {"bandwidth": 1e14, "launch_overhead": 1e-8, "peak_flops": 1e17}
    faster["bandwidth"] = min(faster["bandwidth"], bounds["bandwidth"])
    faster["launch_overhead"] = max(faster["launch_overhead"], bounds["launch_overhead"])
    faster["peak_flops"] = {d: min(r, bounds["peak_flops"]) for d, r in faster["peak_flops"].items()}
    for figure, value in faster.items():
        assert predict(cost, replace(base, **{figure: value}), **place).seconds <= seconds


@SLOWLY
@given(place=PLACES, name=st.sampled_from(["batch", "context", "tokens"]), more=st.integers(1, 10_000))
def test_more_work_is_never_cheaper(cost, place, name, more):
    less, grown = (cost.total.at(**{**place, name: place[name] + extra}) for extra in (0, more))
    slack = 1 - 1e-12  # sums of floats
    assert grown.total_flops >= less.total_flops * slack
    assert grown.bytes_read + grown.bytes_written >= (less.bytes_read + less.bytes_written) * slack
    assert grown.activation_bytes >= less.activation_bytes * slack


@SLOWLY
@given(place=PLACES)
def test_the_parts_add_up(cost, place):
    total = numbers(cost.total, place)
    by_op = [numbers(part, place) for part in cost.by_op.values()]
    by_node = [numbers(part, place) for part in cost.by_node.values()]
    assert [sum(column) for column in zip(*by_op, strict=True)] == pytest.approx(total)
    assert [sum(column) for column in zip(*by_node, strict=True)] == pytest.approx(total)
    step = predict(cost, resolve_target("h100"), **place)
    assert sum(step.by_op.values()) == pytest.approx(step.seconds)
    assert [step.flops, step.bytes_read, step.bytes_written, step.launches] == pytest.approx(total[:4])


def numbers(cost: Cost, place: dict[str, int]) -> list[float]:
    values = cost.at(**place)
    return [
        values.total_flops, values.bytes_read, values.bytes_written, values.launches, values.activation_bytes,
    ]  # fmt: skip


@SLOWLY
@given(place=PLACES, name=st.sampled_from(MACHINES))
def test_units_and_bounds(cost, place, name):
    """Bytes over bytes per second and operations over operations per second are seconds, and bounds."""
    target = resolve_target(name)
    step, values = predict(cost, target, **place), cost.total.at(**place)
    assert step.launch_seconds == pytest.approx(values.launches * target.launch_overhead)
    assert step.seconds >= (values.bytes_read + values.bytes_written) / target.bandwidth * (1 - 1e-12)
    assert step.seconds >= values.flops["bfloat16"] / target.peak_flops["bfloat16"] * (1 - 1e-12)
    assert step.seconds <= (step.memory_seconds + step.compute_seconds + step.launch_seconds) * (1 + 1e-12)


def test_a_dense_decode_step_takes_at_least_its_weights_over_the_bandwidth(captured):
    graph = captured(CONFIGS["llama"])
    table = 96 * 64 * 2  # the embedding is looked up, not read
    for name in MACHINES:
        target = resolve_target(name)
        step = predict(graph_cost(graph), target, phase="decode")
        assert step.seconds >= (weights_bytes(graph) - table) / target.bandwidth


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4096), st.floats(0.1, 4.0), st.floats(1.0, 8.0), st.sampled_from([0, 16, 1024]),
    st.integers(1, 64), st.integers(1, 10**6),
)  # fmt: skip
def test_more_bits_are_never_smaller(elements, size, factor, window, batch, capacity):
    few, many = (StoreSpec("s", elements, nbytes, window) for nbytes in (size, size * factor))
    assert cache_bytes([few], batch, capacity) <= cache_bytes([many], batch, capacity)
    assert cache_bytes([few], batch, capacity) <= cache_bytes([few], batch + 1, capacity)
    assert cache_bytes([few], batch, capacity) <= cache_bytes([few], batch, capacity + 1)
    assert few.bytes_per_token == elements * size
