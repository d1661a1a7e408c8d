"""A prefix that all rows of a batch share, stored and read once, beside the same program without sharing.

Batch 16, bfloat16, on this CPU. Every row begins with the same prose and goes on with its own. Both programs
fill their caches once; then short runs of greedy decode steps alternate between them from the same context
(the caches are cut back after every run), so that a slow moment of the machine hits both. The figures are
medians over runs; the ratio is the median of the ratios of neighbouring runs. The cache of the program that
does not share is filled with copies of one row's prefix, unless ``--prefill`` asks for what that takes.

Memory is what the caches take, what the process grew by while they were filled, and what was predicted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from common import load_model, load_tokenizer, machine, prose

import graphwright as gw
from graphwright.cost_model.estimate import estimate
from graphwright.cost_model.target import resolve_target

PASSES = ["place_cache{cut=kv}", "compile_layers"]
WARM_UP_STEPS = 4


@dataclass(frozen=True)
class Result:
    """One side. Seconds, bytes, and tokens of all rows per second."""

    prefill_seconds: float
    step_seconds: float
    tokens_per_second: float
    cache_bytes: int
    predicted_cache_bytes: int
    grown_bytes: int
    predicted_step_seconds: float


class Side:
    """A program with its cache filled."""

    def __init__(
        self, program: Any, predicted: dict[str, Any], prompts: torch.Tensor, capacity: int, prefix: int,
        copied: int,
    ) -> None:  # fmt: skip
        self.program, self.predicted = program, predicted
        rows, tokens = prompts.shape
        before = resident_bytes()
        self.state = self.program.allocate(rows, capacity, prefix)
        self.one = torch.ones(rows, dtype=torch.int64)
        self.lengths = torch.full((rows,), tokens)
        started = time.perf_counter()
        if copied:
            one = self.program.allocate(1, capacity)
            self.program.prefill(one, prompts[:1, :copied], torch.tensor([copied]))
            self.state.begin_with(one)
            del one
        rest = self.lengths - copied
        self.first = self.program.prefill(self.state, prompts[:, copied:], rest).argmax(-1, keepdim=True)
        self.prefill_seconds = time.perf_counter() - started
        self.grown_bytes = resident_bytes() - before
        self.times: list[float] = []

    def decode(self, steps: int) -> list[list[int]]:
        """Greedy tokens after the prompts, row by row in each step; the cache ends as it began."""
        token, tokens = self.first, []
        started = time.perf_counter()
        for _ in range(steps):
            logits = self.program.step(self.state, token, self.one, logits="last")
            self.state.commit(self.one)
            token = logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(token[:, 0].tolist())
        self.times.append((time.perf_counter() - started) / steps)
        self.state.truncate(self.lengths)
        return tokens

    def result(self) -> Result:
        """The medians."""
        step = statistics.median(self.times)
        return Result(
            self.prefill_seconds,
            step,
            self.state.batch / step,
            self.state.nbytes(),
            self.predicted["memory"]["cache_bytes"],
            self.grown_bytes,
            self.predicted["decode"]["seconds_per_token"],
        )


def resident_bytes() -> int:
    """What the process has in memory now."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def make_prompts(options: argparse.Namespace) -> torch.Tensor:
    """``[rows, prefix + own]``: the same prose in every row, then other prose in each."""
    length = options.prefix + options.batch * options.own
    text = prose(load_tokenizer(options.model, options.gguf), length)[0]
    shared = text[: options.prefix].expand(options.batch, -1)
    return torch.cat((shared, text[options.prefix :].view(options.batch, options.own)), dim=1)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both sides, in turns."""
    model, prompts = load_model(options.model, options.gguf), make_prompts(options)
    shape = {"batch": options.batch, "prompt": prompts.shape[1], "generate": options.steps + 1}
    sides = []
    for prefix in (options.prefix, 0):
        print(f"{'sharing' if prefix else 'not sharing'}: optimizing and filling the cache ...", flush=True)
        passes = [*PASSES, f"share_prefix{{tokens={prefix}}}"] if prefix else PASSES
        workload = gw.Workload(**shape, shared_prefix=prefix)
        # Optimized for a workload that takes less time to check, priced for this one.
        small = gw.Workload(batch=1, prompt=64, generate=16)
        fast = gw.optimize(model, target="cpu", workload=small, passes=passes)
        predicted = estimate(fast.graph, resolve_target("cpu"), workload)
        copied = 0 if prefix or options.prefill else options.prefix
        sides.append(Side(fast.program, predicted, prompts, workload.capacity, prefix, copied))
    tokens = [side.decode(max(WARM_UP_STEPS, options.steps)) for side in sides]
    for side in sides:
        side.times.clear()
    for run in range(options.runs):
        for side in sides if run % 2 == 0 else sides[::-1]:
            side.decode(options.steps)
    shared, whole = sides
    agree = [a == b for mine, other in zip(*tokens, strict=True) for a, b in zip(mine, other, strict=True)]
    ratios = [slow / quick for quick, slow in zip(shared.times, whole.times, strict=True)]
    return {
        "shared": asdict(shared.result()),
        "whole": asdict(whole.result()),
        "ratio": statistics.median(ratios),
        "same_tokens": sum(agree) / len(agree),
    }


def show(found: dict[str, Any]) -> None:
    """The figures as a table."""
    names = ("tokens/s", "step", "predicted", "filling", "cache", "predicted", "grown")
    print(f"{'':8}" + "".join(f"{name:>13}" for name in names))
    for name in ("whole", "shared"):
        r = found[name]
        print(
            f"{name:8}{r['tokens_per_second']:13.1f}{r['step_seconds'] * 1e3:10.1f} ms"
            f"{r['predicted_step_seconds'] * 1e3:10.1f} ms{r['prefill_seconds']:11.1f} s"
            f"{r['cache_bytes'] / 2**20:9,.1f} MiB{r['predicted_cache_bytes'] / 2**20:9,.1f} MiB"
            f"{r['grown_bytes'] / 2**20:9,.1f} MiB"
        )
    print(f"ratio {found['ratio']:.2f}x; the same tokens in {found['same_tokens']:.1%} of the places")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--gguf", help="GGUF file in the folder")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prefix", type=int, default=4000, help="tokens that all rows share")
    parser.add_argument("--own", type=int, default=32, help="tokens of each row's own prompt")
    parser.add_argument("--steps", type=int, default=16, help="decode steps of one run")
    parser.add_argument("--runs", type=int, default=9, help="runs of each side")
    parser.add_argument(
        "--prefill", action="store_true", help="run every row's whole prompt where nothing is shared"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    found = measure(options)
    show(found)
    if options.json:
        keys = ("batch", "prefix", "own", "steps", "runs")
        record = {
            "schema": "graphwright.benchmark.shared_prefix/1",
            "machine": machine(),
            "settings": {**{key: getattr(options, key) for key in keys}, "dtype": "bfloat16"},
            **found,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
