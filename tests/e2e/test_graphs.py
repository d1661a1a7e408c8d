"""Captured steps, with a stand-in for CUDA graphs: what is captured, what may not be; states used again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from graphwright.ir.errors import InputError
from graphwright.runtime.graphs import CudaGraphs, token_bucket, why_not_captured
from graphwright.runtime.lowering.kernels import KernelUse
from graphwright.runtime.model import OptimizedModel
from graphwright.runtime.storage import State
from tests.architectures import VOCAB
from tests.e2e.graph_stand_in import (
    KINDS,
    Make,
    RecordedGraphs,
    as_model,
    prefilled,
    step,
    with_graphs,
)
from tests.e2e.packed_programs import (
    drafting,
    random_text,
    repetitive_prompts,
)

# --- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_step_is_the_step(make: Make, kind: str) -> None:
    plain, _ = make(kind)
    captured, backend = with_graphs(plain)
    one, other = prefilled(plain), prefilled(captured)
    for width in (1, 2, 3, 5, 8, 13, 31, 64):
        for options in ({}, {"logits": "last"}):
            expected = step(plain, one, width, **options)
            valid = torch.arange(expected.shape[1]) < torch.tensor([width, max(width // 2, 1)])[:, None]
            for _ in range(3):
                found = step(captured, other, width, **options)
                assert found.shape == expected.shape
                assert torch.equal(found[valid], expected[valid])
        kept = torch.tensor([min(width, 5), width // 2])
        one.commit(kept)
        other.commit(kept)
    assert backend.replays > 20


def test_steps_of_a_bucket_are_one_graph(make: Make) -> None:
    """The first step of a bucket runs as it is, the second one is captured."""
    program, backend = with_graphs(make("dense")[0])
    state = prefilled(program)
    counts = []
    for width in (1, 1, 1, 3, 4, 3, 5, 8, 7):
        step(program, state, width)
        counts.append(len(backend.captured))
    assert counts == [0, 1, 1, 1, 2, 2, 2, 3, 3]
    assert [token_bucket(width) for width in (1, 2, 3, 4, 5, 33, 63, 64)] == [1, 2, 4, 4, 8, 64, 64, 64]


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_trees_are_graphs_of_their_own(make: Make, kind: str) -> None:
    plain, _ = make(kind)
    captured, backend = with_graphs(plain)
    states = prefilled(plain), prefilled(captured)
    tokens, counts = random_text(2, 5, seed=9), torch.tensor([5, 3])
    depth = torch.tensor([[0, 1, 1, 2, 2], [0, 1, 1, 0, 0]])
    tree = torch.tensor([[1, 3, 5, 11, 21], [1, 3, 5, 0, 0]])
    expected = plain.step(states[0], tokens, counts, depth=depth, tree=tree)
    for _ in range(3):
        found = captured.step(states[1], tokens, counts, depth=depth, tree=tree)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1, :3], expected[1, :3])
    assert len(backend.captured) == 1
    for state in states:
        state.commit_path(torch.tensor([[0, 2, 4], [0, 2, 0]]), torch.tensor([3, 2]))
    for width in (1, 5, 5):
        assert torch.equal(*[step(p, s, width)[0] for p, s in zip((plain, captured), states, strict=True)])
    assert len(backend.captured) == 2


def test_logits_stay_what_they_are(make: Make) -> None:
    """A replay writes where the one before wrote; the caller's logits are elsewhere."""
    program, _ = with_graphs(make("dense")[0])
    state = prefilled(program)
    seen = [step(program, state, 1) for _ in range(2)]
    copies = [logits.clone() for logits in seen]
    program.step(state, torch.tensor([[7], [9]]), torch.tensor([1, 1]))
    assert all(torch.equal(a, b) for a, b in zip(seen, copies, strict=True))


def test_prompts_are_not_captured(make: Make) -> None:
    program, backend = with_graphs(make("packed")[0])
    for _ in range(3):
        prefilled(program)
        prefilled(program, (150, 90))
    assert not backend.captured


