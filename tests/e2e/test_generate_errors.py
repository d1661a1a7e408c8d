"""generate(): what is refused, and what a failed call leaves behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StoppingCriteria

from graphwright.ir.errors import (
    CapacityError,
    GraphwrightError,
    InputError,
    ProgramBusyError,
    UnsupportedGenerationError,
)
from graphwright.runtime.model import OptimizedModel
from graphwright.runtime.speculation import Speculation, make_drafter
from tests.e2e.fake_program import VOCAB
from tests.e2e.test_generate import Recorder, repetitive

Make = Callable[..., OptimizedModel]
IDS = torch.tensor([repetitive(12)])


def steps_of(fast: OptimizedModel) -> int:
    return int(fast.stats()["prompt_tokens"])


BAD_INPUTS: dict[str, tuple[dict[str, Any], str]] = {
    "empty prompt": ({"inputs": torch.zeros((1, 0), dtype=torch.long)}, "empty"),
    "batch 0": ({"inputs": torch.zeros((0, 4), dtype=torch.long)}, "batch 0"),
    "negative id": ({"inputs": torch.tensor([[3, -1]])}, "outside the vocabulary"),
    "large id": ({"inputs": torch.tensor([[3, VOCAB]])}, "outside the vocabulary"),
    "float ids": ({"inputs": torch.tensor([[3.0, 4.0]])}, "integers"),
    "bool ids": ({"inputs": torch.tensor([[True, False]])}, "integers"),
    "a list": ({"inputs": [[3, 4]]}, "torch.Tensor"),
    "one dimension": ({"inputs": torch.tensor([3, 4])}, r"\[batch, tokens\]"),
    "two prompts": ({"inputs": IDS, "input_ids": IDS}, "both"),
    "mask shape": ({"inputs": IDS, "attention_mask": torch.ones(1, 5)}, "shape"),
    "mask rank": ({"inputs": IDS, "attention_mask": torch.ones(1, 1, 12, 12)}, "shape"),
    "mask hole": ({"inputs": IDS[:, :3], "attention_mask": torch.tensor([[1, 0, 1]])}, "hole"),
    "mask zeros": ({"inputs": IDS[:, :3], "attention_mask": torch.tensor([[0, 0, 0]])}, "all zeros"),
    "mask values": (
        {"inputs": IDS[:, :3], "attention_mask": torch.tensor([[0, 2, 1]])},
        "other than 0 and 1",
    ),
    "wrong device": ({"inputs": IDS.to("meta")}, "program runs on"),
    "mask alone": ({"attention_mask": torch.ones(1, 3)}, "without input_ids"),
    "typo": ({"inputs": IDS, "max_new_token": 3}, "max_new_token"),
    "max_length": ({"inputs": IDS, "max_length": 5}, "max_length"),
    "zero tokens": ({"inputs": IDS, "max_new_tokens": 0}, "max_new_tokens"),
    "stop strings": ({"inputs": IDS, "stop_strings": ["a"]}, "tokenizer"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input(llama: Any, make_fast: Make, name: str) -> None:
    options, message = BAD_INPUTS[name]
    fast = make_fast(llama)
    with pytest.raises(InputError, match=message) as caught:
        fast.generate(**{"max_new_tokens": 4, **options} if name != "max_length" else options)
    assert caught.value.where
    assert steps_of(fast) == 0


def test_no_prompt_and_no_bos(llama: Any, make_fast: Make) -> None:
    fast = make_fast(llama)
    fast.generation_config.bos_token_id = None
    with pytest.raises(InputError, match="no bos"):
        fast.generate(max_new_tokens=3)


@pytest.mark.parametrize("capacity", [None, 40])
def test_too_long(llama: Any, make_fast: Make, capacity: int | None) -> None:
    fast = make_fast(llama, capacity=capacity)
    limit = capacity or 256
    with pytest.raises(CapacityError, match=str(limit)) as caught:
        fast.generate(IDS, max_new_tokens=limit - 11)
    assert f"at most {limit - 12} new tokens" in str(caught.value)
    assert fast.generate(IDS, max_new_tokens=limit - 12).shape[1] == limit
    with pytest.raises(CapacityError):
        fast(torch.randint(2, VOCAB, (1, limit + 1)))
    with pytest.raises(CapacityError):
        fast.score(torch.randint(2, VOCAB, (1, limit + 1)))


def test_padding_does_not_count_against_the_positions(llama: Any, make_fast: Make) -> None:
    ids = torch.cat((torch.zeros((1, 30), dtype=torch.long), IDS), 1)
    mask = (torch.arange(42) >= 30).long()[None]
    assert make_fast(llama, capacity=20).generate(ids, attention_mask=mask, max_new_tokens=8).shape[1] == 50


REFUSED: dict[str, Any] = {
    "num_beams": 2,
    "num_beam_groups": 2,
    "constraints": ["x"],
    "force_words_ids": [[3]],
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 1,
    "assistant_model": object(),
    "assistant_ensemble_weight": 0.5,
    "guidance_scale": 2.0,
    "token_healing": True,
    "use_cache": False,
    "cache_implementation": "static",
    "prefill_chunk_size": 8,
    "output_attentions": True,
    "output_hidden_states": True,
    "past_key_values": DynamicCache(),
    "inputs_embeds": torch.zeros(1, 3, 32),
    "encoder_outputs": (torch.zeros(1, 3, 32),),
    "decoder_input_ids": IDS,
    "negative_prompt_ids": IDS,
    "negative_prompt_attention_mask": torch.ones_like(IDS),
    "custom_generate": "someone/something",
    "trust_remote_code": True,
    "synced_gpus": True,
    "token_type_ids": torch.zeros_like(IDS),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(llama: Any, make_fast: Make, name: str) -> None:
    fast, streamer = make_fast(llama), Recorder()
    with pytest.raises(UnsupportedGenerationError, match=name) as caught:
        fast.generate(IDS, max_new_tokens=3, streamer=streamer, **{name: REFUSED[name]})
    assert caught.value.hint and isinstance(caught.value, NotImplementedError)
    assert streamer.put_values == [] and steps_of(fast) == 0


def test_refused_position_ids(llama: Any, make_fast: Make) -> None:
    fast = make_fast(llama)
    same = torch.arange(12)[None]
    assert torch.equal(
        fast.generate(IDS, position_ids=same, max_new_tokens=3), fast.generate(IDS, max_new_tokens=3)
    )
    with pytest.raises(UnsupportedGenerationError, match="position_ids"):
        fast.generate(IDS, position_ids=same + 1, max_new_tokens=3)


def test_refused_continuous_batching(llama: Any, make_fast: Make) -> None:
    fast = make_fast(llama)
    for call in (
        fast.generate_batch,
        fast.init_continuous_batching,
        fast.continuous_batching_context_manager,
    ):
        with pytest.raises(UnsupportedGenerationError, match="continuous batching"):
            call(inputs=[[3, 4]])
    with pytest.raises(UnsupportedGenerationError):
        fast.load_custom_generate("someone/something")


class After(Recorder):
    """Raises after some tokens."""

    def __init__(self, tokens: int, error: BaseException) -> None:
        super().__init__()
        self.tokens, self.error = tokens, error

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        if len(self.put_values) > self.tokens:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("mine"), MemoryError()], ids=repr)
def test_interrupted_by_a_streamer(llama: Any, make_fast: Make, error: BaseException) -> None:
    fast = make_fast(llama, speculation=Speculation(make_drafter("ngram")))
    with pytest.raises(type(error)) as caught:
        fast.generate(IDS, max_new_tokens=20, streamer=After(5, error))
    assert caught.value is error
    assert torch.equal(fast.generate(IDS, max_new_tokens=20), llama.generate(IDS, max_new_tokens=20))


def test_interrupted_by_a_criterion(llama: Any, make_fast: Make) -> None:
    class Interrupt(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
            raise KeyboardInterrupt

    fast = make_fast(llama)
    with pytest.raises(KeyboardInterrupt):
        fast.generate(IDS, max_new_tokens=20, stopping_criteria=[Interrupt()])
    assert fast.generate(IDS, max_new_tokens=2).shape == (1, 14)


@pytest.mark.parametrize("method", ["step", "prefill", "allocate"])
def test_out_of_memory_in_the_program(llama: Any, make_fast: Make, monkeypatch: Any, method: str) -> None:
    fast = make_fast(llama)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(fast.program, method, fail)
        with pytest.raises(MemoryError):
            fast.generate(IDS, max_new_tokens=20)
    assert torch.equal(fast.generate(IDS, max_new_tokens=20), llama.generate(IDS, max_new_tokens=20))


def test_nested_call_is_refused(llama: Any, make_fast: Make) -> None:
    fast = make_fast(llama)
    other = OptimizedModel(fast.program, config=llama.config, generation_config=llama.generation_config)

    class Nested(Recorder):
        def put(self, value: torch.Tensor) -> None:
            calls = (
                lambda: fast.generate(IDS),
                lambda: fast(IDS),
                lambda: fast.score(IDS),
                lambda: other(IDS),
            )
            for call in calls:
                with pytest.raises(ProgramBusyError):
                    call()
            super().put(value)

    streamer = Nested()
    fast.generate(IDS, max_new_tokens=2, streamer=streamer)
    assert len(streamer.put_values) == 3
    assert fast(IDS).logits.shape == (1, 12, VOCAB)


def test_threads_are_served_one_after_the_other(llama: Any, make_fast: Make) -> None:
    fast = make_fast(llama, speculation=Speculation(make_drafter("ngram", min_ngram=1)))
    prompts = [torch.tensor([repetitive(10 + n, n)]) for n in range(4)]
    spans: list[tuple[float, float]] = []
    results: dict[int, torch.Tensor] = {}

    def work(index: int) -> None:
        streamer = Timed()
        results[index] = fast.generate(prompts[index], max_new_tokens=12, streamer=streamer)
        spans.append((streamer.times[0], streamer.times[-1]))

    class Timed(Recorder):
        def __init__(self) -> None:
            super().__init__()
            self.times: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            self.times.append(time.monotonic())
            time.sleep(0.001)  # give the others a chance to get in between

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, prompt in enumerate(prompts):
        assert torch.equal(results[index], llama.generate(prompt, max_new_tokens=12))
    spans.sort()
    assert all(first[1] < second[0] for first, second in pairwise(spans))


def test_every_error_is_one_family() -> None:
    for error in (InputError, CapacityError, UnsupportedGenerationError, ProgramBusyError):
        assert issubclass(error, GraphwrightError)
