"""The predicted part of a report: time and memory of one program on one target for one workload."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphwright.cost_model.graph_cost import GraphCost, graph_cost
from graphwright.cost_model.memory import Memory, plan_memory
from graphwright.cost_model.prediction import Prediction, predict, predict_prefill
from graphwright.cost_model.prefix_costs import shared_tokens
from graphwright.cost_model.stores import StoreSpec
from graphwright.cost_model.target import Target
from graphwright.cost_model.workload import Budget, Workload
from graphwright.ir.graph import Graph

# A step this long keeps a GPU's matrix units busy, and a CPU's activations in its cache.
_CHUNK = {"cpu": 512, "cuda": 2048, "rocm": 2048}


def estimate(
    graph: Graph,
    target: Target,
    workload: Workload,
    *,
    stores: Sequence[StoreSpec] | None = None,
    budget: Budget | None = None,
    cost: GraphCost | None = None,
    prefill_chunk: int | None = None,
    max_positions: int | None = None,
) -> dict[str, Any]:
    """Predict a program, as ``Report.predicted`` holds it.

    Args:
        graph: captured or rewritten.
        target: the machine.
        workload: what runs; decode is priced at its mean context.
        stores: what the cache keeps; the keys and values of each attention by default.
        budget: its ``memory`` tightens the limit on memory.
        cost: the graph's cost, if it is known already.
        prefill_chunk: tokens per sequence of a prefill step; by default what the plan says (the annotation of
            that name), else 512 on CPUs and 2,048 on GPUs.
        max_positions: the model's positions, which bound the largest context.

    Returns:
        ``decode``, ``prefill`` and ``memory``, each a dictionary with the unit in the key.
    """
    cost = cost or graph_cost(graph)
    planned = graph.annotations.get("prefill_chunk", _CHUNK[target.kind])
    chunk = min(workload.prompt, prefill_chunk or planned)
    limit = target.memory_bytes
    if budget is not None and budget.memory_bytes is not None:
        limit = min(limit, budget.memory_bytes)
    memory = plan_memory(
        graph, batch=workload.batch, capacity=workload.capacity, limit=limit, step_tokens=chunk,
        stores=stores, max_positions=max_positions,
    )  # fmt: skip
    decode = predict(cost, target, batch=workload.batch, context=workload.mean_context, phase="decode")
    prefill = _prefill(graph, cost, target, workload, chunk)
    return {
        "decode": describe_decode(decode, workload.batch),
        "prefill": describe_prefill(prefill, workload),
        "memory": describe_memory(memory),
    }


def _prefill(graph: Graph, cost: GraphCost, target: Target, workload: Workload, chunk: int) -> Prediction:
    """The prompts; what all of them share runs once, for one sequence."""
    batch, prompt, shared = workload.batch, workload.prompt, shared_tokens(graph)
    if batch == 1 or not 0 < shared < prompt:
        return predict_prefill(cost, target, batch=batch, prompt=prompt, chunk=chunk)
    first = predict_prefill(cost, target, batch=1, prompt=shared, chunk=chunk)
    return first + predict_prefill(
        cost, target, batch=batch, prompt=prompt - shared, chunk=chunk, context=shared
    )


def describe_decode(step: Prediction, batch: int) -> dict[str, Any]:
    """One decode step; ``tokens_per_second`` is of all sequences together, the rest is per step."""
    return {
        "seconds_per_token": step.seconds,
        "tokens_per_second": batch / step.seconds,
        **_work(step),
        "seconds_by_op": dict(step.by_op),
    }


def describe_prefill(prefill: Prediction, workload: Workload) -> dict[str, Any]:
    """The prompt of every sequence."""
    rate = workload.batch * workload.prompt / prefill.seconds
    return {"seconds": prefill.seconds, "tokens_per_second": rate, **_work(prefill)}


def describe_memory(memory: Memory) -> dict[str, Any]:
    """Bytes by kind, and how far the workload could grow."""
    return {
        "weights_bytes": memory.weights_bytes,
        "cache_bytes": memory.cache_bytes,
        "workspace_bytes": memory.workspace_bytes,
        "total_bytes": memory.total_bytes,
        "limit_bytes": memory.limit_bytes,
        "fits": memory.fits,
        "largest_batch": memory.largest_batch,
        "largest_context": memory.largest_context,
    }


def _work(prediction: Prediction) -> dict[str, Any]:
    return {
        "bytes_read": prediction.bytes_read,
        "flops": prediction.flops,
        "launches": prediction.launches,
        "bound": prediction.bound,
        "compute_seconds": prediction.compute_seconds,
        "memory_seconds": prediction.memory_seconds,
        "launch_seconds": prediction.launch_seconds,
    }
