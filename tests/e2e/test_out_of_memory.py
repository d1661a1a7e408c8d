"""Memory that runs out in the middle of a call: a clear error, everything freed, and a program that works."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from graphwright.ir.errors import GraphwrightError, OutOfMemoryError
from graphwright.runtime.decoding.memory import is_out_of_memory
from graphwright.runtime.model import OptimizedModel
from graphwright.runtime.program import Program
from graphwright.runtime.state_pool import capacity_bucket
from tests.e2e.graph_stand_in import RecordedGraphs, as_model, with_graphs
from tests.e2e.packed_programs import PAGE, PackedModel, drafting, full_model, repetitive_prompts

PASSES = ["place_cache{cut=kv}", f"quantize_cache{{codec=int,bits=8,page={PAGE}}}"]
ERRORS = {
    "host": MemoryError(),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: not enough memory"),
    "linux": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
}
OPTIONS: dict[str, Any] = {"max_new_tokens": 40, "eos_token_id": None, "pad_token_id": 0}

Models = dict[str, OptimizedModel]


@pytest.fixture(scope="module")
def parts() -> tuple[Program, Any]:
    """A program with packed caches, and its stock model."""
    lab = PackedModel(full_model())
    program = lab.program(PASSES).program
    assert isinstance(program, Program)
    return program, lab.model


@pytest.fixture
def models(parts: tuple[Program, Any]) -> Models:
    """As it runs on a CPU, with drafts, with graphs, and with graphs and the loop that runs ahead."""
    plain, stock = parts
    graphs, ahead = (with_graphs(plain)[0] for _ in range(2))
    own = with_graphs(plain, NoGraphs())[0]
    ahead.runs_ahead = True
    return {
        "plain": as_model(own, stock),
        "drafts": as_model(own, stock, drafting()),
        "graphs": as_model(graphs, stock),
        "ahead": as_model(ahead, stock),
    }


class NoGraphs(RecordedGraphs):
    """For programs that run as on a CPU."""

    def enabled(self, device: torch.device) -> bool:
        return False


def failing(target: Any, error: BaseException, after: int = 0) -> Callable[..., Any]:
    """``target`` until it has been called ``after`` times; then it raises, once."""
    left = [after]

    def run(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == -1:
            hoard = torch.zeros(1000)  # what the call had got so far
            raise error.with_traceback(None) if hoard.numel() else AssertionError
        return target(*args, **kwargs)

    return run


# --- generations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["borrow", "prefill", "step 0", "step 3", "_run_step"])
@pytest.mark.parametrize("name", ["plain", "drafts", "graphs", "ahead"])
def test_everything_is_freed_while_the_error_is_held(
    models: Models, monkeypatch: pytest.MonkeyPatch, name: str, where: str
) -> None:
    model = models[name]
    program: Any = model.program
    ids, mask = repetitive_prompts([70, 30])
    expected = model.generate(ids, attention_mask=mask, **OPTIONS)
    program.free_idle()
    method, _, after = where.partition(" ")
    with monkeypatch.context() as patch:
        patch.setattr(program, method, failing(getattr(program, method), ERRORS["gpu"], int(after or 0)))
        with pytest.raises(OutOfMemoryError, match="CUDA out of memory") as held:
            model.generate(ids, attention_mask=mask, **OPTIONS)
    assert program.cache_bytes() == 0
    assert isinstance(held.value, MemoryError) and isinstance(held.value, GraphwrightError)
    for word in ("max_new_tokens", "batch", "Budget(memory=", "quantize_cache"):
        assert word in str(held.value)
    assert torch.equal(model.generate(ids, attention_mask=mask, **OPTIONS), expected)


@pytest.mark.parametrize("kind", list(ERRORS))
def test_every_way_to_say_it(models: Models, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    model, error = models["plain"], ERRORS[kind]
    assert is_out_of_memory(error)
    ids, _ = repetitive_prompts([20])
    monkeypatch.setattr(model.program, "step", failing(model.program.step, error, 2))
    with pytest.raises(OutOfMemoryError, match="memory ran out on cpu"):
        model.generate(ids, **OPTIONS)
    assert model.generate(ids, **OPTIONS).shape == (1, 60)


def test_what_the_allocator_really_says(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models["plain"]
    allocate = model.program.allocate

    def huge(batch: int, capacity: int, prefix: int = 0) -> Any:
        return allocate(batch, 1 << 45)

    ids, _ = repetitive_prompts([20])
    with monkeypatch.context() as patch:
        patch.setattr(model.program, "allocate", huge)
        with pytest.raises(OutOfMemoryError, match=r"memory ran out on cpu: .*allocat"):
            model.generate(ids, **OPTIONS)
    assert model.generate(ids, **OPTIONS).shape == (1, 60)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shapes do not match"), ValueError("not enough memory"), KeyboardInterrupt()],
    ids=repr,
)
def test_other_errors_stay_what_they_are(
    models: Models, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    assert not is_out_of_memory(error)
    ids, _ = repetitive_prompts([20])
    monkeypatch.setattr(models["plain"].program, "step", failing(models["plain"].program.step, error, 1))
    with pytest.raises(type(error)) as held:
        models["plain"].generate(ids, **OPTIONS)
    assert held.value is error


@pytest.mark.parametrize("name", ["plain", "ahead"])
@pytest.mark.parametrize("kind", ["host", "gpu"])
def test_errors_of_the_callers_own_streamer_pass_through(models: Models, name: str, kind: str) -> None:
    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            raise ERRORS[kind]

        def end(self) -> None:
            raise AssertionError

    ids, _ = repetitive_prompts([20])
    with pytest.raises((MemoryError, torch.OutOfMemoryError)) as held:
        models[name].generate(ids, streamer=Streamer(), **OPTIONS)
    assert held.value is ERRORS[kind]
    assert models[name].generate(ids, **OPTIONS).shape == (1, 60)


def test_kept_logits_are_freed_too(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are most of what a long generation holds beside its cache."""
    kept: list[Any] = []
    model = models["plain"]
    step = model.program.step

    def run(*args: Any, **kwargs: Any) -> Any:
        if len(kept) == 5:
            raise MemoryError
        logits = step(*args, **kwargs)
        kept.append(weakref.ref(logits))
        return logits

    ids, _ = repetitive_prompts([20])
    monkeypatch.setattr(model.program, "step", run)
    with pytest.raises(OutOfMemoryError) as held:
        model.generate(ids, output_logits=True, return_dict_in_generate=True, **OPTIONS)
    assert held.value is not None and [one() for one in kept] == [None] * 5
    reached = traceback_objects(held.value)
    assert not any(isinstance(thing, torch.Tensor) and thing.dtype.is_floating_point for thing in reached)


