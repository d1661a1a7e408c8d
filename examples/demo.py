"""SmolLM2-135M-Instruct on this CPU, stock and optimized side by side (`make demo`)."""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import graphwright as gw

PROMPTS = (
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that reverses a string, with a docstring.",
    "Repeat this list, sorted by name: pear, apple, fig, cherry, banana, date.",
)
RUNS = 2  # of each side in turn; the faster one counts, so that a busy moment of the machine does not


@dataclass(frozen=True)
class Answer:
    """What one side generated, and how fast (prompt included)."""

    tokens: list[int]
    seconds: float

    @property
    def speed(self) -> float:
        """Generated tokens per second."""
        return len(self.tokens) / self.seconds


def answer(model: Any, inputs: dict[str, torch.Tensor], count: int) -> Answer:
    """Generate greedily and time it."""
    started = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=count, do_sample=False)
    seconds = time.perf_counter() - started
    return Answer(output[0, inputs["input_ids"].shape[1] :].tolist(), seconds)


def compare(console: Console, tokenizer: Any, prompt: str, stock: Answer, fast: Answer) -> None:
    """Print both answers beside each other."""
    same = "identical tokens" if stock.tokens == fast.tokens else "other tokens (bfloat16 rounds differently)"
    title = f"{prompt}\n{fast.speed / stock.speed:.1f}x, {same}"
    table = Table(title=title, title_justify="left", expand=True)
    for name, side in (("stock transformers", stock), ("graphwright", fast)):
        table.add_column(f"{name}: {side.speed:.0f} tokens/s", ratio=1)
    texts = (tokenizer.decode(side.tokens, skip_special_tokens=True) for side in (stock, fast))
    table.add_row(*(Text(text.strip()) for text in texts))
    console.print(table)


def main() -> None:
    """Load, optimize, generate on three prompts, print the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder with the GGUF file")
    parser.add_argument("--gguf", required=True, help="name of the GGUF file in it")
    parser.add_argument("--generate", type=int, default=64, help="tokens per prompt")
    options = parser.parse_args()
    _hush_loading()
    console = Console()

    console.print("loading SmolLM2-135M-Instruct (the GGUF weights are unpacked to bfloat16)")
    tokenizer = AutoTokenizer.from_pretrained(options.model, gguf_file=options.gguf)
    model = AutoModelForCausalLM.from_pretrained(options.model, gguf_file=options.gguf, dtype=torch.bfloat16)
    model.eval()

    console.print("optimizing; the first run also builds the C++ kernels, later ones reuse them")
    started = time.perf_counter()
    fast = gw.optimize(model, target="cpu", workload=gw.Workload(prompt=256, generate=options.generate))
    console.print(f"optimized in {time.perf_counter() - started:.1f} s\n")

    for number, prompt in enumerate(PROMPTS):
        chat = [{"role": "user", "content": prompt}]
        inputs = dict(
            tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        )
        if number == 0:  # neither side pays its first call in the figures
            for side in (model, fast):
                answer(side, inputs, 4)
        runs = [[answer(side, inputs, options.generate) for side in (model, fast)] for _ in range(RUNS)]
        stock, quick = (min(side, key=lambda run: run.seconds) for side in zip(*runs, strict=True))
        compare(console, tokenizer, prompt, stock, quick)

    console.print()
    console.print(fast.report)


def _hush_loading() -> None:
    """Warnings of the libraries about GGUF and generation defaults would drown the comparison."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("gguf").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="transformers")


if __name__ == "__main__":
    main()