def test_longer_steps_are_not_captured(make: Make) -> None:
    """Tails are elsewhere while there is room for more than 64 tokens in a step."""
    plain, _ = make("packed")
    program, backend = with_graphs(plain)
    states = prefilled(plain), prefilled(program)
    for width in (80, 80, 1, 1):
        found = [step(p, s, width)[0] for p, s in zip((plain, program), states, strict=True)]
        assert torch.equal(*found) and not backend.captured
    for state in states:
        state.shrink()
    for _ in range(3):
        assert torch.equal(*[step(p, s, 1)[0] for p, s in zip((plain, program), states, strict=True)])
    assert backend.captured


def test_stores_stay_where_they_are(make: Make) -> None:
    program, _ = with_graphs(make("windowed packed")[0])
    state = prefilled(program)
    before = {name: store.data_ptr() for name, store in state.stores.items()}
    lengths = state.lengths.data_ptr()
    step(program, state, 100)
    assert {name: store.data_ptr() for name, store in state.stores.items()} != before
    state.shrink()
    state.truncate(torch.tensor([4, 2]))
    state.reset()
    assert {name: store.data_ptr() for name, store in state.stores.items()} == before
    assert state.lengths.data_ptr() == lengths


# --- whole generations ---------------------------------------------------------------------------


def counted(model: OptimizedModel) -> dict[str, Any]:
    """The counters of the last call, without its times."""
    last = model.stats()["last"]
    for counters in (last, *last["by_drafter"].values()):
        del counters["drafting_seconds_per_cycle"]
    return last


@pytest.mark.parametrize("speculative", [False, True], ids=["plain", "drafts"])
@pytest.mark.parametrize("kind", KINDS)
def test_generations_are_the_same_and_capture_once(make: Make, kind: str, speculative: bool) -> None:
    plain, stock = make(kind)
    program, backend = with_graphs(plain)
    speculation = drafting() if speculative else None
    fast, expected = as_model(program, stock, speculation), as_model(plain, stock, speculation)
    ids, mask = repetitive_prompts([70, 33, 9])
    options = {"attention_mask": mask, "max_new_tokens": 60, "eos_token_id": None, "pad_token_id": 0}
    want = expected.generate(ids, **options)
    assert torch.equal(fast.generate(ids, **options), want)
    assert counted(fast) == counted(expected)
    captured, replayed = len(backend.captured), backend.replays
    assert captured and (replayed > 40 or speculative)
    for _ in range(2):
        assert torch.equal(fast.generate(ids, **options), want)
    # Only buckets that came once the first time may be new.
    assert len(backend.captured) <= captured + 2 * speculative and backend.replays > 2 * replayed
    assert program.cache_bytes() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_used_state_is_as_good_as_new(make: Make, kind: str) -> None:
    """Whatever is in it: nothing of what was there is ever read."""
    plain, stock = make(kind)
    program, _ = with_graphs(plain)
    fast = as_model(program, stock)
    options = {"max_new_tokens": 50, "eos_token_id": None}
    fast.generate(random_text(2, 90), **options)
    state = program.borrow(2, 140)
    assert state.known == [0, 0] and not state.lengths.any()
    for layout in state.packed:
        assert not state.stores[layout.roles["packed"]].any()
    for store in state.stores.values():
        if store.is_floating_point():
            store.fill_(float("nan"))
    program.give_back(state)
    ids = random_text(2, 80, seed=5)
    assert torch.equal(fast.generate(ids, **options), as_model(plain, stock).generate(ids, **options))


class Interrupt(Exception):
    """Raised by a streamer."""


class After:
    """A streamer that raises after some tokens."""

    def __init__(self, tokens: int) -> None:
        self.left = tokens

    def put(self, value: torch.Tensor) -> None:
        self.left -= 1
        if self.left < 0:
            raise Interrupt

    def end(self) -> None:
        """Nothing to end."""