def traceback_objects(error: BaseException) -> list[Any]:
    """What the frames of an error's traceback name, and what their transcripts and lists hold."""
    found: list[Any] = []
    at = error.__traceback__
    while at is not None:
        found += at.tb_frame.f_locals.values() if at.tb_frame.f_code.co_name in ("_run", "_sample") else []
        at = at.tb_next
    for thing in list(found):
        found += getattr(thing, "__dict__", {}).get("_row_logits", [])
        assert not hasattr(thing, "transcript"), "the loop is still there"
    return found


# --- states that are kept for later --------------------------------------------------------------


@pytest.mark.parametrize("name", ["graphs", "ahead"])
@pytest.mark.parametrize("method", ["allocate", "prefill"])
def test_kept_states_make_room(
    models: Models, monkeypatch: pytest.MonkeyPatch, name: str, method: str
) -> None:
    """A state that waits for another call never makes this one fail."""
    model = models[name]
    program: Any = model.program
    ids, _ = repetitive_prompts([20])
    model.generate(ids, **OPTIONS)
    waiting = program.cache_bytes()
    assert waiting > 0
    target = getattr(program, method)

    def run(*args: Any, **kwargs: Any) -> Any:
        if program.cache_bytes() - waiting * (method == "prefill") > 0 and len(program._pool):
            raise ERRORS["gpu"]
        return target(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(program, method, run)
        longer = model.generate(ids, **(OPTIONS | {"max_new_tokens": 150}))
    assert longer.shape == (1, 170)
    assert program.cache_bytes() == program.allocate(1, capacity_bucket(170)).nbytes()


def test_a_capture_that_needs_more_memory_than_there_is(
    parts: tuple[Program, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, stock = parts
    program, backend = with_graphs(plain)
    model = as_model(program, stock)
    ids, _ = repetitive_prompts([20])
    with monkeypatch.context() as patch:
        patch.setattr(backend, "capture", failing(backend.capture, ERRORS["gpu"]))
        with pytest.raises(OutOfMemoryError):
            model.generate(ids, **OPTIONS)
    assert program.cache_bytes() == 0 and program.graphs_off is None
    assert torch.equal(model.generate(ids, **OPTIONS), as_model(plain, stock).generate(ids, **OPTIONS))
    assert backend.replays > 30


# --- forward and score ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "graphs"])
@pytest.mark.parametrize("call", ["forward", "score"])
@pytest.mark.parametrize("method", ["allocate", "step"])
def test_passes_over_given_tokens(
    models: Models, monkeypatch: pytest.MonkeyPatch, name: str, call: str, method: str
) -> None:
    model = models[name]
    ids, _ = repetitive_prompts([90])

    def logits() -> torch.Tensor:
        result = getattr(model, call)(ids)
        return result if isinstance(result, torch.Tensor) else result.logits

    expected = logits()
    with monkeypatch.context() as patch:
        failed = failing(getattr(model.program, method), ERRORS["cpu"], int(method == "step"))
        patch.setattr(model.program, method, failed)
        with pytest.raises(OutOfMemoryError, match=f"where: {call}") as held:
            logits()
    assert held.value is not None and model.program.cache_bytes() == 0  # type: ignore[attr-defined]
    assert torch.equal(logits(), expected)


def test_a_cache_in_the_callers_hands_goes_on(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was in it is run again."""
    model = models["plain"]
    ids, _ = repetitive_prompts([60])
    uninterrupted = model.forward(ids[:, :40], use_cache=True).past_key_values
    expected = model.forward(ids[:, 40:], past_key_values=uninterrupted).logits
    past = model.forward(ids[:, :40], use_cache=True).past_key_values
    with monkeypatch.context() as patch:
        patch.setattr(model.program, "step", failing(model.program.step, ERRORS["host"]))
        with pytest.raises(OutOfMemoryError):
            model.forward(ids[:, 40:], past_key_values=past)
    assert past.get_seq_length() == 40
    assert torch.equal(model.forward(ids[:, 40:], past_key_values=past).logits, expected)
