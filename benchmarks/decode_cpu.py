"""Decode speed on this CPU: graphwright beside stock transformers, in one process.

Batch 1, bfloat16, speculation off. Both sides fill their cache with the same prompt once; then short
runs of greedy decode steps alternate between them, each from the same context (the caches are cut back
after every run), so that a slow moment of the machine hits both. The figures are medians over runs;
the ratio is the median of the ratios of neighbouring runs. Prefill is not in them.

The roofline is the time that reading the weights and the cache once takes at the read bandwidth
measured here.

With ``--processes``, two more things are measured in fresh processes: the peak resident memory of
either side, and how long ``optimize()`` takes with empty and with filled caches.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from common import load_model, load_prose, machine
from transformers import DynamicCache

import graphwright as gw

WARM_UP_STEPS = 4
BANDWIDTH_BYTES = 1 << 29


@dataclass(frozen=True)
class Result:
    """One context. Speeds in tokens per second."""

    context: int
    stock: float
    graphwright: float
    ratio: float
    roofline: float
    fraction_of_roofline: float
    same_tokens: bool


class StockSide:
    """Stock transformers with a ``DynamicCache``, one token a call."""

    def __init__(self, model: Any, prompt: torch.Tensor) -> None:
        self.model, self.context = model, prompt.shape[1]
        self.cache = DynamicCache(config=model.config)
        output = model(prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.first = output.logits[:, -1].argmax(-1, keepdim=True)

    def decode(self, steps: int) -> list[int]:
        """Greedy tokens after the prompt; the cache ends as it began."""
        token, tokens = self.first, []
        for _ in range(steps):
            output = self.model(token, past_key_values=self.cache, use_cache=True)
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(int(token))
        self.cache.crop(-steps)
        return tokens


class GraphwrightSide:
    """The optimized program, one token a step."""

    def __init__(self, fast: Any, prompt: torch.Tensor, capacity: int) -> None:
        self.program = fast.program
        self.state = self.program.allocate(1, capacity)
        self.one = torch.ones(1, dtype=torch.int64)
        self.lengths = torch.tensor([prompt.shape[1]])
        logits = self.program.prefill(self.state, prompt, self.lengths)
        self.first = logits.argmax(-1, keepdim=True)

    def decode(self, steps: int) -> list[int]:
        """Greedy tokens after the prompt; the cache ends as it began."""
        token, tokens = self.first, []
        for _ in range(steps):
            logits = self.program.step(self.state, token, self.one, logits="last")
            self.state.commit(self.one)
            token = logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(int(token))
        self.state.truncate(self.lengths)
        return tokens


def optimize(model: Any, options: argparse.Namespace) -> Any:
    """The program under test: no speculation."""
    workload = gw.Workload(batch=1, prompt=max(options.contexts), generate=options.steps)
    return gw.optimize(model, target="cpu", workload=workload, passes=options.passes)


def read_bandwidth() -> float:
    """Bytes per second that this process reads from memory: the best of several passes of two kinds."""
    data = torch.ones(BANDWIDTH_BYTES // 4)
    reads: tuple[Callable[[], Any], ...] = (data.sum, lambda: torch.dot(data, data), data.amax)
    best = min(_seconds(read) for _ in range(5) for read in reads)
    return BANDWIDTH_BYTES / best


def _seconds(body: Callable[[], Any]) -> float:
    started = time.perf_counter()
    body()
    return time.perf_counter() - started


def bytes_per_token(model: Any, context: int) -> int:
    """What one decode step must read: each weight once, and keys and values of the context."""
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if head is not embedding:  # a step looks up one row of an embedding that is not the head as well
        weights -= embedding.numel() * embedding.element_size()
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * width * embedding.element_size()
    return weights + context * per_token


@torch.inference_mode()
def measure(model: Any, fast: Any, prompt: torch.Tensor, bandwidth: float, steps: int, runs: int) -> Result:
    """Alternate short decode runs of both sides from one context."""
    context = prompt.shape[1]
    sides = (StockSide(model, prompt), GraphwrightSide(fast, prompt, context + steps + 1))
    tokens = [side.decode(max(WARM_UP_STEPS, steps)) for side in sides]
    times: list[list[float]] = [[], []]
    for run in range(runs):
        order = (0, 1) if run % 2 == 0 else (1, 0)  # neither side always follows the other
        for index in order:
            side = sides[index]
            times[index].append(_seconds(lambda side=side: side.decode(steps)))  # type: ignore[misc]
    stock, ours = (steps / statistics.median(side_times) for side_times in times)
    ratio = statistics.median(slow / quick for slow, quick in zip(*times, strict=True))
    roofline = bandwidth / bytes_per_token(model, context)
    return Result(context, stock, ours, ratio, roofline, ours / roofline, tokens[0] == tokens[1])


def run_side(options: argparse.Namespace) -> dict[str, Any]:
    """One side alone, for its peak memory; ``optimize`` stops after optimizing."""
    model = load_model(options.model, options.gguf)
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found: dict[str, Any] = {"loaded_bytes": loaded}
    with torch.inference_mode():
        if options.side == "stock":
            prompt = load_prose(options.model, options.gguf, max(options.contexts))
            StockSide(model, prompt).decode(options.steps)
        else:
            started = time.perf_counter()
            fast = optimize(model, options)
            found["seconds"] = time.perf_counter() - started
            found["steps"] = fast.report.measured.get("seconds", {})
            if options.side == "graphwright":
                prompt = load_prose(options.model, options.gguf, max(options.contexts))
                GraphwrightSide(fast, prompt, prompt.shape[1] + options.steps + 1).decode(options.steps)
    found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found


def in_process(side: str, caches: str | None = None) -> dict[str, Any]:
    """:func:`run_side` in a fresh process, with its caches under ``caches`` if given."""
    environment = dict(os.environ)
    if caches is not None:
        environment["GRAPHWRIGHT_CACHE_DIR"] = os.path.join(caches, "graphwright")
        environment["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(caches, "inductor")
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise SystemExit(f"the {side} process failed:\n{finished.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return found


def measure_processes() -> dict[str, Any]:
    """Peak memory of both sides; seconds of ``optimize()`` cold and warm."""
    with tempfile.TemporaryDirectory() as caches:
        print("optimize() with empty caches ...", flush=True)
        cold = in_process("optimize", caches)
        print("optimize() with filled caches ...", flush=True)
        warm = in_process("optimize", caches)
    print("peak memory of either side ...", flush=True)
    return {
        "cold": cold,
        "warm": warm,
        "stock": in_process("stock"),
        "graphwright": in_process("graphwright"),
    }


def show(results: list[Result], bandwidth: float) -> None:
    """The figures as a table."""
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s; tokens per second:")
    print(
        f"{'context':>8} {'stock':>8} {'graphwright':>12} {'ratio':>7} {'roofline':>9} {'reached':>8}  tokens"
    )
    for r in results:
        same = "identical" if r.same_tokens else "differ"
        print(
            f"{r.context:8,} {r.stock:8.1f} {r.graphwright:12.1f} {r.ratio:6.2f}x {r.roofline:9.0f} "
            f"{r.fraction_of_roofline:8.0%}  {same}"
        )


def show_processes(found: dict[str, Any]) -> None:
    """Memory and optimize() times as lines."""
    for side in ("stock", "graphwright"):
        peak, loaded = (found[side][key] / 2**20 for key in ("peak_bytes", "loaded_bytes"))
        print(f"{side}: peak resident memory {peak:,.0f} MiB ({loaded:,.0f} MiB of it reached while loading)")
    for state in ("cold", "warm"):
        steps = ", ".join(f"{name} {value:.1f}" for name, value in found[state]["steps"].items())
        print(f"optimize(), {state}: {found[state]['seconds']:.1f} s ({steps})")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--gguf", help="GGUF file in the folder")
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 2000, 6000])
    parser.add_argument("--steps", type=int, default=16, help="decode steps of one run")
    parser.add_argument("--runs", type=int, default=15, help="runs of each side at each context")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--pass", dest="passes", action="append", help="passes to apply (default: place_cache)"
    )
    parser.add_argument("--quick", action="store_true", help="few runs: a look, not a measurement")
    parser.add_argument("--processes", action="store_true", help="also peak memory and optimize() seconds")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--side", choices=("stock", "graphwright", "optimize"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.passes = options.passes or ["place_cache", "compile_layers"]
    if options.quick:
        options.runs, options.steps = 3, 8
    return options


def main() -> None:
    """Measure and print."""
    options = parse()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if options.side:
        print(json.dumps(run_side(options)))
        return
    bandwidth = read_bandwidth()
    print("loading and optimizing ...", flush=True)
    model = load_model(options.model, options.gguf)
    fast = optimize(model, options)
    prompt = load_prose(options.model, options.gguf, max(options.contexts))
    results = []
    for context in options.contexts:
        print(f"context {context:,} ...", flush=True)
        results.append(measure(model, fast, prompt[:, :context], bandwidth, options.steps, options.runs))
    show(results, bandwidth)
    record: dict[str, Any] = {
        "schema": "graphwright.benchmark.decode_cpu/1",
        "machine": machine(),
        "settings": {
            "passes": options.passes,
            "steps": options.steps,
            "runs": options.runs,
            "dtype": "bfloat16",
        },
        "read_bandwidth_bytes_per_second": bandwidth,
        "decode": [asdict(result) for result in results],
    }
    if options.processes:
        record["processes"] = measure_processes()
        show_processes(record["processes"])
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
