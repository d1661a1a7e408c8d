"""generate(): the same tokens, scores and side effects as stock transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from graphwright.runtime.model import OptimizedModel
from graphwright.runtime.speculation import AdaptiveLength, Speculation, make_drafter
from tests.e2e.fake_program import VOCAB

Make = Callable[..., OptimizedModel]
NEW = 40


def speculation(kind: str) -> Speculation | None:
    if kind == "off":
        return None
    drafter = make_drafter("ngram", max_ngram=3, min_ngram=1, tokens=5)
    return Speculation(drafter, AdaptiveLength() if kind == "adaptive" else None)


def repetitive(tokens: int, seed: int = 3) -> list[int]:
    """A prompt with phrases that recur, so that lookup finds something."""
    generator = torch.Generator().manual_seed(seed)
    phrase = torch.randint(2, VOCAB, (6,), generator=generator).tolist()
    return [phrase[i % 6] if i % 7 else 2 + i % 59 for i in range(tokens)]


def padded(rows: list[list[int]], side: str) -> dict[str, torch.Tensor]:
    width = max(len(row) for row in rows)
    fill = [[0] * (width - len(row)) for row in rows]
    left = side == "left"
    ids = [f + row if left else row + f for row, f in zip(rows, fill, strict=True)]
    ones = [[1] * len(row) for row in rows]
    mask = [f + one if left else one + f for one, f in zip(ones, fill, strict=True)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


RAGGED = [repetitive(n, seed) for n, seed in ((19, 1), (7, 2), (12, 3), (1, 4))]


class Recorder(BaseStreamer):
    """Keeps what a streamer is given."""

    def __init__(self) -> None:
        self.put_values: list[torch.Tensor] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.put_values.append(value)

    def end(self) -> None:
        self.ended += 1


@pytest.fixture(params=["off", "ngram", "adaptive"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_greedy_batch_1(stock: Any, make_fast: Make, mode: str) -> None:
    ids = torch.tensor([repetitive(20)])
    fast = make_fast(stock, speculation=speculation(mode))
    assert torch.equal(fast.generate(ids, max_new_tokens=NEW), stock.generate(ids, max_new_tokens=NEW))
    assert fast.stats()["last"]["tokens"] == NEW


def test_greedy_left_padded_batch(stock: Any, make_fast: Make, mode: str) -> None:
    inputs = padded(RAGGED, "left")
    fast = make_fast(stock, speculation=speculation(mode))
    want = stock.generate(**inputs, max_new_tokens=NEW)
    assert torch.equal(fast.generate(**inputs, max_new_tokens=NEW), want)


def test_greedy_right_padded_batch_equals_each_row_alone(stock: Any, make_fast: Make, mode: str) -> None:
    inputs = padded(RAGGED, "right")
    got = make_fast(stock, speculation=speculation(mode)).generate(**inputs, max_new_tokens=NEW)
    width = inputs["input_ids"].shape[1]
    assert torch.equal(got[:, :width], inputs["input_ids"])
    for row, prompt in enumerate(RAGGED):
        ids = torch.tensor([prompt])
        alone = stock.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW)
        assert got[row, width:].tolist() == alone[0, len(prompt) :].tolist()


def test_mask_is_inferred_from_the_pad_token(llama: Any, make_fast: Make) -> None:
    inputs = padded(RAGGED, "left")
    got = make_fast(llama).generate(inputs["input_ids"], max_new_tokens=8)
    assert torch.equal(got, llama.generate(inputs["input_ids"], max_new_tokens=8))


def test_speculation_saves_steps(llama: Any, make_fast: Make) -> None:
    ids = torch.tensor([repetitive(20)])
    fast = make_fast(llama, speculation=speculation("ngram"))
    out = fast.generate(ids, max_new_tokens=40, logits_processor=LogitsProcessorList([Cycle()]))
    stats = fast.stats()["last"]
    assert out[0, 20:26].tolist() == [5, 6, 7, 5, 6, 7]
    assert stats["cycles"] < 15 and stats["tokens"] == 40
    assert stats["accepted"] == sum(stats["accepted_per_position"]) > 25
    assert stats["tokens"] == 1 + stats["cycles"] + stats["accepted"]


class Cycle(LogitsProcessor):
    """Forces the text 5 6 7 5 6 7 ..., and checks that it is called once for every token, in order."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.lengths.append(input_ids.shape[1])
        forced = torch.full_like(scores, -1e9)
        last = int(input_ids[0, -1])
        forced[:, {5: 6, 6: 7}.get(last, 5)] = 0.0
        return forced


