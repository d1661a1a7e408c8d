"""What attention loses that reads few pages of its cache, selector by selector, and caches that evict.

Four parts. Text: the share of the dense program's attention that the selected pages hold, KL and agreement
of the tokens after a context. Retrieval: numbers hidden in long prompts. Drift: KL of generated tokens,
with and without dense passes that rectify. Eviction: KL of the tokens after a prompt that was evicted.

Prompts run densely. Text is the English prose that Python ships, one half to calibrate on and the other to
measure on; ``--text`` takes another to measure on.

    python benchmarks/sparse_quality.py --model .cache/models/smollm2-135m-instruct \\
        --gguf SmolLM2-135M-Instruct.Q4_1.gguf --out benchmarks/results/sparse_quality.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from common import machine
from sparse_drift import drift
from sparse_programs import Bench
from sparse_retrieval import cases, retrieval_rows
from sparse_tasks import Task
from sparse_text import TAIL, eviction_rows, text_rows

from graphwright.optimizer.machine import safe_library

KEEPS = (0.25, 0.125, 0.0625)
EVICTED = (0.5, 0.25)
#: Texts by tokens of context.
TEXTS = {2048: 4, 6144: 4}
TASKS = (
    Task("passkey", "prose", 1024),
    Task("key-value", "filler", 1024, pairs=2),
    Task("passkey", "filler", 2048),
)
DRIFT = ("selector=bounds,keep=0.0625", "selector=bounds,keep=0.0625,refresh=32")


class Output:
    """The results so far, in a file: a long run that is cut off keeps what it has."""

    def __init__(self, path: str | None) -> None:
        self._path = Path(path) if path else None
        self.result: dict[str, Any] = {}
        if self._path is not None and self._path.exists():
            self.result = json.loads(self._path.read_text())
        self._start = time.perf_counter()

    def put(self, part: str, content: Any) -> None:
        """Replace a part."""
        self.result.setdefault("machine", {})[part] = machine()
        self.result[part] = content
        if self._path is not None:
            self._path.write_text(json.dumps(self.result, indent=1) + "\n")

    def collect(self, part: str, rows: Iterable[dict[str, Any]], **about: Any) -> None:
        """Rows of a part, written as they come."""
        found: list[dict[str, Any]] = []
        for row in rows:
            found.append(row)
            self.put(part, {**about, "rows": found})
            self.say(_line(row))

    def say(self, line: str) -> None:
        """A line with the time since the start."""
        print(f"{time.perf_counter() - self._start:6.0f} s  {line}", flush=True)


def _line(row: dict[str, Any]) -> str:
    words = []
    for key, content in row.items():
        if isinstance(content, dict) and "mean" in content:
            words.append(f"{key} {content['mean']:.4f}")
        elif content != "" and not isinstance(content, list):
            words.append(f"{key} {content:.4g}" if isinstance(content, float) else f"{key} {content}")
    return "  ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True)
    parser.add_argument("--gguf")
    parser.add_argument("--text", help="a file to measure on, in the place of Python's prose")
    parser.add_argument("--parts", nargs="*", default=["text", "eviction", "drift", "retrieval"])
    parser.add_argument("--only", nargs="*", default=[], help="selectors and eviction methods")
    parser.add_argument("--contexts", nargs="*", type=int, default=list(TEXTS), help="of those measured")
    parser.add_argument("--samples", type=int, default=20, help="questions of a retrieval task")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="little of everything: to see that it runs")
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    out = Output(args.out)
    with torch.no_grad(), safe_library(torch.bfloat16, torch.device("cpu")):
        bench = Bench(args.model, args.gguf, args.text)
        out.say("the model is captured")
        run(bench, args, out)


def run(bench: Bench, args: argparse.Namespace, out: Output) -> None:
    """The parts that were asked for."""
    quick, source = args.quick, Path(args.text).name if args.text else "Python's prose"
    sizes = {512: 2} if quick else {n: TEXTS[n] for n in args.contexts}
    keeps, evicted = (KEEPS[1:2], EVICTED[:1]) if quick else (KEEPS, EVICTED)
    tail, about = 32 if quick else TAIL, {"source": source, "texts": {str(n): c for n, c in sizes.items()}}

    def texts(context: int) -> Any:
        return bench.run_dense(bench.cut(bench.text, sizes[context], context + tail), context)

    if "text" in args.parts:
        out.collect("text", text_rows(bench, [texts(n) for n in sizes], keeps, args.only), tail=tail, **about)
    if "eviction" in args.parts:
        out.collect(
            "eviction", eviction_rows(bench, texts(min(sizes)), evicted, args.only), tail=tail, **about
        )
    if "drift" in args.parts:
        prompt, new, count = (256, 128, 2) if quick else (1024, 512, 4)
        found = drift(bench, bench.cut(bench.text, count, prompt + new), prompt, new, DRIFT)
        out.put("drift", found)
        for row in found["rows"]:
            out.say(
                f"drift along {row['along']} {row['options']} {[round(b['mean'], 4) for b in row['buckets']]}"
            )
    if "retrieval" in args.parts:
        tasks = (Task("passkey", "filler", 512), Task("key-value", "filler", 512, 2)) if quick else TASKS
        samples = 2 if quick else args.samples
        rows = retrieval_rows(
            bench, tasks, samples, min(samples, 10), cases(keeps, evicted, args.only), out.say
        )
        out.collect("retrieval", rows)


if __name__ == "__main__":
    main()
