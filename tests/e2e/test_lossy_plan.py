"""A budget that allows a loss: the planner packs the cache where nothing else fits, and measures it."""

from __future__ import annotations

import pytest

import graphwright as gw
from graphwright.optimizer.report import Status
from tests.architectures import tiny_model

WORKLOAD = gw.Workload(batch=4, prompt=1000, generate=50)


@pytest.fixture(scope="module")
def exact() -> gw.OptimizedModel:
    return gw.optimize(tiny_model("llama", max_position_embeddings=2048), workload=WORKLOAD)


def test_a_memory_limit_is_met_by_packing(exact: gw.OptimizedModel) -> None:
    memory = exact.report.predicted["memory"]
    limit = memory["total_bytes"] - memory["cache_bytes"] // 4
    fast = gw.optimize(exact.stock, workload=WORKLOAD, budget=gw.Budget(kl=0.5, memory=limit))
    packing = [p for p in fast.plan.passes if p.startswith("quantize_cache")]
    assert packing
    assert 0 < fast.plan.kl <= 0.5
    assert fast.report.predicted["memory"]["total_bytes"] <= limit
    assert 0 < fast.report.measured["quality"]["mean_kl"] <= 0.5
    applied = [d for d in fast.report.decisions if d.pass_name in packing and d.status == Status.APPLIED]
    assert applied
    assert {d.fidelity for d in applied} == {"lossy"}
    assert all("bits by" in d.reason for d in applied)
    capacity = WORKLOAD.prompt + WORKLOAD.generate
    states = [p.allocate(4, capacity).nbytes() for p in (fast.program, exact.program)]
    assert states[0] < states[1]
    assert states[0] == fast.report.predicted["memory"]["cache_bytes"]


def test_the_same_limit_without_a_loss_is_refused(exact: gw.OptimizedModel) -> None:
    memory = exact.report.predicted["memory"]
    # Shorter prompt steps would make room for the whole workspace.
    limit = memory["total_bytes"] - memory["workspace_bytes"] - memory["cache_bytes"] // 4
    with pytest.raises(gw.GraphwrightError, match="memory"):
        gw.optimize(exact.stock, workload=WORKLOAD, budget=gw.Budget(memory=limit))


def test_memory_by_kind_is_what_the_buffers_hold(exact: gw.OptimizedModel) -> None:
    fast = gw.optimize(exact.stock, passes=["place_cache{cut=kv}", "quantize_cache{bits=2,page=16}"])
    state = fast.program.allocate(2, 200)
    memory = fast.memory()
    parts = [memory[f"cache.{part}"] for part in ("stores", "pages", "tail", "first")]
    assert sum(parts) == memory["cache"] == sum(t.untyped_storage().nbytes() for t in state.stores.values())
    assert memory["total"] == sum(memory[kind] for kind in ("weights", "tables", "prepared", "cache"))
    assert memory["weights"] == exact.memory()["weights"]
    assert memory["tables"] > 0