def test_stateful_processor_sees_every_step_once_at_batch_1(llama: Any, make_fast: Make) -> None:
    fast, cycle = make_fast(llama, speculation=speculation("ngram")), Cycle()
    fast.generate(torch.tensor([repetitive(20)]), max_new_tokens=30, logits_processor=[cycle])
    assert cycle.lengths == list(range(20, 50))
    assert fast.stats()["last"]["cycles"] < 29


def test_stateful_processor_turns_speculation_off_in_a_batch(llama: Any, make_fast: Make) -> None:
    fast, cycle = make_fast(llama, speculation=speculation("ngram")), Cycle()
    inputs = padded(RAGGED, "left")
    out = fast.generate(**inputs, max_new_tokens=10, logits_processor=[cycle])
    assert torch.equal(out, llama.generate(**inputs, max_new_tokens=10, logits_processor=[Cycle()]))
    assert cycle.lengths == list(range(19, 29))
    assert "Cycle" in fast.stats()["last"]["speculation_off"]
    assert fast.stats()["last"]["draft_tokens"] == 0


PROCESSORS: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.4},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "min_new_tokens": {"min_new_tokens": 20, "eos_token_id": 9},
    "forced_eos": {"forced_eos_token_id": 9, "eos_token_id": 9},
    "decay": {"exponential_decay_length_penalty": (5, 1.2), "eos_token_id": [9, 10]},
    "bad_words": {"bad_words_ids": [[25], [30]]},
    "suppress": {"suppress_tokens": [7, 9], "begin_suppress_tokens": [59, 60]},
    "encoder_penalty": {"encoder_repetition_penalty": 1.3, "encoder_no_repeat_ngram_size": 2},
    "bias": {"sequence_bias": {(9,): 3.0}},
    "watermark": {"watermarking_config": {"bias": 3.0}},
    "prefix": {"prefix_allowed_tokens_fn": lambda row, ids: [4 + row, 5, 6, 7 + len(ids) % 5]},
}


@pytest.mark.parametrize("mode", ["off", "ngram"])
@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("rows", [RAGGED[:1], RAGGED], ids=["one", "ragged"])
def test_processors_are_exact(
    llama: Any, make_fast: Make, mode: str, name: str, rows: list[list[int]]
) -> None:
    inputs, options = padded(rows, "left"), {"max_new_tokens": 28, "pad_token_id": 0, **PROCESSORS[name]}
    fast = make_fast(llama, speculation=speculation(mode))
    assert torch.equal(fast.generate(**inputs, **options), llama.generate(**inputs, **options))


SAMPLING: dict[str, dict[str, Any]] = {
    "plain": {"top_k": 0},
    "temperature": {"temperature": 0.6, "top_k": 0},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.7, "top_k": 0},
    "min_p": {"min_p": 0.1},
    "typical": {"typical_p": 0.6},
    "penalty": {"repetition_penalty": 1.3, "temperature": 0.8},
    "eta": {"eta_cutoff": 1e-2, "epsilon_cutoff": 1e-2},
}


@pytest.mark.parametrize("name", SAMPLING)
def test_sampling_gives_stock_tokens_for_a_seed(llama: Any, make_fast: Make, name: str) -> None:
    inputs = padded(RAGGED, "left")
    options = {"max_new_tokens": 24, "do_sample": True, "eos_token_id": [9, 30], "pad_token_id": 0}
    options |= SAMPLING[name]
    torch.manual_seed(11)
    want = llama.generate(**inputs, **options)
    torch.manual_seed(11)
    assert torch.equal(make_fast(llama).generate(**inputs, **options), want)


