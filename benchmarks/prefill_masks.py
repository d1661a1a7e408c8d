"""What masks for prompts save and lose: attention alone, whole prompts, and the predictions after them.

Three tables: the time of one attention of 512 queries at the end of 4,096 and 8,192 tokens, under each mask,
beside the dense kernel; the time of a prompt of a model; and the KL divergence of the predictions of the 256
tokens behind that prompt, which themselves attend to everything, from those of the dense program.

    python benchmarks/prefill_masks.py --model .cache/models/smollm2-135m-instruct \\
        --gguf SmolLM2-135M-Instruct.Q4_1.gguf --out benchmarks/results/prefill_masks.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import load_model, load_prose, machine

from graphwright.cost_model.target import resolve_target
from graphwright.cost_model.workload import Workload
from graphwright.ir.graph import Graph
from graphwright.ir.prefill_masks import LongStep, parse_mask, visible_blocks
from graphwright.kernels.masked_attention import LongAttention
from graphwright.kernels.registry import select
from graphwright.optimizer.build import build_kernels, make_program
from graphwright.optimizer.driver import capture_step
from graphwright.passes.base import parse_pass
from graphwright.runtime.lowering import LoweringOptions, lower
from graphwright.runtime.program import Program

MASKS = (
    "a_shape(recent=512)",
    "a_shape(recent=1024)",
    "vertical_slash(verticals=256, slashes=256)",
    "vertical_slash(verticals=512, slashes=512)",
    "chunked(chunk=256, keep=0.125)",
    "chunked(chunk=512, keep=0.25)",
    "chunked(chunk=512, keep=0.5)",
)
#: One attention of SmolLM2-135M: heads, key/value heads, features.
HEADS, GROUPS, FEATURES = 9, 3, 64
QUERIES, BEHIND = 512, 256


def best_of(times: int, run: Callable[..., Any], *args: Any, **options: Any) -> float:
    """Milliseconds of the fastest of some calls, after one that does not count."""
    run(*args, **options)
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        run(*args, **options)
        taken.append(time.perf_counter() - start)
    return min(taken) * 1e3


def attention_times(contexts: list[int], times: int) -> list[dict[str, Any]]:
    """Milliseconds of 512 queries at the end of each context, random numbers, by dtype, mask and way."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for context in contexts:
            q = torch.randn(1, QUERIES, HEADS, FEATURES).to(dtype).transpose(1, 2)
            keys, values = (torch.randn(1, GROUPS, context, FEATURES).to(dtype) for _ in range(2))
            lengths, counts = torch.tensor([context - QUERIES]), torch.tensor([QUERIES])
            given: dict[str, Any] = dict(
                q=q, keys=keys, values=values, lengths=lengths, counts=counts, scale=FEATURES**-0.5,
                positions=lengths[:, None] + torch.arange(QUERIES), tree=torch.zeros(1, 0, dtype=torch.int64),
            )  # fmt: skip
            kernel = select("cache_attention", "cpu", **given)
            row = {"dtype": str(dtype).removeprefix("torch."), "context": context}
            dense = best_of(times, kernel, **given)
            rows.append({**row, "mask": "dense", "kept": 1.0, "ms": dense, "way": kernel.provider})
            print(rows[-1], flush=True)
            for text in MASKS:
                mask = parse_mask(text)
                step = LongStep(q, keys, lengths, counts, FEATURES**-0.5, mask.block)
                find = best_of(times, visible_blocks, mask, step)
                blocks = visible_blocks(mask, step)
                everything = visible_blocks(parse_mask("a_shape(recent=1048576)"), step)
                kept = float(blocks.float().mean() / everything.float().mean())
                for way in ("flex", "blocks"):
                    run = LongAttention(way == "flex", mask, FEATURES**-0.5, 0.0)
                    took = best_of(times, run, q, keys, values, lengths, counts, None)
                    rows.append({**row, "mask": text, "kept": kept, "ms": took, "find_ms": find, "way": way})
                    print(rows[-1], flush=True)
    return rows


class Bench:
    """A model, and programs of it."""

    def __init__(self, folder: str, gguf: str | None, prompt: int, times: int) -> None:
        self.model = load_model(folder, gguf)
        build_kernels(self.model.device)
        self.graph, _ = capture_step(self.model)
        self.ids = load_prose(folder, gguf, prompt + BEHIND)
        self.prompt, self.times = prompt, times

    def program(self, *passes: str) -> Program:
        """Compiled, as it runs for a user."""
        graph: Graph = self.graph.copy()
        for text in ("place_cache{cut=kv}", "compile_layers", *passes):
            parse_pass(text)(graph, Workload(prompt=self.prompt), resolve_target("cpu"), force=True)
        return make_program(self.model, graph, lower(graph, self.model.device, LoweringOptions()))

    def run(self, program: Program) -> tuple[float, torch.Tensor]:
        """Seconds of the prompt, and log-probabilities ``[256, V]`` of the tokens behind it."""
        prompt, counts = self.ids[:, : self.prompt], torch.tensor([self.prompt])
        program.prefill(program.allocate(1, 1024), prompt[:, :1024], counts.clamp(max=1024))  # compiles
        for _ in range(self.times):
            state = program.allocate(1, self.prompt + BEHIND)
            start = time.perf_counter()
            program.prefill(state, prompt, counts)
            seconds = time.perf_counter() - start
        logits = []
        for start in range(self.prompt, self.prompt + BEHIND, 64):
            counts = torch.tensor([64])
            logits.append(program.step(state, self.ids[:, start : start + 64], counts)[0].float())
            state.commit(counts)
        return seconds, torch.log_softmax(torch.cat(logits), -1)


def predictions(bench: Bench) -> list[dict[str, Any]]:
    """Seconds of the prompt by mask; KL in nats a token, and how often the first choice agrees, behind it."""
    seconds, exact = bench.run(bench.program())
    rows = []
    for mask in (None, *MASKS):
        took, found = (
            (seconds, exact) if mask is None else bench.run(bench.program(f"sparsify_prefill{{mask={mask}}}"))
        )
        kl = float((exact.exp() * (exact - found)).sum(-1).mean())
        agree = float((exact.argmax(-1) == found.argmax(-1)).float().mean())
        rows.append({"mask": mask or "dense", "prompt_seconds": took, "kl": kl, "top1_agreement": agree})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Run it all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=".cache/models/smollm2-135m-instruct")
    parser.add_argument("--gguf", default=None)
    parser.add_argument("--contexts", type=int, nargs="*", default=[4096, 8192])
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--out", default=None)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with torch.no_grad():
        result = {
            "machine": machine(),
            "attention": attention_times(arguments.contexts, arguments.times),
            "model": predictions(Bench(arguments.model, arguments.gguf, arguments.prompt, arguments.times)),
        }
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
