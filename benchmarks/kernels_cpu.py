"""Times of the CPU kernels against PyTorch's, at the shapes of SmolLM2-135M.

    python benchmarks/kernels_cpu.py [--dtype bfloat16] [--threads 2] [--json PATH]

One step's linears (30 layers and the head) at 1 and 8 rows, one step's attention (30 layers) at three
contexts and 1 and 8 tokens, and prefill chunks. Ours and the library run in turn in one process; medians of
the pairs. The roofline is the measured bandwidth of reading memory with all threads.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

# Some virtual machines offer AMX but hide the CPUID leaf that oneDNN reads, which then crashes.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import torch
import torch.nn.functional as F

from graphwright.kernels import registry
from graphwright.kernels.cpp import build

LAYERS, HEADS, GROUPS, DIM = 30, 9, 3, 64
HIDDEN, INNER, VOCAB = 576, 1536, 49152
CONTEXTS = (256, 2000, 6000)


def pairs(ours: Callable[[], object], theirs: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Medians, in ms, of two functions that run in turn for about that many seconds."""
    ours(), theirs()
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while len(times[0]) < 5 or time.perf_counter() < end:
        for function, into in ((ours, times[0]), (theirs, times[1])):
            start = time.perf_counter()
            function()
            into.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[0]), statistics.median(times[1])


def read_bandwidth(gib: float = 0.5) -> float:
    """GB/s of reading memory once (an exact sum of int64, which costs one addition for eight bytes)."""
    data = torch.ones(int(gib * 2**30 / 8), dtype=torch.int64)
    best = float("inf")
    for _ in range(7):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return data.numel() * 8 / best / 1e9


class Linears:
    """All linears of one decode step, with weights of their own for each layer."""

    def __init__(self, dtype: torch.dtype) -> None:
        def weight(n: int, k: int) -> torch.Tensor:
            return torch.randn(n, k).to(dtype) / k**0.5

        heads = HEADS * DIM, GROUPS * DIM, GROUPS * DIM
        self.layers = [
            (
                [weight(n, HIDDEN) for n in heads],
                weight(HIDDEN, HIDDEN),
                [weight(INNER, HIDDEN), weight(INNER, HIDDEN)],
                weight(HIDDEN, INNER),
            )
            for _ in range(LAYERS)
        ]
        self.head = weight(VOCAB, HIDDEN)
        elements = LAYERS * (HIDDEN * (sum(heads) + HIDDEN) + 3 * HIDDEN * INNER) + VOCAB * HIDDEN
        self.bytes = elements * dtype.itemsize
        self.dtype = dtype

    def inputs(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The hidden state and the inner one."""
        return torch.randn(1, rows, HIDDEN).to(self.dtype), torch.randn(1, rows, INNER).to(self.dtype)

    def ours(self, x: torch.Tensor, inner: torch.Tensor, head: bool = True) -> None:
        """One step with the registered kernels."""
        one, group = torch.ops.graphwright_cpp.linear.default, torch.ops.graphwright_cpp.linear_group.default
        for qkv, out, gate_up, down in self.layers:
            group(x, qkv, [None] * 3)
            one(x, out)
            group(x, gate_up, [None] * 2)
            one(inner, down)
        if head:
            one(x, self.head)

    def library(self, x: torch.Tensor, inner: torch.Tensor, head: bool = True) -> None:
        """One step with PyTorch's linear."""
        for qkv, out, gate_up, down in self.layers:
            for w in (*qkv, out, *gate_up):
                F.linear(x, w)
            F.linear(inner, down)
        if head:
            F.linear(x, self.head)


class Attention:
    """Attention of one step over a cache of its own for each layer."""

    def __init__(self, dtype: torch.dtype, context: int, tokens: int) -> None:
        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape).to(dtype)

        slots = context + tokens
        self.stores = [(random(1, GROUPS, slots, DIM), random(1, GROUPS, slots, DIM)) for _ in range(LAYERS)]
        self.q = random(1, tokens, HEADS, DIM).transpose(1, 2)
        self.k, self.v = (random(1, tokens, GROUPS, DIM).transpose(1, 2) for _ in range(2))
        self.lengths, self.counts = torch.tensor([context]), torch.tensor([tokens])
        self.positions = context + torch.arange(tokens)[None]
        self.tree = torch.zeros(1, 0, dtype=torch.int64)
        self.mask = torch.arange(slots)[None, :] <= self.positions[0][:, None]
        self.slice = slice(context, context + tokens)

    def ours(self) -> None:
        """Append and attend with the registered kernel."""
        op = torch.ops.graphwright_cpp.append_attention.default
        for keys, values in self.stores:
            op(
                self.q,
                self.k,
                self.v,
                keys,
                values,
                self.positions,
                self.lengths,
                self.counts,
                self.tree,
                DIM**-0.5,
            )

    def library(self) -> None:
        """Append and attend with PyTorch."""
        for keys, values in self.stores:
            keys[:, :, self.slice] = self.k
            values[:, :, self.slice] = self.v
            F.scaled_dot_product_attention(
                self.q, keys, values, attn_mask=self.mask[None, None], enable_gqa=True
            )


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="per line")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    ok, reason = build.available(print)
    if not ok:
        raise SystemExit(reason)
    registry.select("linear", "cpu", x=torch.zeros(1, 1), weight=torch.zeros(1, 1))
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    bandwidth = read_bandwidth()
    results: dict[str, dict[str, float]] = {}
    print(
        f"{options.dtype}, {options.threads} threads, torch {torch.__version__}; "
        f"memory reads {bandwidth:.1f} GB/s"
    )
    print(f"{'ms per step':28} {'ours':>9} {'library':>9} {'x':>6} {'GB/s':>6} {'roofline':>9}")

    def line(name: str, ours: Callable[[], object], theirs: Callable[[], object], read: float) -> None:
        a, b = pairs(ours, theirs, options.seconds)
        bound = read / bandwidth / 1e6
        results[name] = {"ours_ms": a, "library_ms": b, "gb_per_s": read / a / 1e6, "roofline_ms": bound}
        print(f"{name:28} {a:9.2f} {b:9.2f} {b / a:6.2f} {read / a / 1e6:6.1f} {bound:9.2f}")

    with torch.inference_mode():
        linears = Linears(dtype)
        for rows in (1, 8, 64):
            x = linears.inputs(rows)
            line(
                f"linears, {rows} rows",
                partial(linears.ours, *x),
                partial(linears.library, *x),
                linears.bytes,
            )
        x = linears.inputs(512)
        body = linears.bytes - VOCAB * HIDDEN * dtype.itemsize
        ours, library = partial(linears.ours, *x, head=False), partial(linears.library, *x, head=False)
        line("linears, 512 rows, no head", ours, library, body)
        for context in CONTEXTS:
            for tokens in (1, 8):
                a = Attention(dtype, context, tokens)
                read = LAYERS * 2 * GROUPS * DIM * (context + tokens) * dtype.itemsize
                line(f"attention, {context} keys, {tokens} tok", a.ours, a.library, read)
        a = Attention(dtype, 2000, 512)
        line(
            "attention, 2000 keys, 512 tok",
            a.ours,
            a.library,
            LAYERS * 2 * GROUPS * DIM * 2512 * dtype.itemsize,
        )
    if options.json:
        machine = {
            "cpu": platform.processor() or platform.machine(),
            "threads": options.threads,
            "dtype": options.dtype,
        }
        machine |= {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "read_gb_per_s": bandwidth,
        }
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
