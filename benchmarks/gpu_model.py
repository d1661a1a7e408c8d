"""A model of Llama-3.1-8B's shape with random weights: our program and transformers' static cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_device import Device, OutOfTime
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

import graphwright as gw
from graphwright.cost_model import graph_cost, predict
from graphwright.cost_model.target import resolve_target
from graphwright.optimizer.build import build
from graphwright.optimizer.driver import capture_step, make_request, store_samples
from graphwright.optimizer.planner import plan_given
from graphwright.optimizer.tuning import tune_program
from graphwright.passes.base import parse_pass
from graphwright.runtime.model import OptimizedModel
from graphwright.runtime.program import Program
from graphwright.runtime.storage import State

_K = 1024
_WARM, _STEPS, _RUNS = 4, 16, 5
#: New tokens that a cache has room for.
_ROOM = _WARM + _STEPS * _RUNS + 12

PASSES = ("place_cache{cut=kv}", "compile_layers")
PACKED = (*PASSES, "quantize_cache{codec=int,bits=4}")


@dataclass(frozen=True)
class Case:
    """One decode measurement; see the issue's targets."""

    name: str
    batch: int
    context: int
    passes: tuple[str, ...]


def cases(device: Device) -> list[Case]:
    """In the order of importance."""
    if device.toy:
        plain = [p for p in PASSES if p != "compile_layers"]
        packed = [p for p in PACKED if p != "compile_layers"]
        return [Case("1k", 1, 64, tuple(plain)), Case("128k, 4-bit cache", 1, 200, tuple(packed))]
    return [
        Case("1k", 1, _K, PASSES),
        Case("128k, 4-bit cache", 1, 128 * _K, PACKED),
        Case("batch 32 at 8k", 32, 8 * _K, PASSES),
    ]


