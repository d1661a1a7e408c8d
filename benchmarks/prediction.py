"""Predicted and measured step times on this CPU, side by side.

In each round the machine is calibrated, with kernels on synthetic data (nothing is fitted to the model),
and then every combination of batch, context and option is measured in turn: on a shared machine the speed
of memory and of matrix units changes from minute to minute, for both sides. The figures are medians over
rounds. The options are those the planner chooses from: compiled or op by op, one token a step or drafts
to verify.

The cache holds ones: what a step takes does not depend on what it reads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from common import load_model, machine

import graphwright as gw
from graphwright.cost_model import graph_cost, predict
from graphwright.optimizer.calibration import calibrate_machine

#: The options: passes, and tokens per step (more than one verifies drafts).
OPTIONS = {
    "op by op": (["place_cache"], 1),
    "compiled": (["place_cache", "compile_layers"], 1),
    "compiled, 4 drafts": (["place_cache", "compile_layers"], 5),
    "compiled, 8 drafts": (["place_cache", "compile_layers"], 9),
}


@dataclass
class Case:
    """One combination, with its times in seconds a step."""

    option: str
    batch: int
    context: int
    tokens: int
    predictions: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    @property
    def predicted(self) -> float:
        """The median over all calibrations."""
        return statistics.median(self.predictions)

    @property
    def measured(self) -> float:
        """The median over all rounds."""
        return statistics.median(self.times)

    @property
    def error(self) -> float:
        """How far the prediction is off, as a share of what was measured."""
        return self.predicted / self.measured - 1


class Step:
    """Runs one case's step over and over, from the same context."""

    def __init__(self, program: Any, case: Case) -> None:
        self.program, self.case = program, case
        self.state = program.allocate(case.batch, case.context + case.tokens)
        self.state.pretend(case.context)
        self.tokens = torch.zeros((case.batch, case.tokens), dtype=torch.int64)
        self.counts = torch.full((case.batch,), case.tokens)

    def time(self, steps: int) -> None:
        """A first step that does not count, then ``steps`` that do."""
        for index in range(steps + 1):
            started = time.perf_counter()
            self.program.step(self.state, self.tokens, self.counts)
            if index:
                self.case.times.append(time.perf_counter() - started)


def build(model: Any, contexts: list[int]) -> dict[tuple[str, ...], Any]:
    """The programs of all options, by their passes."""
    workload = gw.Workload(prompt=max(contexts), generate=16)
    wanted = dict.fromkeys(tuple(passes) for passes, _ in OPTIONS.values())
    return {p: gw.optimize(model, "cpu", workload=workload, passes=list(p)) for p in wanted}


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Every combination."""
    for name, (_, tokens) in OPTIONS.items():
        for batch in options.batches:
            for context in options.contexts:
                yield Case(name, batch, context, tokens)


def measure(programs: dict[tuple[str, ...], Any], found: list[Case], rounds: int, steps: int) -> None:
    """Calibrate, predict and measure all cases in turn, round after round."""
    costs = {passes: graph_cost(fast.graph) for passes, fast in programs.items()}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds} ...", flush=True)
        target = calibrate_machine()
        for case in found:
            place: dict[str, Any] = {"batch": case.batch, "context": case.context, "tokens": case.tokens}
            passes = tuple(OPTIONS[case.option][0])
            case.predictions.append(predict(costs[passes], target, **place).seconds)
            Step(programs[passes].program, case).time(steps)


def summary(found: list[Case]) -> dict[str, float]:
    """Median and worst error, and how much of it is one common factor."""
    errors = sorted(abs(case.error) for case in found)
    return {
        "median_error": statistics.median(errors),
        "worst_error": errors[-1],
        "median_ratio": statistics.median(case.measured / case.predicted for case in found),
    }


def show(found: list[Case]) -> None:
    """The figures as a table."""
    print(f"{'option':20} {'batch':>5} {'context':>8} {'predicted':>10} {'measured':>10} {'error':>7}")
    for case in found:
        print(
            f"{case.option:20} {case.batch:5} {case.context:8,} {case.predicted * 1e3:7.2f} ms "
            f"{case.measured * 1e3:7.2f} ms {case.error:+7.0%}"
        )
    totals = summary(found)
    print(
        f"error: median {totals['median_error']:.1%}, worst {totals['worst_error']:.1%}; "
        f"measured over predicted: median {totals['median_ratio']:.2f}"
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--gguf", help="GGUF file in the folder")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 2000, 6000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="steps of a case in one round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the results here")
    return parser.parse_args()


def main() -> None:
    """Calibrate, predict, measure and print."""
    options = parse()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print("loading and optimizing ...", flush=True)
    model = load_model(options.model, options.gguf)
    programs = build(model, options.contexts)
    found = list(cases(options))
    measure(programs, found, options.rounds, options.steps)
    show(found)
    if options.json:
        record = {
            "schema": "graphwright.benchmark.prediction/1",
            "machine": machine(),
            "settings": {"rounds": options.rounds, "steps": options.steps, "dtype": "bfloat16"},
            "summary": summary(found),
            "cases": [
                {
                    **{k: v for k, v in asdict(c).items() if k not in ("times", "predictions")},
                    "predicted": c.predicted,
                    "measured": c.measured,
                    "error": c.error,
                }
                for c in found
            ],
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
