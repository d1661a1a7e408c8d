"""Decode with selected pages on this CPU, beside the same program that reads everything.

Two tables. Attention alone: one step's attention of all layers over caches of their own, dense and with
selection (scoring, choosing and reading are all in the time), in turn in one process.
Whole steps: two
programs of one model, greedy decode from the same context in turn, with the gain that the cost model predicts
beside the measured one. The figures are medians; ratios are medians of neighbouring runs.

    python benchmarks/sparse_speed.py --model .cache/models/smollm2-135m-instruct \\
        --gguf SmolLM2-135M-Instruct.Q4_1.gguf --json benchmarks/results/sparse_speed.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import load_model, load_prose, machine
from decode_cpu import GraphwrightSide, read_bandwidth

import graphwright as gw
from graphwright.kernels.cpp import build

LAYERS, HEADS, GROUPS, DIM = 30, 9, 3, 64
KV = "place_cache{cut=kv}"


@dataclass(frozen=True)
class AttentionRow:
    """One step's attention of all layers. Times in milliseconds."""

    context: int
    selector: str
    page: int
    keep: float
    dense: float
    sparse: float
    selecting: float
    ratio: float
    dense_bytes: int
    sparse_bytes: int


@dataclass(frozen=True)
class StepRow:
    """Whole steps of two programs. Speeds in tokens per second.

    Attributes:
        attention_share: of the dense step, by the first table's time.
    """

    context: int
    passes: list[str]
    dense: float
    sparse: float
    gain: float
    predicted_gain: float
    attention_share: float
    same_tokens: float


