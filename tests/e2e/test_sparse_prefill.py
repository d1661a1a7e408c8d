"""Programs with masked and chunked prompts: what stays exact, and what is close."""

from __future__ import annotations

import pytest
import torch

from graphwright.runtime.model import OptimizedModel
from tests.architectures import tiny_model
from tests.e2e.packed_programs import PackedModel, drafting, random_text, repetitive_prompts

KV = "place_cache{cut=kv}"
EVERYTHING = "chunked(block=16, chunk=32, keep=1.0)"
MASKS = (
    "a_shape(block=16, sinks=16, recent=32)",
    "vertical_slash(block=16, verticals=32, slashes=32)",
    "chunked(block=16, chunk=32, keep=0.2)",
)
LENGTHS = (300, 130, 50)
OPTIONS = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def tiny() -> PackedModel:
    return PackedModel(tiny_model("llama", max_position_embeddings=512))


def sparse(mask: str) -> str:
    return f"sparsify_prefill{{mask={mask}}}"


def prompts(fast: OptimizedModel) -> torch.Tensor:
    """Logits ``[B, V]`` after ragged prompts."""
    ids, counts = random_text(len(LENGTHS), max(LENGTHS)), torch.tensor(LENGTHS)
    state = fast.program.allocate(len(LENGTHS), max(LENGTHS) + 16)
    return fast.program.prefill(state, ids, counts)


def generated(fast: OptimizedModel, speculate: bool = False) -> torch.Tensor:
    ids, mask = repetitive_prompts(LENGTHS)
    fast.speculation = drafting() if speculate else None
    return fast.generate(ids, attention_mask=mask, **OPTIONS)


def test_a_mask_that_keeps_everything_gives_dense_logits(tiny: PackedModel) -> None:
    dense, masked = tiny.program([KV]), tiny.program([KV, sparse(EVERYTHING)])
    assert (prompts(dense) - prompts(masked)).abs().max() < 1e-5
    assert torch.equal(generated(dense), generated(masked))


@pytest.mark.parametrize("mask", MASKS)
def test_masks_change_long_rows_only_and_drafts_change_nothing(mask: str, tiny: PackedModel) -> None:
    dense, masked = prompts(tiny.program([KV])), tiny.program([KV, sparse(mask)])
    found = prompts(masked)
    assert torch.equal(found[2], dense[2])  # a prompt of 50 tokens, in a step of 300
    assert ((found - dense)[:2].abs().amax(1) > 1e-4).all()
    assert torch.equal(generated(masked), generated(masked, speculate=True))
    uses = {use.op: use for use in masked.program.lowered.kernels}
    assert uses["prefill_attention"].provider == "blocks" and uses["prefill_attention"].sites == 2
    assert "op by op" in uses["prefill_attention"].reason
    assert uses["cache_attention"].provider == "cpp"


def test_steps_of_few_tokens_are_those_of_a_dense_program(tiny: PackedModel) -> None:
    """Bit for bit, at every length up to 64, over a cache that was filled densely."""
    ids = random_text(2, 200)
    logits = []
    for passes in ([KV], [KV, sparse(MASKS[0])]):
        program = tiny.program(passes).program
        state = program.allocate(2, 200)
        for tokens in (64, 1, 33, 64):
            start = int(state.lengths[0])
            step = ids[:, start : start + tokens]
            counts = torch.tensor([tokens, tokens])
            logits.append(program.step(state, step, counts))
            state.commit(counts)
    half = len(logits) // 2
    assert all(torch.equal(a, b) for a, b in zip(logits[:half], logits[half:], strict=True))


def test_pages_and_masks_compose(tiny: PackedModel) -> None:
    """Decode steps select pages, prompts run under the mask."""
    both = tiny.program([KV, "sparsify_attention{keep=1.0}", sparse(MASKS[0])])
    assert torch.equal(generated(both), generated(tiny.program([KV, sparse(MASKS[0])])))


@pytest.mark.parametrize("tokens", [64, 112])
def test_smaller_steps_give_the_same_text(tokens: int, tiny: PackedModel) -> None:
    whole, small = tiny.program([KV]), tiny.program([KV, f"chunk_prefill{{tokens={tokens}}}"])
    assert (prompts(whole) - prompts(small)).abs().max() < 1e-5
    assert torch.equal(generated(whole), generated(small))
    widths = []
    run = small.program._run_step

    def watched(stores, lengths, given):  # type: ignore[no-untyped-def]
        widths.append(given.tokens.shape[1])
        return run(stores, lengths, given)

    small.program._run_step = watched  # type: ignore[method-assign]
    prompts(small)
    assert widths == [tokens] * (300 // tokens) + [300 % tokens]
