"""Kernels of a program tuned on the GPU at hand, before anything is timed or recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from graphwright.cost_model.workload import Workload
from graphwright.kernels import triton
from graphwright.runtime.program import Program
from graphwright.runtime.shared_prefix import prefix_for

#: Seconds of a call.
Timer = Callable[[Callable[[], object]], float]


def tune_program(program: Program, workload: Workload, timer: Timer | None = None) -> dict[Any, Any]:
    """Find the fastest configurations of the attentions of a one-token step; once for each kind of them.

    Args:
        program: its caches are not touched.
        workload: gives batch and context.
        timer: seconds of a call; by default on the GPU.

    Returns:
        The configuration of each attention, by its sizes; empty where no Triton kernel runs.
    """
    if not program.lowered.states or not any(k.provider == triton.PROVIDER for k in program.lowered.kernels):
        return {}
    from graphwright.kernels.triton.tuning import tune_attention  # needs Triton

    limit = program.max_positions
    capacity = workload.capacity if limit is None else min(workload.capacity, limit)
    context = min(int(workload.mean_context), capacity - 1)
    shared = prefix_for(program.shared_prefix, workload.batch, context + 1)
    state = program.allocate(workload.batch, capacity, shared)
    state.pretend(context)
    tokens = torch.zeros((workload.batch, 1), dtype=torch.int64, device=program.device)
    counts = torch.ones(workload.batch, dtype=torch.int64, device=program.device)
    return tune_attention(lambda: program.step_eagerly(state, tokens, counts), timer=timer)