class StepAttention:
    """The attention of one decode step, with a cache and a summary of its own for each layer."""

    def __init__(self, context: int, selector: str, page: int, keep: float, dtype: torch.dtype) -> None:
        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape).to(dtype)

        pages = -(-(context + 1) // page)
        size = {"bounds": (GROUPS, 2, DIM), "mean": (GROUPS, DIM)}[selector]
        self.stores = [
            (random(1, GROUPS, context + 1, DIM), random(1, GROUPS, context + 1, DIM)) for _ in range(LAYERS)
        ]
        self.summaries = [random(1, pages, *size) for _ in range(LAYERS)]
        self.q = random(1, 1, HEADS, DIM).transpose(1, 2)
        self.positions, self.lengths = torch.tensor([[context]]), torch.tensor([context])
        self.counts, self.dense = torch.tensor([1]), torch.tensor([0])
        self.tree = torch.zeros(1, 0, dtype=torch.int64)
        self.selector, self.page, self.keep = selector, page, keep

    def read_all(self) -> None:
        """Every layer densely."""
        ops = torch.ops.graphwright_cpp
        for keys, values in self.stores:
            step = (self.positions, self.lengths, self.counts, self.tree)
            ops.cache_attention.default(self.q, keys, values, *step, DIM**-0.5)

    def select(self) -> list[Any]:
        """The lists of every layer."""
        return [self._lists(summary) for summary in self.summaries]

    def _lists(self, summary: torch.Tensor) -> Any:
        ops = torch.ops.graphwright_cpp
        step = (self.positions, self.lengths, self.counts, self.dense)
        paging = (self.page, 0, 32, 0)
        scores = ops.score_pages.default(
            self.q, [summary], [], *step, self.selector, GROUPS, *paging, DIM**-0.5
        )
        return ops.choose_pages.default(scores, *step, *paging, 1, self.keep, 0.0)

    def read_few(self) -> None:
        """Every layer by its lists."""
        ops = torch.ops.graphwright_cpp
        step = (self.positions, self.lengths, self.counts, self.tree)
        for (keys, values), summary in zip(self.stores, self.summaries, strict=True):
            pages, chosen = self._lists(summary)
            options = (DIM**-0.5, 0, 0.0, None, pages, chosen, self.page, 0)
            ops.cache_attention.default(self.q, keys, values, *step, *options)

    def bytes_read(self) -> tuple[int, int]:
        """Dense, and by the lists with the summaries of all whole pages."""
        token = 2 * GROUPS * DIM * self.q.element_size()
        context = self.stores[0][0].shape[2]
        few = 0
        for (_, chosen), summary in zip(self.select(), self.summaries, strict=True):
            few += int(chosen.sum()) * self.page * token // GROUPS + summary.nbytes
        return LAYERS * context * token, few


def in_turn(runs: int, *bodies: Callable[[], object]) -> list[list[float]]:
    """Milliseconds of functions that run one after the other, again and again."""
    for body in bodies:
        body(), body()
    times: list[list[float]] = [[] for _ in bodies]
    for run in range(runs):
        order = list(range(len(bodies)))
        for index in order if run % 2 == 0 else reversed(order):
            started = time.perf_counter()
            bodies[index]()
            times[index].append((time.perf_counter() - started) * 1e3)
    return times


def attention(context: int, selector: str, page: int, keep: float, runs: int) -> AttentionRow:
    """Dense and selected attention of a step, in turn."""
    step = StepAttention(context, selector, page, keep, torch.bfloat16)
    dense, sparse, selecting = in_turn(runs, step.read_all, step.read_few, step.select)
    ratio = statistics.median(slow / quick for slow, quick in zip(dense, sparse, strict=True))
    every, few = step.bytes_read()
    return AttentionRow(
        context,
        selector,
        page,
        keep,
        statistics.median(dense),
        statistics.median(sparse),
        statistics.median(selecting),
        ratio,
        every,
        few,
    )


@torch.inference_mode()
def steps(
    model: Any, prompt: torch.Tensor, passes: list[str], tokens: int, runs: int, attention_ms: float
) -> StepRow:
    """Greedy decode of a dense and a sparse program, in turn, from one context."""
    context = prompt.shape[1]
    workload = gw.Workload(batch=1, prompt=context, generate=2 * tokens)
    programs = [
        gw.optimize(model, target="cpu", workload=workload, passes=[*chosen, "compile_layers"])
        for chosen in ([KV], [KV, *passes])
    ]
    sides = [GraphwrightSide(fast, prompt, context + tokens + 1) for fast in programs]
    made = [side.decode(tokens) for side in sides]
    dense, sparse = in_turn(runs, *(lambda side=side: side.decode(tokens) for side in sides))  # type: ignore[misc]
    gain = statistics.median(slow / quick for slow, quick in zip(dense, sparse, strict=True))
    predicted = [fast.report.predicted["decode"]["seconds_per_token"] for fast in programs]
    per_token = statistics.median(dense) / tokens
    return StepRow(
        context,
        passes,
        1e3 / per_token,
        1e3 * tokens / statistics.median(sparse),
        gain,
        predicted[0] / predicted[1],
        attention_ms / per_token,
        statistics.fmean(a == b for a, b in zip(*made, strict=True)),
    )


def show(rows: list[AttentionRow], whole: list[StepRow], bandwidth: float) -> None:
    """Both tables as text."""
    print(f"attention of {LAYERS} layers, one token, bfloat16; reading memory: {bandwidth / 1e9:.1f} GB/s")
    print("context selector page keep   dense ms  sparse ms  selecting  ratio  bytes   dense GB/s")
    for r in rows:
        print(
            f"{r.context:7d} {r.selector:8s} {r.page:4d} 1/{1 / r.keep:<3.0f} {r.dense:9.2f} "
            f"{r.sparse:10.2f} "
            f"{r.selecting:10.2f} {r.ratio:6.2f} {r.dense_bytes / r.sparse_bytes:6.2f} "
            f"{r.dense_bytes / r.dense / 1e6:8.1f}"
        )
    print(
        "whole steps: tokens/s dense, sparse; gain measured and predicted; attention's share of a dense step"
    )
    for w in whole:
        print(
            f"{w.context:7d} {w.dense:7.1f} {w.sparse:7.1f}  {w.gain:5.2f} {w.predicted_gain:5.2f} "
            f"{w.attention_share:6.0%}  {', '.join(w.passes)}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", required=True)
    parser.add_argument("--gguf")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2000, 6000])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--attention-only", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    build.available()
    bandwidth = read_bandwidth()
    settings = [("bounds", 16, 0.125), ("mean", 16, 0.125), ("bounds", 64, 0.125), ("bounds", 16, 0.0625)]
    rows = [attention(c, *setting, options.runs) for c in options.contexts for setting in settings]
    whole: list[StepRow] = []
    if not options.attention_only:
        model = load_model(options.model, options.gguf)
        for context in options.contexts:
            prompt = load_prose(options.model, options.gguf, context)
            dense = next(r.dense for r in rows if r.context == context)
            passes = ["sparsify_attention{selector=mean,keep=0.125}"]
            whole.append(steps(model, prompt, passes, options.tokens, options.runs, dense))
    show(rows, whole, bandwidth)
    if options.json:
        found = {
            "machine": machine(),
            "bandwidth_bytes_per_second": bandwidth,
            "attention": [asdict(row) for row in rows],
            "steps": [asdict(row) for row in whole],
        }
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
