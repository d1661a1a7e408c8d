"""Speculative decoding on this CPU, on conversations: speed, accepted lengths, overhead, batches.

Four parts, each to be run alone with ``--only``:

- ``choice``: the planner's choice against the same program without speculation, prompt by prompt and in
  turn, by category. Conversations are run turn by turn, with the model's own answers in between. Both
  sides write the same tokens (checked); the time is that of decoding, the prompt's taken off.
- ``drafters``: what every drafter's steps yield on average, and the host's time in it.
- ``lookup``: the planner's choice against transformers' own prompt lookup in the stock model.
- ``batch``: the same as ``choice``, eight rows at a time.

Decoding is greedy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import load_model, load_tokenizer, machine
from speculation_prompts import Conversation, read_conversations, split

import graphwright as gw
from graphwright.runtime.speculation import Speculation, make_speculation

PARTS = ("choice", "drafters", "lookup", "batch")
#: What ``drafters`` measures: options of ``speculate``.
DRAFTERS: tuple[dict[str, Any], ...] = (
    {"drafter": "ngram", "tokens": 8},
    {"drafter": "copy", "tokens": 8},
    {"drafter": "suffix", "tokens": 8},
    {"drafter": "suffix", "tokens": 16, "tree": "greedy(hope=1)"},
    {"drafter": "suffix", "tokens": 16, "rule": "goodput"},
    {"drafter": "recycling", "tokens": 16, "tree": "greedy(hope=1)"},
    {"drafter": "trigrams", "tokens": 16, "tree": "greedy(hope=1)"},
    {"drafter": "lookahead", "tokens": 24},
    {"drafter": "mix", "tokens": 16, "tree": "greedy(hope=1)"},
    {"drafter": "mix", "tokens": 16, "tree": "greedy(hope=1)", "rule": "goodput"},
    {"drafter": "skip(count=10)", "tokens": 4},
    {"drafter": "swift", "tokens": 4},
    {"drafter": "clasp", "tokens": 4},
    {"drafter": "del", "tokens": 4},
)


class Sides:
    """One program with and without drafts."""

    def __init__(self, fast: Any, tokenizer: Any, new_tokens: int) -> None:
        self.fast, self.tokenizer, self.new_tokens = fast, tokenizer, new_tokens

    def prompt(self, turns: Sequence[str]) -> list[int]:
        """Token ids of a conversation: the user's turns and the answers between them."""
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
        ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        return list(ids["input_ids"])

    def generate(
        self, rows: list[list[int]], speculation: Speculation | None
    ) -> tuple[list[list[int]], float]:
        """New tokens of each row, and the seconds from the first to the last of them."""
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        clock = _FirstToken()
        self.fast.speculation = speculation
        out = self.fast.generate(
            ids, attention_mask=mask, max_new_tokens=self.new_tokens, do_sample=False, streamer=clock,
        )  # fmt: skip
        return out[:, width:].tolist(), time.perf_counter() - clock.started


class _FirstToken:
    """A streamer that notes when the first token is there."""

    def __init__(self) -> None:
        self.started, self._seen = 0.0, 0

    def put(self, value: torch.Tensor) -> None:
        self._seen += 1
        if self._seen == 2:  # the prompt comes first
            self.started = time.perf_counter()

    def end(self) -> None:
        """Nothing to flush."""


# --- parts ---------------------------------------------------------------------------------------


Make = Callable[[], Speculation | None]


def run_choice(sides: Sides, make: Make, categories: dict[str, list[Conversation]]) -> Any:
    """Plain against drafted decoding by category, alternating which goes first."""
    rows, chosen = {}, make()
    for name, conversations in categories.items():
        prompts = [ids for one in conversations for ids in _turns(sides, one)]
        rows[name] = _compare(sides, chosen, [[ids] for ids in prompts])
        print(f"  {name:18s} {rows[name]['ratio']:.2f}x  {rows[name]['tokens_per_cycle']:.2f} tokens a cycle")
    ratios = [row["ratio"] for row in rows.values()]
    return {"categories": rows, "mean": statistics.mean(ratios), "least": min(ratios)}


