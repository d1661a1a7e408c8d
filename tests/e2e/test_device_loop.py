"""The loop that does not wait for its tokens gives what the one gives that does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, TemperatureLogitsWarper

from graphwright.runtime.decoding import device_loop
from graphwright.runtime.decoding.device_loop import LAG, DeviceLoop, why_token_by_token
from graphwright.runtime.decoding.loop import DecodeLoop
from graphwright.runtime.model import OptimizedModel
from graphwright.runtime.program import Program
from graphwright.runtime.transfers import Readback, upload
from tests.e2e.graph_stand_in import as_model, with_graphs
from tests.e2e.packed_programs import PAGE, PackedModel, drafting, full_model, repetitive_prompts

CPU = torch.device("cpu")
PASSES = {
    "dense": ["place_cache{cut=kv}"],
    "packed": ["place_cache{cut=kv}", f"quantize_cache{{codec=int,bits=8,page={PAGE}}}"],
}
SAMPLING = {
    "greedy": {},
    "greedy, warped": {"suppress_tokens": [5, 7]},
    "sampled": {"do_sample": True, "top_k": 0},
    "temperature": {"do_sample": True, "temperature": 0.7, "top_k": 0},
    "top-k": {"do_sample": True, "top_k": 9},
    "top-p": {"do_sample": True, "top_k": 0, "top_p": 0.6, "temperature": 1.5},
    "min-p": {"do_sample": True, "top_k": 0, "min_p": 0.2},
    "typical": {"do_sample": True, "top_k": 30, "typical_p": 0.8},
}


class Pair:
    """One program twice: tokens waited for one by one, and not.

    Attributes:
        waiting, ahead: its models; the second with the stand-in for graphs.
    """

    def __init__(self, program: Program, model: Any) -> None:
        self.waiting = as_model(program, model)
        running, self.backend = with_graphs(program)
        running.runs_ahead = True
        self.ahead = as_model(running, model)

    def both(self, ids: torch.Tensor, **options: Any) -> tuple[torch.Tensor, Any]:
        """The tokens that both give, and what they left behind."""
        results, left = [], []
        for model in (self.waiting, self.ahead):
            torch.manual_seed(3)
            results.append(model.generate(ids, pad_token_id=0, **options))
            left.append((model.stats()["last"], torch.random.get_rng_state()))
        assert torch.equal(*results)
        assert left[0][0] == left[1][0]
        assert torch.equal(left[0][1], left[1][1])
        return results[0], left[0][0]


@pytest.fixture(scope="module")
def pairs() -> dict[str, Pair]:
    lab = PackedModel(full_model())
    found = {}
    for name, passes in PASSES.items():
        program = lab.program(passes).program
        assert isinstance(program, Program)
        found[name] = Pair(program, lab.model)
    return found


@pytest.fixture(autouse=True)
def loops(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[type]]:
    """The loops that were made."""
    made: list[type] = []
    init = DecodeLoop.__init__

    def noted(self: DecodeLoop, *args: Any, **kwargs: Any) -> None:
        made.append(type(self))
        init(self, *args, **kwargs)

    monkeypatch.setattr(DecodeLoop, "__init__", noted)
    yield made


class Recorder:
    """A streamer that notes what it is given, and raises when it has had enough."""

    def __init__(self, enough: int | None = None) -> None:
        self.values: list[list[int]] = []
        self.enough, self.ended = enough, 0

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value.reshape(-1).tolist())
        if self.enough is not None and len(self.values) > self.enough:
            raise KeyboardInterrupt

    def end(self) -> None:
        self.ended += 1


# --- the same results ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(PASSES))
@pytest.mark.parametrize("how", list(SAMPLING))
@pytest.mark.parametrize("lengths", [[40], [70, 33, 9]], ids=["one row", "ragged"])
def test_tokens_statistics_and_random_numbers(
    pairs: dict[str, Pair], loops: list[type], kind: str, how: str, lengths: list[int]
) -> None:
    ids, mask = repetitive_prompts(lengths)
    options = SAMPLING[how] | {"attention_mask": mask, "max_new_tokens": 45}
    whole, _ = pairs[kind].both(ids, eos_token_id=None, **options)
    assert loops == [DecodeLoop, DeviceLoop]
    # Ends in the middle, each row at another place, some of them in the very first steps.
    new = whole[:, ids.shape[1] :]
    assert new.shape[1] == 45
    for at in (0, 1, 7, 44):
        ends = [int(new[row, at]) for row in range(len(lengths))]
        cut, stats = pairs[kind].both(ids, eos_token_id=ends, **options)
        assert stats["cycles"] <= max(at, 0) and cut.shape[1] - ids.shape[1] == stats["cycles"] + 1


@pytest.mark.parametrize("most", [1, 2, LAG, LAG + 1, LAG + 2, 20])
@pytest.mark.parametrize("how", ["greedy", "top-k"])
def test_every_length(pairs: dict[str, Pair], how: str, most: int) -> None:
    ids, mask = repetitive_prompts([12, 7])
    options = SAMPLING[how] | {"attention_mask": mask, "max_new_tokens": most, "eos_token_id": None}
    _, stats = pairs["dense"].both(ids, **options)
    assert stats["tokens"] == 2 * most and stats["cycles"] == most - 1


def test_consecutive_draws_go_on_from_the_same_place(pairs: dict[str, Pair]) -> None:
    """Numbers that were drawn for tokens which were thrown away are drawn again by the next call."""
    ids, _ = repetitive_prompts([12])
    options = {"do_sample": True, "max_new_tokens": 30, "pad_token_id": 0}
    found = []
    for model in (pairs["dense"].waiting, pairs["dense"].ahead):
        torch.manual_seed(0)
        end = int(model.generate(ids, eos_token_id=None, **options)[0, ids.shape[1] + 4])
        torch.manual_seed(0)
        found.append([model.generate(ids, eos_token_id=end, **options).tolist() for _ in range(3)])
    assert found[0] == found[1] and len(found[0][0][0]) < ids.shape[1] + 30


class Stop(StoppingCriteria):
    """Ends each row at a length of its own, and notes what it saw."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths, self.seen = lengths, []  # type: ignore[var-annotated]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        assert scores is None
        self.seen.append(input_ids.tolist())
        return torch.tensor([input_ids.shape[1] >= length for length in self.lengths])