def make_model(device: Device) -> Any:
    """Random weights, made on the device."""
    config = LlamaConfig(
        vocab_size=512 if device.toy else 128256,
        hidden_size=128 if device.toy else 4096,
        intermediate_size=256 if device.toy else 14336,
        num_hidden_layers=2 if device.toy else 32,
        num_attention_heads=2 if device.toy else 32,
        num_key_value_heads=1 if device.toy else 8,
        head_dim=64 if device.toy else 128,
        max_position_embeddings=2048 if device.toy else 256 * _K,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with device.device:
        return AutoModelForCausalLM.from_config(config, dtype=device.dtype).eval()


class Bench:
    """The model, and the programs that were made of it."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.model = make_model(device)
        self.target = resolve_target("h200" if device.toy else "auto")
        self._graph, _ = capture_step(self.model)
        self._graph.samples = store_samples(self.model, [], 0)
        self._built: dict[tuple[str, ...], Any] = {}

    def built(self, case: Case) -> Any:
        """The program of a case's passes, tuned for the case; built once."""
        workload = gw.Workload(batch=case.batch, prompt=case.context, generate=_ROOM)
        if case.passes not in self._built:
            request = make_request(self.model, self.target, workload, None, [])
            planned = plan_given(self._graph.copy(), [parse_pass(p) for p in case.passes], request)
            self._built[case.passes] = built = build(self.model, planned)
            for decision in built.fallbacks:
                self.device.note(decision.reason)
        found = self._built[case.passes]
        if not self.device.toy:
            self.device.attempt(f"tuning for {case.name}", partial(tune_program, found.program, workload))
        return found

    def weight_bytes(self) -> int:
        """What a step must read of the weights: all but the embedding, of which it looks up rows."""
        total = sum(p.numel() * p.element_size() for p in self.model.parameters())
        embedding = self.model.get_input_embeddings().weight
        return total - embedding.numel() * embedding.element_size()


def filled_state(device: Device, program: Program, batch: int, context: int) -> State:
    """A cache of ``context`` tokens a row with random content."""
    state = program.allocate(batch, context + _ROOM)
    state.pretend(context)
    for store in state.stores.values():
        if store.dtype.is_floating_point:
            store.normal_(std=0.1)
        elif store.dtype == torch.uint8:
            store.random_(0, 256)
    device.sync()
    return state


class Ours:
    """Greedy decoding by a program's steps, nothing read back."""

    def __init__(self, device: Device, program: Program, batch: int, context: int) -> None:
        self.program = program
        self.state = filled_state(device, program, batch, context)
        self.token = torch.ones((batch, 1), dtype=torch.int64, device=device.device)
        self.counts = torch.ones(batch, dtype=torch.int64, device=device.device)
        self._known = [1] * batch

    @torch.no_grad()
    def decode(self, steps: int) -> None:
        """So many tokens a row."""
        for _ in range(steps):
            logits = self.program.step(self.state, self.token, self.counts, logits="last")
            self.state.commit(self.counts, self._known)
            self.token = logits[:, -1].argmax(-1, keepdim=True)


class Stock:
    """The same by transformers: a static cache and torch.compile with CUDA graphs."""

    def __init__(self, device: Device, model: Any, batch: int, context: int) -> None:
        self.cache = StaticCache(config=model.config, max_cache_len=context + _ROOM)
        config = model.config
        sizes = (batch, config.num_key_value_heads, config.head_dim)
        self.cache.early_initialization(*sizes, dtype=device.dtype, device=device.device)
        for layer in self.cache.layers:
            layer.keys.normal_(std=0.1)
            layer.values.normal_(std=0.1)
            layer.cumulative_length.fill_(context)
        self.token = torch.ones((batch, 1), dtype=torch.int64, device=device.device)
        # Without a GPU only what dynamo captures is rehearsed: compiling takes too long.
        how: dict[str, Any] = {"backend": "eager"} if device.toy else {"mode": "reduce-overhead"}
        self._run = torch.compile(model.forward, fullgraph=True, dynamic=False, **how)

    @torch.no_grad()
    def decode(self, steps: int) -> None:
        """So many tokens a row."""
        for _ in range(steps):
            torch.compiler.cudagraph_mark_step_begin()
            logits = self._run(input_ids=self.token, past_key_values=self.cache, use_cache=True).logits
            self.token = logits[:, -1].argmax(-1, keepdim=True)


def step_seconds(device: Device, decode: Callable[[int], None]) -> float:
    """Median seconds of a step."""
    steps, runs = (2, 2) if device.toy else (_STEPS, _RUNS)
    decode(_WARM)
    return statistics.median(device.elapsed(partial(decode, steps)) for _ in range(runs)) / steps


# --- the sections ----------------------------------------------------------------------------------


def measure(
    device: Device, bench: Bench, copy: float, save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Tokens per second of every case, with the roofline, the prediction and the baseline."""
    found: dict[str, Any] = {"cases": []}
    try:
        for case in cases(device):
            device.need(45, case.name)
            row: dict[str, Any] = {"case": case.name, "batch": case.batch, "context": case.context}
            row["passes"] = list(case.passes)
            row |= device.attempt(case.name, partial(_ours, device, bench, case, copy)) or {}
            found["cases"].append(row)
            save(found)
        # Its compilation takes longest: when all of ours is known.
        for row in found["cases"]:
            device.need(60, f"transformers at {row['case']}")
            stock = device.attempt(
                f"transformers at {row['case']}",
                partial(_stock, device, bench.model, row["batch"], row["context"]),
            )
            row["stock_seconds"] = stock
            if stock and row.get("seconds"):
                row["stock_tokens_per_second"] = row["batch"] / stock
                row["ratio"] = stock / row["seconds"]
            save(found)
    except OutOfTime as late:
        device.note(f"model stopped: {late}")
    return found


def _ours(device: Device, bench: Bench, case: Case, copy: float) -> dict[str, Any]:
    built = bench.built(case)
    side = Ours(device, built.program, case.batch, case.context)
    seconds = step_seconds(device, side.decode)
    held = sum(store.nbytes for store in side.state.stores.values())
    cache = held * case.context / side.state.capacity
    roofline = copy / (bench.weight_bytes() + cache)
    predicted = predict(graph_cost(built.graph), bench.target, batch=case.batch, context=case.context)
    return {
        "seconds": seconds,
        "tokens_per_second": case.batch / seconds,
        "roofline_tokens_per_second": case.batch * roofline,
        "share_of_roofline": 1 / seconds / roofline,
        "predicted_seconds": predicted.seconds,
        "cache_bytes": cache,
        "graphs_off": built.program.graphs_off,
        "kernels": sorted({f"{k.op}: {k.provider}" for k in built.program.lowered.kernels}),
    }


def _stock(device: Device, model: Any, batch: int, context: int) -> float:
    torch.compiler.reset()
    side = Stock(device, model, batch, context)
    return step_seconds(device, side.decode)


def speculation(device: Device, bench: Bench, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """A verification of 8 tokens against a step of one; what the host and the graphs cost."""
    case = cases(device)[0]
    program = bench.built(case).program
    found: dict[str, Any] = {"context": case.context, "step_seconds": {}, "host_seconds": {}}
    state = filled_state(device, program, 1, case.context)
    for tokens in (1, 8):
        ids = torch.ones((1, tokens), dtype=torch.int64, device=device.device)
        counts = torch.full((1,), tokens, dtype=torch.int64, device=device.device)

        def steps(number: int, ids: torch.Tensor = ids, counts: torch.Tensor = counts) -> None:
            for _ in range(number):
                program.step(state, ids, counts)

        found["step_seconds"][tokens] = step_seconds(device, steps)
        number = 2 if device.toy else _STEPS
        found["host_seconds"][tokens] = device.host_seconds(partial(steps, number)) / number
        inside = device.attempt("the profiler", partial(_kernel_seconds, device, partial(steps, number)))
        if inside is not None:
            found.setdefault("kernel_seconds", {})[tokens] = inside / number
            gap = found["step_seconds"][tokens] - inside / number
            found.setdefault("gap_seconds", {})[tokens] = gap
    found["verify_8_over_decode_1"] = found["step_seconds"][8] / found["step_seconds"][1]
    save(found)
    found["generate"] = device.attempt("generate", partial(_generate, device, bench, program, case.context))
    return found


def _kernel_seconds(device: Device, body: Callable[[], None]) -> float:
    from torch.profiler import ProfilerActivity, profile

    kind = ProfilerActivity.CPU if device.toy else ProfilerActivity.CUDA
    with profile(activities=[kind]) as profiled:
        body()
        device.sync()
    name = "self_cpu_time_total" if device.toy else "self_device_time_total"
    return sum(float(getattr(event, name)) for event in profiled.key_averages()) / 1e6


def _generate(device: Device, bench: Bench, program: Program, context: int) -> dict[str, float]:
    """Seconds per token of ``generate`` on a text of random tokens, its prompt left out."""
    own = {"config": bench.model.config, "generation_config": bench.model.generation_config}
    fast = OptimizedModel(program, **own)
    ids = torch.randint(3, program.vocab_size, (1, context), device=device.device)
    short, long = (2, 6) if device.toy else (16, 144)

    def run(new: int) -> None:
        fast.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)

    run(long)
    times = [[device.elapsed(partial(run, new)) for _ in range(3)] for new in (short, long)]
    low, high = (statistics.median(own_times) for own_times in times)
    return {"seconds_per_token": (high - low) / (long - short)}
