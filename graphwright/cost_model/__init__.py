"""What programs cost: symbolic costs, machines as data, predictions of time and memory."""

from graphwright.cost_model.cost import B, C, Cost, T, Values
from graphwright.cost_model.estimate import estimate
from graphwright.cost_model.graph_cost import GraphCost, graph_cost, subgraph_cost
from graphwright.cost_model.memory import (
    Memory,
    StoreSpec,
    cache_bytes,
    cache_bytes_per_token,
    cache_expression,
    default_stores,
    plan_memory,
    weights_bytes,
    workspace_bytes,
)
from graphwright.cost_model.prediction import Prediction, predict, predict_prefill, roofline
from graphwright.cost_model.speculation import expected_tokens, predict_speculation, speculation_speedup
from graphwright.cost_model.target import Target, load_target, match_device, resolve_target, targets
from graphwright.cost_model.workload import Budget, Workload, parse_bytes

__all__ = [
    "B",
    "Budget",
    "C",
    "Cost",
    "GraphCost",
    "Memory",
    "Prediction",
    "StoreSpec",
    "T",
    "Target",
    "Values",
    "Workload",
    "cache_bytes",
    "cache_bytes_per_token",
    "cache_expression",
    "default_stores",
    "estimate",
    "expected_tokens",
    "graph_cost",
    "load_target",
    "match_device",
    "parse_bytes",
    "plan_memory",
    "predict",
    "predict_prefill",
    "predict_speculation",
    "resolve_target",
    "roofline",
    "speculation_speedup",
    "subgraph_cost",
    "targets",
    "weights_bytes",
    "workspace_bytes",
]