@pytest.mark.parametrize("speculative", [False, True], ids=["plain", "drafts"])
@pytest.mark.parametrize("kind", ["dense", "windowed packed"])
def test_after_an_interruption(make: Make, kind: str, speculative: bool) -> None:
    plain, stock = make(kind)
    program, _ = with_graphs(plain)
    speculation = drafting() if speculative else None
    fast = as_model(program, stock, speculation)
    ids, _ = repetitive_prompts([70])
    options = {"max_new_tokens": 50, "eos_token_id": None}
    for tokens in (1, 20):
        with pytest.raises(Interrupt):
            fast.generate(ids, streamer=After(tokens), **options)
    want = as_model(plain, stock, speculation).generate(ids, **options)
    assert torch.equal(fast.generate(ids, **options), want)


def test_after_a_prompt_was_interrupted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its chunks, while tails have room for long steps."""
    plain, _ = make("packed")
    program, _ = with_graphs(plain)
    state = program.borrow(2, 200)
    addresses = {name: store.data_ptr() for name, store in state.stores.items()}
    commit = State.commit

    def once(self: State, *args: Any) -> None:
        commit(self, *args)
        raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr(State, "commit", once)
        with pytest.raises(Interrupt):
            program.prefill(state, random_text(2, 150), torch.tensor([150, 90]))
    program.give_back(state)
    again = program.borrow(2, 200)
    assert again is state and {n: s.data_ptr() for n, s in again.stores.items()} == addresses
    fresh = plain.allocate(2, 200)
    ids, counts = random_text(2, 150, seed=4), torch.tensor([150, 90])
    assert torch.equal(program.prefill(again, ids, counts), plain.prefill(fresh, ids, counts))


# --- what cannot be captured ---------------------------------------------------------------------


def use(op: str, provider: str) -> KernelUse:
    """A line of the report."""
    return KernelUse(op, provider, 2, "triton: head_dim over 256")


def test_reference_bodies_that_read_contents_are_not_captured() -> None:
    harmless = [use("linear", "reference"), use("append_attention", "triton"), use("attention", "reference")]
    assert why_not_captured(True, harmless) is None
    for op in ("routed_linear", "cache_append", "append_attention", "rotary_append", "packed_attention"):
        reason = why_not_captured(True, [*harmless, use(op, "reference")])
        assert reason is not None and op in reason and "head_dim over 256" in reason
    assert "keeps no cache" in (why_not_captured(False, harmless) or "")


def test_a_program_says_why_it_is_not_captured(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, stock = make("dense")
    monkeypatch.setattr(plain.lowered, "kernels", [use("append_attention", "reference")])
    program, backend = with_graphs(plain)
    assert "append_attention" in (program.graphs_off or "")
    ids = random_text(1, 20)
    want = as_model(plain, stock).generate(ids, max_new_tokens=9)
    assert torch.equal(as_model(program, stock).generate(ids, max_new_tokens=9), want)
    assert not backend.captured and program.cache_bytes() == 0


class Refusing(RecordedGraphs):
    """A backend whose captures fail."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error, self.asked = error, 0

    def capture(self, run: Any, device: torch.device) -> Any:
        self.asked += 1
        raise self.error


def test_a_capture_that_fails_is_recorded_and_not_tried_again(make: Make) -> None:
    plain, stock = make("packed")
    program, backend = with_graphs(plain, Refusing(RuntimeError("operation not permitted when capturing")))
    ids = random_text(1, 20)
    for _ in range(2):
        want = as_model(plain, stock).generate(ids, max_new_tokens=30)
        assert torch.equal(as_model(program, stock).generate(ids, max_new_tokens=30), want)
    assert backend.asked == 1 and "not permitted" in (program.graphs_off or "")


def test_cuda_graphs_are_for_gpus() -> None:
    assert CudaGraphs().enabled(torch.device("cuda", 1)) and not CudaGraphs().enabled(torch.device("cpu"))


