"""What skipping loses and gains: KL to the full model against the speed of a decode step, rule by rule.

The model runs in bfloat16. Losses are measured on one half of the English prose that Python ships, 16 tokens
a step; rules that choose layers by data see the other half only. What shows behind a long context only
(windows) is measured on the last tokens of long rows. Speed is that of greedy decode steps from one context,
in turn with the full program in one process; the figure is the median ratio of neighbouring runs.

A rule is a line of ``RULES``: its name, its pass with ``?`` for the setting, and the settings.

    python benchmarks/skipping.py --model .cache/models/smollm2-135m-instruct \\
        --gguf SmolLM2-135M-Instruct.Q4_1.gguf --json benchmarks/results/skipping.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import Any

import torch
from common import load_model, load_tokenizer, machine
from decode_cpu import GraphwrightSide
from sparse_speed import in_turn

from graphwright.cost_model.graph_cost import graph_cost
from graphwright.cost_model.prediction import predict
from graphwright.cost_model.target import resolve_target
from graphwright.cost_model.workload import Workload
from graphwright.ir.graph import Graph
from graphwright.optimizer.build import build_kernels, make_program, op_by_op
from graphwright.optimizer.driver import capture_step
from graphwright.optimizer.machine import safe_library
from graphwright.optimizer.quality import Reference
from graphwright.optimizer.quality.samples import StoreSamples
from graphwright.passes.base import order_passes, parse_pass
from graphwright.runtime.lowering import LoweringOptions, lower
from graphwright.runtime.program import Program

KV = "place_cache{cut=kv}"
COUNTS = (2, 4, 6, 8, 10)
WINDOWS = (128, 256, 512, 1024)
#: Tokens of context before those that are compared, for what shows behind a long one only.
FAR, COMPARED = 2048, 256


@dataclass(frozen=True)
class Rule:
    """One way to skip, at each of its settings; ``?`` in the pass stands for the setting."""

    name: str
    passes: str
    settings: Sequence[Any]

    def spelled(self, setting: Any) -> str:
        """The pass at a setting."""
        return self.passes.replace("?", str(setting))


RULES = (
    Rule("angular", "skip_layers{order=angular,count=?}", COUNTS),
    Rule("trim", "skip_layers{order=trim,count=?}", COUNTS),
    Rule("middle", "skip_layers{order=middle,count=?}", COUNTS),
    Rule("angular, attention", "skip_layers{order=angular,part=attention,count=?}", COUNTS),
    Rule("angular, mlp", "skip_layers{order=angular,part=mlp,count=?}", COUNTS),
    Rule("trim, attention", "skip_layers{order=trim,part=attention,count=?}", COUNTS),
    Rule("window", "slide_attention{window=?}", WINDOWS),
    Rule("position", "decay_depth{alpha=?}", (0.9999, 0.9995, 0.999)),
    Rule("confidence", "exit_early{layer=25,threshold=?}", (0.9, 0.7, 0.5)),
)


@dataclass(frozen=True)
class Row:
    """One rule at one setting. Times in milliseconds; those of timing are 0 where it was left out.

    Attributes:
        sites: what it applied to.
        context: tokens of the rows that losses are measured on.
        speedup, predicted_speedup: the full program's step over this one's.
    """

    rule: str
    setting: Any
    passes: str
    sites: list[str]
    kl: float
    perplexity_ratio: float
    top1_agreement: float
    context: int
    full_ms: float
    step_ms: float
    speedup: float
    predicted_speedup: float


class ScoredOnce(StoreSamples):
    """Calibration text that remembers each loss: the counts of one order have their first drops in common."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._losses: dict[frozenset[str], float] = {}

    def loss(self, graph: Graph) -> float:
        key = frozenset(graph.parameters)
        if key not in self._losses:
            self._losses[key] = super().loss(graph)
        return self._losses[key]


