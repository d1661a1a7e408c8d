"""A real model: SmolLM2-135M-Instruct, in float32, against stock on twenty prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import graphwright as gw
from graphwright.runtime.speculation import make_speculation
from tests.conftest import MODEL_FILE

PROMPTS = (
    "The capital of France is",
    "Water boils at",
    "def fibonacci(n):",
    "Once upon a time, in a land far away,",
    "The three primary colours are",
    "Repeat after me: one two three. One two three. One two",
    "In 1969, two astronauts",
    "A recipe for pancakes: first,",
    "The opposite of hot is",
    "import numpy as np\nx = np.",
    "Photosynthesis is the process by which",
    "Dear Sir or Madam,",
    "Roses are red, violets are",
    "The quick brown fox jumps over the lazy dog. The quick brown fox",
    "To be, or not to be,",
    "The square root of 144 is",
    "Monday, Tuesday, Wednesday,",
    "She opened the door and saw",
    "<html>\n<head>\n<title>",
    "The largest planet in the solar system",
)
TOKENS = 24


@pytest.fixture(scope="module")
def smollm2(demo_model_dir: Path) -> tuple[Any, Any, gw.OptimizedModel]:
    """Stock model, tokenizer, and the program that the planner chooses plus n-gram drafts."""
    options = {"gguf_file": MODEL_FILE, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(
        demo_model_dir, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **options
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(demo_model_dir, **options)
    fast = gw.optimize(model, "cpu", workload=gw.Workload(prompt=32, generate=TOKENS))
    return model, tokenizer, fast


def test_twenty_prompts_are_identical(smollm2: tuple[Any, Any, gw.OptimizedModel]) -> None:
    """Greedy tokens equal stock's on every prompt, with and without speculation."""
    model, tokenizer, fast = smollm2
    options = {"max_new_tokens": TOKENS, "do_sample": False}
    drafts = {"drafter": "ngram", "tokens": 6, "tree": "chain", "rule": "fixed"}
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        expected = model.generate(**inputs, **options)
        fast.speculation = None
        assert torch.equal(fast.generate(**inputs, **options), expected), prompt
        fast.speculation = make_speculation(drafts)
        assert torch.equal(fast.generate(**inputs, **options), expected), prompt
    assert fast.stats()["accepted"] > 0


def test_the_report_says_what_was_measured(smollm2: tuple[Any, Any, gw.OptimizedModel]) -> None:
    """Logits agree with stock's, and one layer was compiled for all thirty."""
    _, _, fast = smollm2
    quality = fast.report.measured["quality"]
    assert quality["relative_logit_difference"] < 1e-4
    assert quality["top1_agreement"] == 1.0
    if fast.program.lowered.compiled:
        assert fast.program.lowered.structures == (3, 32)
    memory = fast.memory()
    assert memory["weights"] == sum(
        t.untyped_storage().nbytes()
        for t in {t.untyped_storage().data_ptr(): t for t in fast.graph.parameters.values()}.values()
    )