@pytest.mark.parametrize("eos", [None, 60], ids=["no padding", "padding"])
def test_criteria_and_streamers_see_the_same(pairs: dict[str, Pair], eos: int | None) -> None:
    seen: list[Any] = []
    for model in (pairs["packed"].waiting, pairs["packed"].ahead):
        for rows in ([30], [20, 40, 28]):
            ids, mask = repetitive_prompts(rows)
            stop, streamer = Stop([ids.shape[1] + n for n in (5, 17, 9)][: len(rows)]), Recorder()
            options = {"attention_mask": mask, "max_new_tokens": 30, "eos_token_id": eos, "pad_token_id": 0}
            if len(rows) == 1:
                options["streamer"] = streamer
            tokens = model.generate(ids, stopping_criteria=[stop], **options)
            seen.append((tokens.tolist(), stop.seen, streamer.values, streamer.ended))
    assert seen[:2] == seen[2:]
    assert len(seen[0][1]) == 5 and len(seen[0][2]) == 1 + 5


@pytest.mark.parametrize("how", ["greedy", "top-p"])
@pytest.mark.parametrize("enough", [1, 2, 9])
def test_an_interruption_leaves_the_same(pairs: dict[str, Pair], how: str, enough: int) -> None:
    """Tokens that were streamed before, and the random numbers that were used for them."""
    ids, _ = repetitive_prompts([30])
    left = []
    for model in (pairs["dense"].waiting, pairs["dense"].ahead):
        torch.manual_seed(1)
        streamer = Recorder(enough)
        with pytest.raises(KeyboardInterrupt):
            model.generate(ids, streamer=streamer, max_new_tokens=30, eos_token_id=None, **SAMPLING[how])
        left.append((streamer.values, torch.random.get_rng_state().tolist()))
    assert left[0] == left[1] and len(left[0][0]) == enough + 1
    pairs["dense"].both(ids, max_new_tokens=30, eos_token_id=None, **SAMPLING[how])


# --- how far ahead -------------------------------------------------------------------------------


