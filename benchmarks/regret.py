"""Does the planner choose well? Every plan that it considered is measured, and its choice compared.

Six workloads: a short chat, a long context, a batch of 8, retrieval with copying, a long generation, and
tight memory. For each, ``optimize()`` chooses with a few calibration prompts; then its choice and the
plans it kept beside it (the front and the runners-up), and the drafts that it refused, generate from other
prompts, in turn. A plan's time
is that of ``generate()`` from the first new token to the last, per token; the regret is the choice's time
over the best one's, minus 1.

Grouped heads leave one way to store the cache, so the workload of tight memory runs a model with as many
key heads as query heads, of random weights: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from common import load_model, load_tokenizer, machine
from transformers import AutoModelForCausalLM, GPT2Config

import graphwright as gw
from graphwright.passes.base import parse_pass
from graphwright.passes.speculate import Speculate


@dataclass(frozen=True)
class Scenario:
    """One workload, with text to calibrate on and other text to measure on."""

    name: str
    workload: gw.Workload
    prompts: Callable[[int], list[int]]  # by number: the first are for calibration
    model: str = "smollm2"
    memory: str | None = None


@dataclass
class Outcome:
    """One plan of one scenario. Times in seconds per generated token (of all rows together)."""

    scenario: str
    passes: list[str]
    chosen: bool
    predicted: float | None  # None: not among the report's plans
    times: list[float] = field(default_factory=list)

    @property
    def measured(self) -> float:
        """The mean over rounds: each has prompts of its own, and all of them are the workload."""
        return statistics.mean(self.times)


class Watch:
    """A stopping criterion that never stops: it notes when the first and the last token came."""

    def __init__(self) -> None:
        self.first = self.last = 0.0
        self.start = self.end = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.last, self.end = time.perf_counter(), input_ids.shape[1]
        if not self.first:
            self.first, self.start = self.last, self.end
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


# --- prompts -------------------------------------------------------------------------------------


def reader(tokenizer: Any, length: int) -> Callable[[int], list[int]]:
    """Prose of Python's documentation, another passage for each number."""

    def read(number: int) -> list[int]:
        names = sorted(topics)
        random.Random(number).shuffle(names)
        ids = tokenizer("\n\n".join(topics[name] for name in names)[: 12 * length], verbose=False)[
            "input_ids"
        ]
        return list(ids[:length])

    return read


