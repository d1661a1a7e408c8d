"""How often a program without some of its layers drafts what all of it writes, by how many are left out.

Layers are chosen in three ways: those in the middle; those that turn the residual stream least (angular
distance, on prose); and one by one, always the one whose absence changes fewest predictions of prose. The
drafters that choose while they generate follow. Each drafts chains of a fixed length below the same greedy
text; that the text is the same is checked. Acceptance does not depend on the machine; the cost of a draft
step relative to a plain one is the ratio of the least of many times, taken in turn.

    python benchmarks/self_drafting.py --model .cache/models/smollm2-135m-instruct \\
        --gguf SmolLM2-135M-Instruct.Q4_1.gguf --json benchmarks/results/self_drafting.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import load_model, load_tokenizer, machine, prose

import graphwright as gw
from graphwright.runtime.program import Program
from graphwright.runtime.residual import ResidualStream
from graphwright.runtime.speculation import make_speculation
from graphwright.runtime.speculation.skip_calibration import calibrate_skips

COUNTS = (1, 2, 4, 6, 8, 10, 12, 15)
#: Calibration tries every layer for every one left out.
CALIBRATED = (1, 2, 4, 6, 8)
SEARCHING = ("swift", "clasp(share=0.1)", "clasp", "del")
#: Tokens of a prompt, and texts that layers are chosen on, of at most 64 tokens.
PROMPT, CALIBRATION_TEXTS = 64, 2
STEPS_TIMED = 30


class Bench:
    """A program, prompts, and what it writes below them."""

    def __init__(self, fast: Any, prompts: Sequence[torch.Tensor], new_tokens: int, length: int) -> None:
        self.fast, self.prompts, self.new_tokens, self.length = fast, prompts, new_tokens, length
        self.wanted = [self._generate(prompt) for prompt in prompts]

    @property
    def program(self) -> Program:
        """The program that drafts and verifies."""
        program: Program = self.fast.program
        return program

    def _generate(self, prompt: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fast.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=self.new_tokens, do_sample=False
        )
        return out

    def acceptance(self, drafter: str) -> dict[str, Any]:
        """What became of a drafter's chains."""
        self.fast.speculation = make_speculation(
            {"drafter": drafter, "tokens": self.length, "rule": f"fixed(tokens={self.length})"}
        )
        drafts = drafted = accepted = 0
        by_place = [0] * self.length
        for prompt, wanted in zip(self.prompts, self.wanted, strict=True):
            if not torch.equal(self._generate(prompt), wanted):
                raise SystemExit(f"{drafter} changed the text")
            last = self.fast.stats()["last"]
            drafts, drafted = drafts + last["drafts"], drafted + last["draft_tokens"]
            accepted += last["accepted"]
            for place, count in enumerate(last["accepted_per_position"]):
                by_place[place] += count
        self.fast.speculation = None
        return {
            "drafter": drafter,
            "accepted_share": accepted / max(drafted, 1),
            "first_token": by_place[0] / max(drafts, 1),
            "tokens_per_draft": 1 + accepted / max(drafts, 1),
        }

    def step_cost(self, skip: frozenset[int]) -> float:
        """Time of a one-token step without these layers, relative to a plain one."""
        state = self.program.allocate(1, 256)
        state.pretend(128)
        token, one = self.prompts[0][:, :1], torch.ones(1, dtype=torch.int64)
        times: dict[bool, float] = {}
        for _ in range(STEPS_TIMED):
            for whole in (True, False):
                started = time.perf_counter()
                self.program.step(state, token, one, skip=frozenset() if whole else skip)
                times[whole] = min(times.get(whole, 1e9), time.perf_counter() - started)
        return times[False] / times[True]


def angular_order(program: Program, ids: torch.Tensor) -> list[int]:
    """Layers by how little they turn the residual stream of a text ``[1, T]``."""
    stream = ResidualStream()
    state = program.allocate(1, ids.shape[1])
    program.step(state, ids, torch.tensor([ids.shape[1]]), visit=stream)
    pairs = zip(stream.kept, stream.kept[1:], strict=False)
    cosines = [torch.cosine_similarity(a.float(), b.float(), dim=-1).clamp(-1, 1) for a, b in pairs]
    angles = [float(torch.arccos(cosine).mean()) for cosine in cosines]
    layers = list(program.lowered.blocks.found)
    return [layer for _, layer in sorted(zip(angles, layers, strict=True))]


def fixed_sets(bench: Bench, texts: torch.Tensor) -> list[tuple[str, frozenset[int]]]:
    """Sets of layers by the way they were chosen."""
    program = bench.program
    layers = list(program.lowered.blocks.found)
    order = angular_order(program, texts[:1])
    found = []
    for count in COUNTS:
        start = (len(layers) - count) // 2
        found.append(("middle", frozenset(layers[start : start + count])))
        found.append(("angular", frozenset(order[:count])))
    (domain,) = calibrate_skips(program, {"prose": texts.tolist()}, max(CALIBRATED))
    found += [("calibrated", frozenset(domain.skip[:count])) for count in CALIBRATED]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--gguf", help="file in that folder, if the weights are in this format")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens below each prompt")
    parser.add_argument("--length", type=int, default=4, help="tokens of a draft")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.model, args.gguf)
    needed = (CALIBRATION_TEXTS + args.prompts) * PROMPT
    pieces = prose(tokenizer, needed).view(-1, PROMPT)
    texts, prompts = pieces[:CALIBRATION_TEXTS], pieces[CALIBRATION_TEXTS:]
    fast = gw.optimize(load_model(args.model, args.gguf), passes=["place_cache"])
    bench = Bench(fast, [prompt[None] for prompt in prompts], args.tokens, args.length)

    rows: list[dict[str, Any]] = []
    for way, skip in fixed_sets(bench, texts):
        row = bench.acceptance(f"skip(layers={'+'.join(map(str, sorted(skip)))})")
        rows.append({"chosen": way, "count": len(skip), **row, "step_cost": bench.step_cost(skip)})
        show(rows[-1])
    for drafter in SEARCHING:
        rows.append({"chosen": drafter, "count": None, **bench.acceptance(drafter), "step_cost": None})
        show(rows[-1])
    if args.json is not None:
        settings = {"prompts": args.prompts, "tokens": args.tokens, "length": args.length}
        result = {"machine": machine(), "settings": settings, "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    cost = "" if row["step_cost"] is None else f"  step {row['step_cost']:.2f}"
    print(
        f"{row['chosen']:18s} {row['count'] or '':>3}  first token {row['first_token']:.2f}  accepted "
        f"{row['accepted_share']:.2f}  {row['tokens_per_draft']:.2f} tokens a draft{cost}",
        flush=True,
    )


if __name__ == "__main__":
    main()
