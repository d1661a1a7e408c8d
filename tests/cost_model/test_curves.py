"""The data behind the report's expressions and plots."""

from __future__ import annotations

import json

import pytest
import sympy

from graphwright.cost_model import (
    Workload,
    describe_cost,
    graph_cost,
    memory_curve,
    plan_memory,
    predict,
    resolve_target,
    roofline_curve,
)
from graphwright.cost_model.cost import B, C, T
from graphwright.ir.canonicalize import canonicalize
from graphwright.ir.errors import InputError
from tests.architectures import WINDOW, tiny_config

H100, CONFIG = resolve_target("h100"), tiny_config("mistral")
POINT = {"batch": 3, "context": 100.0, "tokens": 5}


@pytest.fixture
def graph(captured):
    found = captured(CONFIG).copy()
    canonicalize(found)
    return found


@pytest.mark.parametrize("phase", ["decode", "verify", "prefill"])
def test_expressions_give_their_value(graph, phase):
    found = describe_cost(graph_cost(graph), H100, phase, batch=3, context=100, tokens=5)
    assert json.loads(json.dumps(found)) == found
    assert found["at"] == POINT | ({"tokens": 1} if phase == "decode" else {})
    names = {"B": B, "C": C, "T": T}

    def number(text: str) -> float:
        return float(sympy.sympify(text, locals=names).subs({B: 3, C: 100, T: found["at"]["tokens"]}))

    expression, value = found["expression"], found["value"]
    assert set(expression["read"]) == {"weights", "cache"}
    assert set(expression["written"]) == {"cache"}
    assert sum(map(number, expression["flops"].values())) == pytest.approx(value["flops"])
    assert sum(map(number, expression["read"].values())) == pytest.approx(value["bytes_read"])
    assert sum(map(number, expression["written"].values())) == pytest.approx(value["bytes_written"])
    assert number(expression["launches"]) == value["launches"]
    step = predict(graph_cost(graph), H100, **found["at"], phase=phase)
    assert value["seconds"] == step.seconds
    assert ("T" in expression["flops"]["bfloat16"]) is (phase != "decode")


def test_an_unknown_phase_is_refused(graph):
    with pytest.raises(InputError, match="warmup"):
        describe_cost(graph_cost(graph), H100, "warmup", batch=1, context=0, tokens=1)


def test_no_op_lies_above_the_roofline(graph):
    cost = graph_cost(graph)
    for batch in (1, 64):
        curve = roofline_curve(cost, H100, batch=batch, context=200)
        assert json.loads(json.dumps(curve)) == curve
        assert curve["flops_per_second"] == H100.peak_flops["bfloat16"]
        assert curve["bytes_per_second"] == H100.bandwidth
        assert {op["op"] for op in curve["ops"]} >= {
            "linear",
            "gated_mlp",
            "attention",
            "lm_head",
            "rms_norm",
        }
        assert "embedding" not in {op["op"] for op in curve["ops"]}  # no arithmetic
        for op in curve["ops"]:
            roof = min(curve["flops_per_second"], op["intensity"] * curve["bytes_per_second"])
            assert 0 < op["flops_per_second"] <= roof * (1 + 1e-9)
            assert op["flops_per_second"] == pytest.approx(op["intensity"] * op["bytes_per_second"])
        seconds = predict(cost, H100, batch=batch, context=200).by_op
        assert {op["op"]: op["seconds"] for op in curve["ops"]}.items() <= seconds.items()


def test_a_larger_batch_moves_weights_to_the_right(graph):
    cost = graph_cost(graph)
    one, many = (
        {op["op"]: op["intensity"] for op in roofline_curve(cost, H100, batch=b, context=200)["ops"]}
        for b in (1, 64)
    )
    assert many["gated_mlp"] == pytest.approx(64 * one["gated_mlp"])
    # Each sequence reads a cache of its own.
    assert many["attention"] == pytest.approx(one["attention"])


def test_memory_grows_with_the_context_until_windows_are_full(graph):
    workload = Workload(batch=2, prompt=60, generate=40)
    curve = memory_curve(graph, H100, workload, limit_bytes=10**9, max_positions=256)
    assert json.loads(json.dumps(curve)) == curve
    assert curve["limit_bytes"] == 10**9
    contexts = [point["context"] for point in curve["points"]]
    assert contexts == sorted(set(contexts))
    assert {1, WINDOW + 64, 100, 256} <= set(contexts)  # its own length, and where the window's store is full
    for point in curve["points"]:
        plan = plan_memory(graph, batch=2, capacity=point["context"], limit=10**9, step_tokens=60)
        assert point == {
            "context": point["context"],
            "weights_bytes": plan.weights_bytes,
            "cache_bytes": plan.cache_bytes,
            "workspace_bytes": plan.workspace_bytes,
        }
    cache = [point["cache_bytes"] for point in curve["points"]]
    assert cache == sorted(cache)
    assert cache[-1] == cache[contexts.index(WINDOW + 64)]  # every layer has a window


def test_without_positions_the_curve_goes_beyond_the_workload(graph):
    curve = memory_curve(graph, H100, Workload(prompt=60, generate=40), limit_bytes=1)
    assert curve["points"][-1]["context"] == 400