def chatter(tokenizer: Any, length: int) -> Callable[[int], list[int]]:
    """A question about a passage, in the model's chat format."""

    def ask(number: int) -> list[int]:
        passage = tokenizer.decode(reader(tokenizer, max(16, length - 40))(number))
        message = [{"role": "user", "content": f"Explain this to a friend:\n{passage}"}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        return list(tokenizer(text, verbose=False)["input_ids"])[-length:]

    return ask


def copier(tokenizer: Any, length: int) -> Callable[[int], list[int]]:
    """A passage, and the beginning of the same passage once more: the model goes on copying."""

    def copy(number: int) -> list[int]:
        passage = reader(tokenizer, length - 80)(number)
        again = tokenizer("\n\nThe same text again, word for word:\n\n", verbose=False)["input_ids"]
        return (passage + list(again) + passage)[:length]

    return copy


def noise(vocabulary: int, length: int) -> Callable[[int], list[int]]:
    """Random tokens."""

    def draw(number: int) -> list[int]:
        source = random.Random(number)
        return [source.randrange(vocabulary) for _ in range(length)]

    return draw


def scenarios(tokenizer: Any, quick: bool) -> list[Scenario]:
    """The six workloads."""
    scale = 4 if quick else 1
    generate, short, middle, long = 96 // scale, 512 // scale, 1500 // scale, 6000 // scale
    return [
        Scenario("short chat", gw.Workload(1, 128, generate), chatter(tokenizer, 128)),
        Scenario("long context", gw.Workload(1, long, generate), reader(tokenizer, long)),
        Scenario("batch of 8", gw.Workload(8, short, generate), chatter(tokenizer, short)),
        Scenario("retrieval with copying", gw.Workload(1, middle, generate), copier(tokenizer, middle)),
        Scenario("long generation", gw.Workload(1, 128, 4 * generate), chatter(tokenizer, 128)),
        Scenario("tight memory", gw.Workload(4, middle, generate), noise(1000, middle), "gpt2", "tight"),
    ]


# --- measuring -----------------------------------------------------------------------------------


def random_model() -> Any:
    """GPT-2's shape with a longer context and random weights: every head has its own keys."""
    config = GPT2Config(n_positions=4096, n_layer=12, vocab_size=1024)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def tight_budget(model: Any, scenario: Scenario) -> gw.Budget:
    """A fifth less than the cache of keys and values would need, beside weights and workspace."""
    memory = gw.plan(model, "cpu", workload=scenario.workload).predicted["memory"]
    return gw.Budget(memory=int(memory["total_bytes"] - memory["cache_bytes"] // 5))


def seconds_per_token(fast: Any, scenario: Scenario, number: int) -> float:
    """One ``generate()`` from a prompt that was not calibrated on, from its first new token to its last."""
    workload = scenario.workload
    rows = [scenario.prompts(1000 + number * workload.batch + row) for row in range(workload.batch)]
    width = min(map(len, rows))
    watch = Watch()
    ids = torch.tensor([row[-width:] for row in rows])
    fast.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=workload.generate,
        min_new_tokens=workload.generate,
        do_sample=False,
        stopping_criteria=[watch],
    )
    return (watch.last - watch.first) / (watch.end - watch.start)


def run(scenario: Scenario, models: dict[str, Any], rounds: int, most: int) -> list[Outcome]:
    """Choose, then measure the choice and the plans beside it."""
    model = models[scenario.model]
    budget = tight_budget(model, scenario) if scenario.memory else None
    calibration = [scenario.prompts(number) for number in range(4)]
    chosen = gw.optimize(model, "cpu", workload=scenario.workload, budget=budget, calibration=calibration)
    rows = [(row["passes"], row["predicted"]["seconds_per_token"]) for row in chosen.report.plans[: most + 1]]
    rows += [(passes, None) for passes in _refused(rows)]
    outcomes, programs = [], []
    for index, (passes, predicted) in enumerate(rows):
        outcomes.append(Outcome(scenario.name, passes, index == 0, predicted))
        programs.append(
            gw.optimize(model, "cpu", workload=scenario.workload, passes=passes) if index else chosen
        )
    for number in range(rounds):
        order = list(zip(outcomes, programs, strict=True))
        for outcome, fast in order[number % len(order) :] + order[: number % len(order)]:
            outcome.times.append(seconds_per_token(fast, scenario, number))
    return outcomes


def _refused(rows: list[tuple[list[str], float]]) -> list[list[str]]:
    """The chosen plan without drafts and with drafts of 2, 4 and 8, where the report's plans lack them."""
    graph = [p for p in rows[0][0] if not p.startswith("speculate")]
    known = {_drafts(passes) for passes, _ in rows if passes[: len(graph)] == graph}
    return [
        graph if not n else [*graph, f"speculate{{drafter=ngram,tokens={n}}}"]
        for n in (0, 2, 4, 8)
        if n not in known
    ]


def _drafts(passes: list[str]) -> int:
    """Tokens in a plan's drafts; 0 without any."""
    drafts = [p for p in map(parse_pass, passes) if isinstance(p, Speculate)]
    return drafts[0].tokens if drafts else 0


def show(outcomes: list[Outcome]) -> dict[str, Any]:
    """One scenario's plans as lines; its regret."""
    best = min(o.measured for o in outcomes)
    choice = next(o for o in outcomes if o.chosen)
    regret = choice.measured / best - 1
    print(f"\n{choice.scenario}: regret {regret:.1%}")
    for o in sorted(outcomes, key=lambda o: o.measured):
        mark = ">" if o.chosen else " "
        print(f" {mark} {o.measured * 1e3:7.2f} ms (predicted {predicted(o)})  {' '.join(o.passes)}")
    return {
        "scenario": choice.scenario,
        "regret": regret,
        "plans": [{**asdict(o), "measured": o.measured} for o in outcomes],
    }


def predicted(outcome: Outcome) -> str:
    """The planner's figure, where it has one."""
    return "     -" if outcome.predicted is None else f"{outcome.predicted * 1e3:6.2f}"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--gguf", help="GGUF file in the folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plans", type=int, default=5, help="plans measured beside the chosen one")
    parser.add_argument("--only", help="the scenario whose name holds this")
    parser.add_argument("--quick", action="store_true", help="shorter prompts: a look, not a measurement")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the results here")
    return parser.parse_args()


def main() -> None:
    """Run the scenarios and print."""
    options = parse()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    models = {"smollm2": load_model(options.model, options.gguf), "gpt2": random_model()}
    found = []
    for scenario in scenarios(load_tokenizer(options.model, options.gguf), options.quick):
        if options.only and options.only not in scenario.name:
            continue
        found.append(show(run(scenario, models, options.rounds, options.plans)))
    worst = max(entry["regret"] for entry in found)
    print(f"\nworst regret {worst:.1%} over {len(found)} workloads")
    if options.json:
        record = {
            "schema": "graphwright.benchmark.regret/1",
            "machine": machine(),
            "settings": {"rounds": options.rounds, "dtype": "bfloat16"},
            "scenarios": found,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
