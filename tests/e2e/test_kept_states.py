"""States that are used again, and lengths that the host knows, with a stand-in for CUDA graphs."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from graphwright.runtime.state_pool import capacity_bucket
from tests.e2e.graph_stand_in import (
    Make,
    prefilled,
    step,
    with_graphs,
)
from tests.e2e.packed_programs import (
    random_text,
)

# --- states that are kept ------------------------------------------------------------------------


def test_one_state_is_kept_for_each_batch_and_capacity(make: Make) -> None:
    program, _ = with_graphs(make("dense")[0])
    a, b = program.borrow(1, 100), program.borrow(1, 100)
    assert a is not b and a.capacity == capacity_bucket(100)
    program.give_back(a)
    program.give_back(b)
    alive = weakref.ref(a)
    del a
    assert alive() is None and program.cache_bytes() == b.nbytes()
    assert program.borrow(1, 90) is b
    program.give_back(b)
    assert program.borrow(2, 100) is not b and program.borrow(1, 300) is not b


def test_graphs_die_with_their_state(make: Make) -> None:
    program, backend = with_graphs(make("packed")[0])
    state = program.borrow(2, 100)
    for _ in range(3):
        step(program, state, 1)
    program.give_back(state)
    recording, alive = weakref.ref(backend.captured.pop()), weakref.ref(state)
    del state
    assert alive() is not None and program.free_idle()
    assert alive() is None and recording() is None
    assert program.cache_bytes() == 0 and not program.free_idle()


def test_capacities_of_kept_states(make: Make) -> None:
    for capacity in range(1, 20_000):
        held = capacity_bucket(capacity)
        assert capacity <= held <= capacity + max(64, capacity // 16 + 1)
        assert capacity_bucket(held) == held
    assert len({capacity_bucket(capacity) for capacity in range(8192, 16385)}) <= 34
    program, _ = with_graphs(make("dense")[0])
    assert program.borrow(1, program.max_positions or 0).capacity == program.max_positions == 512


def test_without_graphs_nothing_is_kept(make: Make) -> None:
    program, _ = make("packed")
    before = program.cache_bytes()
    state = program.borrow(2, 77)
    assert state.capacity == 77 and state.nbytes() == program.allocate(2, 77).nbytes()
    program.give_back(state)
    step(program, state, 1)
    del state
    assert program.cache_bytes() == before and program.graphs_off is None


# --- lengths on the host -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_lengths_are_known_on_the_host(make: Make, kind: str) -> None:
    program, _ = make(kind)
    state = program.allocate(3, 250)
    generator = torch.Generator().manual_seed(0)
    for turn in range(60):
        counts = torch.randint(0, 9, (3,), generator=generator)
        program.step(state, random_text(3, 8), counts)
        if turn % 7 == 6:
            state.truncate(torch.randint(0, 60, (3,), generator=generator))
        elif turn % 3:
            state.commit(counts, counts.tolist())
        else:
            path = torch.arange(8).repeat(3, 1)
            path[:, 1:] = path[:, 1:] + (counts > 4)[:, None]
            state.commit_path(path, (counts - 1).clamp(min=0))
        assert state.known == state.lengths.tolist()
        for layout in state.packed:
            assert state._done[layout.pace] == state.stores[layout.roles["packed"]].tolist()
    state.pretend(100)
    assert state.known == [100] * 3


def test_no_step_reads_the_device(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a commit whose counts are known, until a page is packed."""
    program, _ = make("packed")
    state = prefilled(program)
    tokens, one = random_text(2, 1), torch.ones(2, dtype=torch.int64)

    def refused(*args: Any) -> Any:
        raise AssertionError("read")

    for name in ("tolist", "item", "__int__", "__bool__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, refused)
    for _ in range(20):
        program.step(state, tokens, one)
        state.commit(one, [1, 1])
    assert state.known == [50, 37]
