"""Calibration: what this machine's programs are made of, timed once and kept."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from graphwright.cost_model.calibrate import Kernels, cached_measured, measure
from graphwright.cost_model.graph_cost import graph_cost
from graphwright.cost_model.target import Target, resolve_target
from graphwright.cost_model.workload import Workload
from graphwright.ir.canonicalize import canonicalize
from graphwright.ir.graph import Graph
from graphwright.kernels.registry import select
from graphwright.optimizer.capture import capture
from graphwright.passes.place_cache import PlaceCache
from graphwright.runtime.lowering import LoweringOptions, lower
from graphwright.runtime.program import Program

Progress = Callable[[str, float], None]


def calibrate_machine(
    progress: Progress | None = None, *, refresh: bool = True, seconds: float = 6.0
) -> Target:
    """Measure the machine at hand with the kernels that its programs run.

    Args:
        progress: called with what is being measured and the fraction done.
        refresh: measure again although figures exist.
        seconds: about how long to measure for.

    Returns:
        The machine as a target; the figures are kept for the next process.

    Raises:
        InputError: ``seconds`` is not above zero.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    measure(program_kernels(device), device, progress, seconds, refresh=refresh)
    return resolve_target("auto")


def machine_target(target: str | Target, progress: Progress | None = None) -> Target:
    """The target of a name; where it is the CPU at hand, measured if it never was.

    Raises:
        UnknownTargetError: no such target.
    """
    found = resolve_target(target)
    if isinstance(target, Target) or found.kind != "cpu":
        return found
    known = cached_measured()
    if known is not None and known.curves:
        return found
    device = torch.device("cpu")
    measure(program_kernels(device), device, progress)
    return resolve_target(target)


def program_kernels(device: torch.device) -> Kernels:
    """The kernels that programs on a device run, as calibration calls them."""
    chosen: dict[Any, Any] = {}

    def linear(x: torch.Tensor, weight: torch.Tensor) -> Any:
        key = ("linear", x.dtype)
        if key not in chosen:
            chosen[key] = select("linear", device, x=x, weight=weight, bias=None)
        return chosen[key](x, weight, None)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor) -> Any:
        keys, values, positions, lengths, counts = rest
        given = {
            "q": q, "k": k, "v": v, "keys": keys, "values": values, "positions": positions,
            "lengths": lengths, "counts": counts, "tree": positions[:, :0], "scale": q.shape[-1] ** -0.5,
        }  # fmt: skip
        key = ("attention", q.dtype)
        if key not in chosen:
            chosen[key] = select("append_attention", device, **given)
        return chosen[key](**given)

    return Kernels(linear, attention, lambda: launch_seconds(device))


def launch_seconds(device: torch.device, layers: int = 6, runs: int = 40) -> float:
    """Seconds that one launch adds to a program's step.

    Measured inside a program, a small decoder run op by op: the time of its step without that of its
    kernels, over the launches that the cost model counts in it. Between two launches of a program its
    weights pass through the caches, which makes them several times as slow as in a loop of their own.
    """
    graph = _small_decoder(device, layers)
    step = lower(graph, device, LoweringOptions(compile=False))
    program = Program(step, config=None, device=device, dtype=_DTYPE, vocab_size=_VOCAB, max_positions=64)
    state = program.allocate(1, 32)
    state.pretend(8)
    tokens = torch.zeros((1, 1), dtype=torch.int64, device=device)
    counts = torch.ones(1, dtype=torch.int64, device=device)
    launches = graph_cost(graph).cost("decode").at(batch=1, context=8).launches
    calls = _kernel_calls(graph, device)
    whole, kernels = [], []
    for _ in range(runs):
        whole.append(_seconds(lambda: program.step(state, tokens, counts), device))
        kernels.append(_seconds(calls, device))
    return (
        max(statistics.median(whole) - statistics.median(kernels), 0.05 * statistics.median(whole)) / launches
    )


_DTYPE, _VOCAB, _HIDDEN = torch.bfloat16, 64, 512


def _small_decoder(device: torch.device, layers: int) -> Graph:
    config = LlamaConfig(
        hidden_size=_HIDDEN, intermediate_size=3 * _HIDDEN, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=_VOCAB, max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # initial weights draw from the caller's generator
        model = LlamaForCausalLM(config).to(device, _DTYPE).eval()
    graph = capture(model)
    canonicalize(graph)
    graph.annotations["compile"] = False
    PlaceCache(cut="kv")(graph, Workload(), resolve_target("cpu"), force=True)
    return graph


def _kernel_calls(graph: Graph, device: torch.device) -> Callable[[], None]:
    """The program's linears in their order, and nothing else."""
    linear = program_kernels(device).linear
    weights = [w for w in graph.parameters.values() if w.dim() == 2 and w.shape[0] != _VOCAB]
    inputs = {w.shape[1]: torch.ones(1, 1, w.shape[1], dtype=_DTYPE, device=device) for w in weights}

    def run() -> None:
        for weight in weights:
            linear(inputs[weight.shape[1]], weight)

    return run


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