@pytest.mark.parametrize("name", ["temperature", "top_k", "penalty"])
def test_sampling_one_row_with_speculation_gives_stock_tokens(llama: Any, make_fast: Make, name: str) -> None:
    ids = torch.tensor([repetitive(20)])
    options = {"max_new_tokens": 60, "do_sample": True, **SAMPLING[name], "temperature": 0.3}
    torch.manual_seed(5)
    want = llama.generate(ids, **options)
    fast = make_fast(llama, speculation=speculation("ngram"))
    torch.manual_seed(5)
    assert torch.equal(fast.generate(ids, **options), want)
    assert fast.stats()["last"]["draft_tokens"] > 0


def test_sampling_batch_with_speculation_is_reproducible(llama: Any, make_fast: Make) -> None:
    inputs, options = padded(RAGGED, "left"), {"max_new_tokens": 30, "do_sample": True, "temperature": 0.5}
    fast = make_fast(llama, speculation=speculation("ngram"))
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(fast.generate(**inputs, **options))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "top_k": 0, "temperature": 0.7}, {"repetition_penalty": 1.2}]
)
def test_scores_and_logits_equal_stock(
    llama: Any, make_fast: Make, mode: str, options: dict[str, Any]
) -> None:
    ids = torch.tensor([repetitive(20)])
    wants = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    wants["max_new_tokens"] = 24
    torch.manual_seed(3)
    want = llama.generate(ids, **wants, **options)
    torch.manual_seed(3)
    got = make_fast(llama, speculation=speculation(mode)).generate(ids, **wants, **options)
    assert type(got) is type(want) and torch.equal(got.sequences, want.sequences)
    assert len(got.scores) == len(got.logits) == 24 and got.scores[0].dtype == torch.float32
    torch.testing.assert_close(torch.stack(got.scores), torch.stack(want.scores), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=1e-4, atol=1e-4)


def test_scores_of_a_ragged_batch(llama: Any, make_fast: Make, mode: str) -> None:
    inputs = padded(RAGGED, "left")
    wants = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 30, "eos_token_id": 9}
    want = llama.generate(**inputs, **wants)
    fast = make_fast(llama, speculation=speculation(mode))
    got = fast.generate(**inputs, **wants)
    assert torch.equal(got.sequences, want.sequences) and got.logits is None
    assert len(got.scores) == len(want.scores)
    new = got.sequences[:, inputs["input_ids"].shape[1] :]
    for row in range(4):
        ends = (new[row] == 9).nonzero()
        end = int(ends[0]) + 1 if len(ends) else new.shape[1]
        for step, (mine, theirs) in enumerate(zip(got.scores, want.scores, strict=True)):
            expected = theirs[row] if step < end else torch.zeros(VOCAB)
            torch.testing.assert_close(mine[row], expected, rtol=1e-4, atol=1e-4)
    transitions = fast.compute_transition_scores(got.sequences, got.scores, normalize_logits=True)
    assert torch.isfinite(transitions).all()


@pytest.mark.parametrize("eos", [9, [9, 25], [30, 7, 59]])
def test_eos_ends_rows_and_pads_them(stock: Any, make_fast: Make, mode: str, eos: Any) -> None:
    inputs = padded(RAGGED, "left")
    fast = make_fast(stock, speculation=speculation(mode))
    options = {"max_new_tokens": NEW, "eos_token_id": eos, "pad_token_id": 3}
    assert torch.equal(fast.generate(**inputs, **options), stock.generate(**inputs, **options))


def test_finished_rows_cost_nothing(llama: Any, make_fast: Make) -> None:
    inputs = padded(RAGGED, "left")
    fast = make_fast(llama)
    out = fast.generate(**inputs, max_new_tokens=NEW, eos_token_id=[9, 25], pad_token_id=0)
    new = out[:, inputs["input_ids"].shape[1] :]
    tokens = sum(next((i + 1 for i, t in enumerate(row) if t in (9, 25)), len(row)) for row in new.tolist())
    stats = fast.stats()["last"]
    assert stats["tokens"] == tokens < 4 * NEW
    assert stats["row_steps"] == tokens - 4  # the first token of each row comes from the prompt


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 1},
        {"max_length": 25},
        {"max_new_tokens": 5, "max_length": 90},
        {"max_time": 0.0},
        {},
    ],
)
def test_lengths_are_exact(llama: Any, make_fast: Make, mode: str, options: dict[str, Any]) -> None:
    ids = torch.tensor([repetitive(20)])
    got = make_fast(llama, speculation=speculation(mode)).generate(ids, **options)
    assert torch.equal(got, llama.generate(ids, **options))