def run_batch(sides: Sides, make: Make, categories: dict[str, list[Conversation]], batch: int) -> Any:
    """The same with first turns of all categories, ``batch`` rows at a time."""
    prompts = [sides.prompt(one.turns[:1]) for some in categories.values() for one in some]
    groups = [prompts[start : start + batch] for start in range(0, len(prompts) - batch + 1, batch)]
    return _compare(sides, make(), groups)


def _turns(sides: Sides, one: Conversation) -> Iterator[list[int]]:
    """The prompts of a conversation's turns, answered by the program itself without drafts."""
    said: list[str] = []
    for turn in one.turns:
        said.append(turn)
        ids = sides.prompt(said)
        yield ids
        if len(said) < 2 * len(one.turns) - 1:
            (answer,), _ = sides.generate([ids], None)
            said.append(sides.tokenizer.decode(answer, skip_special_tokens=True))


def _compare(sides: Sides, chosen: Speculation | None, groups: list[list[list[int]]]) -> dict[str, float]:
    seconds: list[list[float]] = [[], []]
    written = steps = 0
    for index, group in enumerate(groups):
        tokens: list[Any] = [None, None]
        for side in (0, 1) if index % 2 else (1, 0):
            tokens[side], took = sides.generate(group, chosen if side else None)
            seconds[side].append(took)
            if side:
                last = sides.fast.stats()["last"]
                written, steps = written + last["tokens"], steps + last["row_steps"]
        if tokens[0] != tokens[1]:
            raise SystemExit("speculation changed the tokens")
    plain, drafted = map(sum, seconds)
    return {
        "prompts": sum(map(len, groups)),
        "tokens": written,
        "plain_tokens_per_second": written / plain,
        "tokens_per_second": written / drafted,
        "ratio": plain / drafted,
        "tokens_per_cycle": written / max(steps, 1),
    }


def run_drafters(sides: Sides, categories: dict[str, list[Conversation]]) -> Any:
    """What the steps of every drafter yield, by category, and its overhead."""
    out = []
    for options in DRAFTERS:
        lengths, total = {}, {"seconds": 0.0, "cycles": 0.0}
        for name, conversations in categories.items():
            speculation = make_speculation(options)
            gained = 0
            cycles = 0
            for one in conversations:
                sides.generate([sides.prompt(one.turns[:1])], speculation)
                last = sides.fast.stats()["last"]
                (mine,) = last["by_drafter"].values()
                gained, cycles = gained + last["tokens"], cycles + last["cycles"]
                total["seconds"] += mine["drafting_seconds_per_cycle"] * last["cycles"]
                total["cycles"] += last["cycles"]
            lengths[name] = gained / max(cycles, 1)
        overhead = 1e6 * total["seconds"] / max(total["cycles"], 1.0)
        mean = statistics.mean(lengths.values())
        out.append({**options, "mean": mean, "overhead_us": overhead, "categories": lengths})
        print(f"  {_name(options):44s} {mean:.2f} tokens a cycle, {overhead:.0f} us a cycle")
    return out


def _name(options: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items())


def run_lookup(sides: Sides, model: Any, make: Make, categories: dict[str, list[Conversation]]) -> Any:
    """The planner's choice beside stock transformers with prompt lookup; one first turn a category."""
    seconds, tokens, chosen = [0.0, 0.0], [0, 0], make()
    for conversations in categories.values():
        ids = sides.prompt(conversations[0].turns[:1])
        (ours,), took = sides.generate([ids], chosen)
        theirs, stock_took = _prompt_lookup(model, ids, sides.new_tokens)
        seconds = [seconds[0] + took, seconds[1] + stock_took]
        tokens = [tokens[0] + len(ours), tokens[1] + theirs]
    ours_speed, stock_speed = (n / s for n, s in zip(tokens, seconds, strict=True))
    return {
        "tokens_per_second": ours_speed,
        "prompt_lookup_tokens_per_second": stock_speed,
        "ratio": ours_speed / stock_speed,
    }