def test_a_streamer_is_no_more_than_the_lag_behind(
    pairs: dict[str, Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pairs["dense"].ahead
    steps, ahead = [0], []
    step = model.program.step

    def counted(*args: Any, **kwargs: Any) -> Any:
        steps[0] += 1
        return step(*args, **kwargs)

    class Streamer(Recorder):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            ahead.append(steps[0] - (len(self.values) - 2))

    monkeypatch.setattr(model.program, "step", counted)
    ids, _ = repetitive_prompts([30])
    model.generate(ids, streamer=Streamer(), max_new_tokens=20, eos_token_id=None)
    assert ahead[1:] == [LAG] * (20 - LAG) + list(range(LAG - 1, -1, -1))
    assert steps[0] == 19


def test_the_host_reads_nothing_but_what_has_arrived(
    pairs: dict[str, Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One list of tokens a step, whatever is sampled; never the newest one."""
    model = pairs["packed"].ahead
    ids, mask = repetitive_prompts([40, 31])
    reads: dict[str, int] = {}

    def count(name: str) -> None:
        read: Callable[..., Any] = getattr(torch.Tensor, name)

        def counted(tensor: torch.Tensor, *args: Any) -> Any:
            reads[name] = reads.get(name, 0) + 1
            return read(tensor, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)

    taken = []

    class Watched(Readback):
        def take(self) -> Any:
            taken.append(len(self))
            return super().take()

    monkeypatch.setattr(device_loop, "Readback", Watched)
    for name in ("tolist", "item", "__int__", "__float__", "__bool__", "__index__"):
        count(name)
    options = SAMPLING["top-k"] | {"attention_mask": mask, "eos_token_id": None, "pad_token_id": 0}
    totals = []
    for most in (10, 30):
        reads.clear()
        taken.clear()
        model.generate(ids, max_new_tokens=most, **options)
        totals.append(dict(reads))
        assert taken == [LAG + 1] * (most - LAG) + list(range(LAG, 0, -1))
    more = {name: totals[1][name] - totals[0][name] for name in totals[1]}
    assert more == {name: 20 * (name == "tolist") for name in more}


def test_readback_gives_what_was_put_in_order() -> None:
    arrivals = Readback(CPU, (2,), 3)
    moving = torch.zeros(2, dtype=torch.int64)
    for turn in range(3):
        arrivals.put(moving.fill_(turn))
    assert len(arrivals) == 3 and [arrivals.take() for _ in range(2)] == [[0, 0], [1, 1]]
    arrivals.put(moving.fill_(7))
    assert [arrivals.take() for _ in range(2)] == [[2, 2], [7, 7]] and len(arrivals) == 0


def test_uploads() -> None:
    assert torch.equal(upload([[1, 2], [3, 4]], CPU), torch.tensor([[1, 2], [3, 4]]))
    assert upload([5], CPU).dtype is torch.int64


# --- which loop ----------------------------------------------------------------------------------


class Doubles(LogitsProcessor):
    """A processor of the caller's."""

    stateless = True

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores * 2


WAITING: dict[str, dict[str, Any]] = {
    "scores": {"output_scores": True, "return_dict_in_generate": True},
    "logits": {"output_logits": True, "return_dict_in_generate": True},
    "processor": {"logits_processor": LogitsProcessorList([Doubles()])},
    "repetition": {"repetition_penalty": 1.3},
    "ngrams": {"no_repeat_ngram_size": 2},
    "minimum": {"min_new_tokens": 4, "eos_token_id": 11},
}


@pytest.mark.parametrize("name", list(WAITING))
def test_requests_that_need_every_token_wait_for_it(
    pairs: dict[str, Pair], loops: list[type], name: str
) -> None:
    ids, _ = repetitive_prompts([30])
    results = [
        model.generate(ids, max_new_tokens=12, **({"eos_token_id": None} | WAITING[name]))
        for model in (pairs["dense"].waiting, pairs["dense"].ahead)
    ]
    assert loops == [DecodeLoop] * 2
    sequences = [r if isinstance(r, torch.Tensor) else r.sequences for r in results]
    assert torch.equal(*sequences)


def test_drafts_wait(pairs: dict[str, Pair], loops: list[type]) -> None:
    ids, _ = repetitive_prompts([60])
    running = pairs["packed"].ahead
    drafted = OptimizedModel(
        running.program,
        config=running.config,
        generation_config=running.generation_config,
        speculation=drafting(),
    )
    options = {"max_new_tokens": 40, "eos_token_id": None}
    assert torch.equal(drafted.generate(ids, **options), running.generate(ids, **options))
    assert loops == [DecodeLoop, DeviceLoop]
    assert drafted.stats()["accepted"] > 0


class MyTemperature(TemperatureLogitsWarper):
    """May do anything, whatever it is made from."""


def test_why_a_request_waits() -> None:
    def request(*processors: Any, **options: Any) -> Any:
        plain = {"keep_scores": False, "keep_logits": False, "processors": processors}
        return SimpleNamespace(**(plain | options))

    assert why_token_by_token(request(TemperatureLogitsWarper(0.5)), None) is None
    assert "drafts" in (why_token_by_token(request(), drafting()) or "")
    assert "MyTemperature" in (why_token_by_token(request(MyTemperature(0.5)), None) or "")
    assert "scores" in (why_token_by_token(request(keep_logits=True), None) or "")
