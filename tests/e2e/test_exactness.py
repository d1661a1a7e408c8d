"""Exact by default: the program's greedy tokens are the stock model's, token for token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graphwright as gw
from graphwright.runtime.speculation import make_speculation
from tests.architectures import ARCHITECTURES, tiny_model

TOKENS = 64
LENGTHS = (30, 17, 9, 24)
PASSES = ["place_cache", "speculate{drafter=ngram}"]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request: pytest.FixtureRequest) -> tuple[Any, gw.OptimizedModel]:
    """A stock model in float32 and its program, which can speculate."""
    model = tiny_model(request.param)
    return model, gw.optimize(model, "cpu", passes=PASSES)


def ragged_prompts(vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Four left-padded prompts ``[4, 30]`` with repetitions, so that drafts are accepted, and their mask."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.zeros((len(LENGTHS), max(LENGTHS)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        pattern = torch.randint(3, vocabulary, (5,), generator=generator)
        ids[row, -length:] = pattern.repeat(length // 5 + 1)[:length]
        mask[row, -length:] = 1
    return ids, mask


@pytest.mark.parametrize("speculate", [False, True], ids=["plain", "speculative"])
@pytest.mark.parametrize("rows", [1, 4])
def test_greedy_tokens_are_identical(pair: tuple[Any, gw.OptimizedModel], rows: int, speculate: bool) -> None:
    """In float32, for every architecture, alone and in a ragged batch, with and without speculation."""
    model, fast = pair
    ids, mask = ragged_prompts(model.config.get_text_config().vocab_size)
    ids, mask = ids[:rows], mask[:rows]
    options = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, attention_mask=mask, **options)
    drafter = fast.speculation
    try:
        fast.speculation = drafter if speculate else None
        actual = fast.generate(ids, attention_mask=mask, **options)
    finally:
        fast.speculation = drafter
    assert torch.equal(actual, expected)
    if speculate:
        assert fast.report.speculation is not None
        assert fast.report.speculation["draft_tokens"] > 0


def test_bfloat16_bits_do_not_depend_on_the_step() -> None:
    """Logits of one token are the same bits alone and inside steps of 2, 8 and 17 tokens, compiled."""
    model = tiny_model("llama", torch.bfloat16)
    fast = gw.optimize(model, "cpu", passes=["place_cache", "compile_layers"])
    program = fast.program
    ids = torch.randint(3, program.vocab_size, (1, 60), generator=torch.Generator().manual_seed(0))
    one = torch.tensor([1])

    def prefilled() -> Any:
        state = program.allocate(1, 64)
        program.prefill(state, ids[:, :40], torch.tensor([40]))
        return state

    alone = prefilled()
    singly = []
    for column in range(40, 57):
        singly.append(program.step(alone, ids[:, column : column + 1], one))
        alone.commit(one)
    for width in (2, 8, 17):
        together = program.step(prefilled(), ids[:, 40 : 40 + width], torch.tensor([width]))
        assert torch.equal(together, torch.cat(singly[:width], dim=1))


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe", "gpt_oss"])
def test_bfloat16_tokens_do_not_depend_on_speculation(architecture: str) -> None:
    """In bfloat16, greedy tokens with and without drafts are identical, alone and in a ragged batch."""
    model = tiny_model(architecture, torch.bfloat16)
    fast = gw.optimize(model, "cpu", passes=["place_cache"])
    drafts = {"drafter": "ngram", "tokens": 8, "tree": "chain", "rule": "fixed"}
    for rows in (1, 4):
        ids, mask = ragged_prompts(fast.program.vocab_size)
        options = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        fast.speculation = None
        plain = fast.generate(ids[:rows], attention_mask=mask[:rows], **options)
        fast.speculation = make_speculation(drafts)
        speculative = fast.generate(ids[:rows], attention_mask=mask[:rows], **options)
        assert torch.equal(plain, speculative)
    assert fast.stats()["accepted"] > 0


def test_the_callers_model_is_not_changed() -> None:
    """Neither its tensors, nor its configuration, nor its modules."""
    model = tiny_model("llama").train()
    tensors = {name: (t, t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    config = model.config.to_dict()
    attention = model.config._attn_implementation
    gw.optimize(model, "cpu", passes=["place_cache"])
    assert model.training
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == attention
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is tensors[name][0]
        assert torch.equal(tensor, tensors[name][1])


def test_without_passes_the_program_recomputes_and_agrees() -> None:
    """``passes=[]`` means none: no cache, the same tokens."""
    model = tiny_model("gpt2")
    fast = gw.optimize(model, "cpu", passes=[])
    ids, mask = ragged_prompts(model.config.vocab_size)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(fast.generate(ids, attention_mask=mask, **options), expected)
    assert fast.plan.passes == ()