def _prompt_lookup(model: Any, ids: list[int], new_tokens: int) -> tuple[int, float]:
    """Tokens that transformers writes with prompt lookup, and the seconds after the first of them."""
    clock, inputs = _FirstToken(), torch.tensor([ids])
    out = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=new_tokens, do_sample=False,
        prompt_lookup_num_tokens=10, streamer=clock,
    )  # fmt: skip
    return out.shape[1] - len(ids), time.perf_counter() - clock.started


# --- the run -------------------------------------------------------------------------------------


def optimize(
    model: Any, tokenizer: Any, options: argparse.Namespace, spare: list[Conversation], batch: int
) -> Any:
    """The planner's program for this workload, calibrated on prompts that are not measured."""
    sides = Sides(None, tokenizer, options.new_tokens)
    prompts = [sides.prompt(one.turns[:1]) for one in spare]
    mean = sum(map(len, prompts)) // len(prompts)
    workload = gw.Workload(batch=batch, prompt=mean, generate=options.new_tokens)
    return gw.optimize(model, target="cpu", workload=workload, calibration=prompts)


def chosen_speculation(fast: Any) -> tuple[Make, dict[str, Any]]:
    """What the planner chose, anew each time (drafters remember what they wrote), and why."""
    options = fast.graph.annotations.get("speculation")
    reasons = [
        f"{d.pass_name}: {d.status.value}: {d.reason}"
        for d in fast.report.decisions
        if d.pass_name.startswith("speculate")
    ]
    about = {"passes": list(fast.plan.passes), "reasons": reasons}
    return lambda: None if options is None else make_speculation(options), about


def main() -> None:
    """Run the parts and write the results."""
    options = _options()
    torch.set_num_threads(options.threads)
    categories = read_conversations(options.data)
    measured, spare = split(categories, options.prompts, options.calibration)
    model, tokenizer = load_model(options.model, options.gguf), load_tokenizer(options.model, options.gguf)
    results: dict[str, Any] = {
        "machine": machine(), "new_tokens": options.new_tokens, "prompts_per_category": options.prompts,
    }  # fmt: skip
    parts: dict[str, Callable[[], Any]] = {
        "drafters": lambda: _drafters(model, tokenizer, options, measured),
        "batch": lambda: _batch(model, tokenizer, options, spare, measured),
    }
    if {"choice", "lookup"} & set(options.only):
        fast = optimize(model, tokenizer, options, spare, 1)
        make, results["chosen"] = chosen_speculation(fast)
        print(*results["chosen"]["passes"], sep="\n")
        sides = Sides(fast, tokenizer, options.new_tokens)
        parts["choice"] = lambda: run_choice(sides, make, measured)
        parts["lookup"] = lambda: run_lookup(sides, model, make, measured)
    for name in options.only:
        print(f"{name}:")
        results[name] = parts[name]()
        if isinstance(results[name], dict):
            print("  " + ", ".join(f"{k} {v:.3g}" for k, v in results[name].items() if isinstance(v, float)))
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")


def _drafters(model: Any, tokenizer: Any, options: argparse.Namespace, measured: Any) -> Any:
    fast = gw.optimize(model, target="cpu", passes=["place_cache{cut=kv}", "compile_layers"])
    sides = Sides(fast, tokenizer, options.new_tokens)
    return run_drafters(sides, {name: some[:1] for name, some in measured.items()})


def _batch(
    model: Any, tokenizer: Any, options: argparse.Namespace, spare: list[Conversation], measured: Any
) -> Any:
    fast = optimize(model, tokenizer, options, spare, options.batch)
    chosen, about = chosen_speculation(fast)
    sides = Sides(fast, tokenizer, options.new_tokens)
    if chosen() is None:
        return {"chosen": about, "ratio": 1.0}
    return {"chosen": about, **run_batch(sides, chosen, measured, options.batch)}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--data", type=Path, nargs="+", required=True, help="JSON lines of Spec-Bench or HumanEval"
    )
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--gguf", default=None, help="GGUF file in it")
    parser.add_argument("--prompts", type=int, default=3, help="conversations a category")
    parser.add_argument("--calibration", type=int, default=6, help="other conversations to calibrate on")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args()


if __name__ == "__main__":
    main()