class Bench:
    """The model, its graph, the text, and the full program with what it says of the text."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model = load_model(args.model, args.gguf)
        build_kernels(self.model.device)
        self.graph, _ = capture_step(self.model)
        self._tokenizer = load_tokenizer(args.model, args.gguf)
        names = sorted(topics)
        self._halves = ["\n\n".join(topics[name] for name in names[start::2]) for start in (0, 1)]
        calibration = self._cut(0, args.rows, args.tokens)
        self.graph.samples = ScoredOnce(lambda graph: op_by_op(self.model, graph), lambda: calibration)
        self.full, _ = self.rewrite([KV])

    def _cut(self, half: int, rows: int, tokens: int) -> list[list[int]]:
        """Rows of so many tokens, spread evenly over a half of the prose."""
        text = self._halves[half][: 40 * rows * tokens]
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) < rows * tokens:
            raise SystemExit(f"the text has {len(ids)} tokens, {rows * tokens} are needed")
        stride = len(ids) // rows
        return [ids[i * stride : i * stride + tokens] for i in range(rows)]

    def rewrite(self, passes: Sequence[str]) -> tuple[Graph, list[str]]:
        """The graph after the passes, and the sites of the lossy ones."""
        graph, sites = self.graph.copy(), []
        for chosen in order_passes(map(parse_pass, passes)):
            records = chosen(graph, Workload(), resolve_target("h100"), force=True)
            if chosen.fidelity == "lossy":
                sites += [record.site for record in records if record.status == "applied"]
        return graph, sites

    def program(self, graph: Graph) -> Program:
        """A graph as it runs fastest."""
        step = lower(graph, self.model.device, LoweringOptions(compile=self.args.compile))
        return make_program(self.model, graph, step)

    @cached_property
    def near(self) -> Reference:
        """Losses on every token of short rows."""
        rows = self._cut(1, self.args.rows, self.args.tokens)
        return Reference(op_by_op(self.model, self.full), rows)

    @cached_property
    def far(self) -> Reference:
        """Losses on the last tokens of long rows."""
        length = self.args.far + COMPARED
        rows = self._cut(1, max(1, self.args.rows // 2), length)
        return Reference(op_by_op(self.model, self.full), rows, prompt=self.args.far - 1)

    @cached_property
    def timed(self) -> GraphwrightSide:
        """The full program behind the context of the timing."""
        return self.side(self.full)

    def side(self, graph: Graph) -> GraphwrightSide:
        """A graph's program behind the context of the timing."""
        prompt = torch.tensor(self._cut(1, 1, self.args.context))
        capacity = self.args.context + self.args.steps + 1
        return GraphwrightSide(SimpleNamespace(program=self.program(graph)), prompt, capacity)

    def measure(self, rule: Rule, setting: Any) -> Row:
        """What a rule loses and gains at a setting."""
        passes = rule.spelled(setting)
        graph, sites = self.rewrite([passes, KV])
        is_far = parse_pass(passes).needs_context
        quality = (self.far if is_far else self.near).measure(op_by_op(self.model, graph))
        full_ms = step_ms = speedup = 0.0
        if self.args.runs:
            sides = (self.timed, self.side(graph))
            steps = self.args.steps
            full, own = in_turn(self.args.runs, *(lambda side=side: side.decode(steps) for side in sides))  # type: ignore[misc]
            full_ms, step_ms = (statistics.median(times) / steps for times in (full, own))
            speedup = statistics.median(slow / quick for slow, quick in zip(full, own, strict=True))
        return Row(
            rule.name, setting, passes, sites,
            quality.kl, quality.perplexity_ratio, quality.top1_agreement,
            self.args.far + COMPARED if is_far else self.args.tokens,
            full_ms, step_ms, speedup, self._predicted(self.full) / self._predicted(graph),
        )  # fmt: skip

    def _predicted(self, graph: Graph) -> float:
        """Seconds of a decode step at the context of the timing, on this machine."""
        cost, target = graph_cost(graph, fused=self.args.compile), resolve_target("auto")
        return predict(cost, target, context=self.args.context, phase="decode").seconds


def line(row: Row) -> str:
    """A row as text."""
    return (
        f"{row.rule:20s} {row.setting!s:>6s} {row.kl:8.4f} {row.perplexity_ratio:9.4f} "
        f"{row.top1_agreement:6.1%} "
        f"{row.step_ms:8.2f} {row.speedup:7.2f}x {row.predicted_speedup:7.2f}x  {len(row.sites)} sites"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True)
    parser.add_argument("--gguf")
    parser.add_argument("--only", nargs="*", default=[], help="names of rules")
    parser.add_argument("--rows", type=int, default=8, help="of text to calibrate and to measure on")
    parser.add_argument("--tokens", type=int, default=512, help="of a row")
    parser.add_argument("--far", type=int, default=FAR, help="context of windows")
    parser.add_argument("--context", type=int, default=1024, help="of the timing")
    parser.add_argument("--steps", type=int, default=16, help="of a timed run")
    parser.add_argument("--runs", type=int, default=15, help="timed ones; 0 measures losses only")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="run op by op")
    parser.add_argument("--quick", action="store_true", help="little of everything: to see that it runs")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.rows, args.tokens, args.far, args.context = 1, 32, 300, 64
        args.steps, args.runs, args.compile = 4, min(args.runs, 2), False
    torch.set_num_threads(args.threads)
    rows: list[Row] = []
    with torch.inference_mode(), safe_library(torch.bfloat16, torch.device("cpu")):
        bench = Bench(args)
        print("rule                setting     KL   perplexity  agree  step ms  speedup predicted")
        for rule in (rule for rule in RULES if not args.only or rule.name in args.only):
            for setting in rule.settings[:1] if args.quick else rule.settings:
                rows.append(bench.measure(rule, setting))
                print(line(rows[-1]), flush=True)
                if args.json:
                    about = {key: value for key, value in vars(args).items() if key not in ("json", "model")}
                    found = {"machine": machine(), "settings": about, "rows": [asdict(row) for row in rows]}
                    args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