def test_generation_config_object_and_defaults(llama: Any, make_fast: Make) -> None:
    ids = torch.tensor([repetitive(20)])
    config = GenerationConfig(max_new_tokens=9, repetition_penalty=1.2, pad_token_id=0)
    fast = make_fast(llama)
    assert torch.equal(fast.generate(ids, config), llama.generate(ids, config))
    fast.generation_config.max_new_tokens = 4
    assert fast.generate(ids).shape[1] == 24
    assert llama.generation_config.max_new_tokens is None, "the caller's model must not change"


def test_prompt_defaults_to_bos(llama: Any, make_fast: Make) -> None:
    assert torch.equal(make_fast(llama).generate(max_new_tokens=5), llama.generate(max_new_tokens=5))


def test_num_return_sequences(llama: Any, make_fast: Make) -> None:
    inputs = padded(RAGGED[:2], "left")
    options = {"num_return_sequences": 3, "do_sample": True, "max_new_tokens": 8}
    torch.manual_seed(2)
    want = llama.generate(**inputs, **options)
    torch.manual_seed(2)
    got = make_fast(llama).generate(**inputs, **options)
    assert got.shape[0] == 6 and torch.equal(got, want)


class StopAt(StoppingCriteria):
    """Stops rows whose last token is in a set; records what it was shown."""

    def __init__(self, tokens: set[int]) -> None:
        self.tokens, self.seen = tokens, []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.seen.append(input_ids)
        return torch.tensor([int(row[-1]) in self.tokens for row in input_ids])


@pytest.mark.parametrize("eos", [None, 9])
def test_criteria_see_one_step_at_a_time(llama: Any, make_fast: Make, mode: str, eos: int | None) -> None:
    inputs = padded(RAGGED, "left")
    options = {"max_new_tokens": NEW, "eos_token_id": eos, "pad_token_id": 0}
    mine, theirs = StopAt({25, 30}), StopAt({25, 30})
    got = make_fast(llama, speculation=speculation(mode)).generate(
        **inputs, **options, stopping_criteria=StoppingCriteriaList([mine])
    )
    want = llama.generate(**inputs, **options, stopping_criteria=StoppingCriteriaList([theirs]))
    assert torch.equal(got, want)
    assert len(mine.seen) == len(theirs.seen)
    assert all(torch.equal(a, b) for a, b in zip(mine.seen, theirs.seen, strict=True))


def test_streamer_gets_one_token_at_a_time(llama: Any, make_fast: Make, mode: str) -> None:
    ids = torch.tensor([repetitive(20)])
    mine, theirs = Recorder(), Recorder()
    options = {"max_new_tokens": 40, "eos_token_id": 27, "pad_token_id": 0}
    make_fast(llama, speculation=speculation(mode)).generate(ids, streamer=mine, **options)
    llama.generate(ids, streamer=theirs, **options)
    assert mine.ended == theirs.ended == 1
    assert [value.tolist() for value in mine.put_values] == [value.tolist() for value in theirs.put_values]


def test_stats_accumulate(llama: Any, make_fast: Make) -> None:
    fast = make_fast(llama, speculation=speculation("ngram"))
    ids = torch.tensor([repetitive(20)])
    fast.generate(ids, max_new_tokens=7)
    fast.generate(ids, max_new_tokens=5)
    stats = fast.stats()
    assert (stats["calls"], stats["tokens"], stats["prompt_tokens"]) == (2, 12, 40)
    assert stats["last"]["tokens"] == 5
    assert stats["drafts"] == stats["by_drafter"].get("ngram", {"drafts": 0})["drafts"]


def test_narrow_steps_limit_the_draft(llama: Any, make_fast: Make) -> None:
    fast = make_fast(llama, speculation=Speculation(make_drafter("ngram", tokens=30, min_ngram=1)))
    fast.program.max_step_tokens = 4
    ids = torch.tensor([repetitive(20)])
    try:
        assert torch.equal(fast.generate(ids, max_new_tokens=30), llama.generate(ids, max_new_tokens=30))
    finally:
        fast.program.max_step_tokens = 64