class FakeCuda:
    """As much of ``torch.cuda`` as a capture needs; notes what happens in order."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.streams = self.pools = 0

    @contextmanager
    def noted(self, what: str) -> Iterator[None]:
        self.events.append(f"begin {what}")
        yield
        self.events.append(f"end {what}")

    def device(self, device: torch.device) -> Any:
        return self.noted(str(device))

    def graph_pool_handle(self) -> tuple[int, int]:
        self.pools += 1
        return 0, self.pools

    def stream_named(self, name: str) -> Any:
        return SimpleNamespace(
            name=name, wait_stream=lambda other: self.events.append(f"{name} waits for {other.name}")
        )

    def current_stream(self) -> Any:
        return self.stream_named("main")

    def Stream(self) -> Any:
        return self.stream_named("side")

    def stream(self, stream: Any) -> Any:
        return self.noted(f"on {stream.name}")

    def CUDAGraph(self) -> Any:
        return SimpleNamespace(replay=lambda: self.events.append("replay"))

    def graph(self, graph: Any, *, pool: Any, stream: Any, capture_error_mode: str) -> Any:
        return self.noted(f"capture on {stream.name} into {pool[1]}, {capture_error_mode}")


def test_cuda_graphs_warm_up_aside_and_share_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, backend, device = FakeCuda(), CudaGraphs(), torch.device("cuda", 1)
    for name in ("device", "graph_pool_handle", "current_stream", "Stream", "stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    results = iter(torch.arange(4))

    def run() -> torch.Tensor:
        cuda.events.append("run")
        return next(results)

    first = backend.capture(run, device)
    steps = ["side waits for main", "begin on side", "run", "end on side", "main waits for side"]
    steps += [f"{edge} capture on side into 1, thread_local" for edge in ("begin", "end")]
    steps.insert(-1, "run")
    assert cuda.events == ["begin cuda:1", *steps, "end cuda:1"]
    second = backend.capture(run, device)
    assert cuda.events[len(steps) + 3 : -1] == steps
    assert (int(first()), int(second()), int(first())) == (1, 3, 1)
    assert cuda.events[-3:] == ["replay"] * 3


# --- the stand-in itself -------------------------------------------------------------------------


def test_the_stand_in_refuses_fresh_tensors() -> None:
    held = [torch.ones(3)]
    fixed, fresh = RecordedGraphs(), RecordedGraphs()
    buffer = torch.ones(3)
    replay = fixed.capture(lambda: buffer * 2, buffer.device)
    buffer.fill_(4)
    assert replay().tolist() == [8, 8, 8]
    replay = fresh.capture(lambda: held[0] * 2, buffer.device)
    held.append(held.pop().clone())
    held[0] = torch.ones(3)
    with pytest.raises(AssertionError, match="given tensors"):
        replay()


@pytest.mark.parametrize(
    "read", [lambda x: x * int(x.max()), lambda x: x[x > 0], lambda x: x + x.tolist()[0]], ids=range(3)
)
def test_the_stand_in_refuses_reads(read: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.ones(3)
    with pytest.raises(AssertionError, match="reads contents"):
        RecordedGraphs().capture(lambda: read(x), x.device)


# --- limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("width", [64, 65, 100])
def test_a_tree_of_too_many_tokens(make: Make, width: int, captured: bool) -> None:
    plain, _ = make("dense")
    program = with_graphs(plain)[0] if captured else plain
    state = program.allocate(1, 200)
    ids, ones = random_text(1, width), torch.ones((1, width), dtype=torch.int64)
    for _ in range(2):
        with pytest.raises(InputError, match=f"at most 63 tokens .* this one has {width}"):
            program.step(state, ids, torch.tensor([width]), depth=ones, tree=ones)
    fits = program.step(state, ids[:, :63], torch.tensor([63]), depth=ones[:, :63], tree=ones[:, :63])
    assert fits.shape == (1, 63, VOCAB)
