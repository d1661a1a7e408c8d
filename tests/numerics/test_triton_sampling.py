"""Greedy choice and verification in Triton's interpreter, against torch and a plain loop."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from graphwright.kernels.triton import sampling
from graphwright.kernels.triton.launch import recording
from graphwright.kernels.triton.sampling import argmax_rows, verify_greedy
from graphwright.runtime.speculation.drafter import Draft
from graphwright.runtime.speculation.verifier import GreedyVerifier

INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """New memory is NaN, or the largest integer: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (3, 17), (5, 1024), (2, 4099), (1, 131_075)])
def test_argmax_is_that_of_torch(rows: int, vocabulary: int, dtype: torch.dtype) -> None:
    """Random float16 numbers of a wide row are full of ties."""
    logits = torch.randn(rows, vocabulary).to(dtype)
    found = argmax_rows(logits)
    assert found.dtype == torch.int64
    assert torch.equal(found, logits.argmax(-1))


@pytest.mark.parametrize("programs", [1, 10, 15, 1024])
def test_argmax_whatever_the_number_of_parts(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows take longer parts: the largest logit lies in the first, an inner and the last block."""
    monkeypatch.setattr(sampling, "_PROGRAMS", programs)
    at = torch.tensor([0, 1023, 1024, 2500, 4999])
    logits = torch.zeros(5, 5000, dtype=torch.float16)
    logits[torch.arange(5), at] = 1.0
    assert torch.equal(argmax_rows(logits), at)


def test_argmax_of_ties_infinities_and_nan() -> None:
    rows = torch.tensor(
        [
            [1.0, 3.0, 3.0, 2.0],
            [-0.0, 0.0, -0.0, -1.0],
            [-INF, -INF, -INF, -INF],
            [-INF, -3e38, -INF, -3e38],
            [INF, 1.0, INF, 3e38],
            [INF, NAN, 1.0, -NAN],
            [-NAN, NAN, INF, NAN],
            [-1e-45, -1e-44, -1.0, -1e-45],
        ]
    )
    assert argmax_rows(rows).tolist() == rows.argmax(-1).tolist() == [1, 0, 0, 1, 0, 1, 0, 0]
    wide = rows.repeat(1, 700)  # in several parts
    assert argmax_rows(wide).tolist() == [1, 0, 0, 1, 0, 1, 0, 0]


def test_argmax_of_rows_in_a_wider_buffer() -> None:
    """A padded vocabulary is a view; its padding is not read."""
    buffer = torch.full((4, 3001), NAN)
    buffer[:, :2999] = torch.randn(4, 2999)
    logits = buffer[:, :2999]
    assert torch.equal(argmax_rows(logits), logits.argmax(-1))
    assert torch.equal(argmax_rows(logits.T.contiguous().T), logits.argmax(-1))


def verified(argmax: list[int], tokens: list[int], count: int) -> tuple[int, int]:
    """One row by a loop."""
    if count == 0:
        return 0, -1
    accepted = 1
    while accepted < count and tokens[accepted] == argmax[accepted - 1]:
        accepted += 1
    return accepted, argmax[accepted - 1]


def test_rows_of_different_lengths() -> None:
    argmax = torch.tensor([[1, 2, 3, 4]] * 6)
    tokens = torch.tensor(
        [[9, 1, 2, 3], [9, 1, 2, 7], [9, 1, 2, 3], [9, 7, 2, 3], [9, 1, 2, 3], [9, 1, 2, 3]]
    )
    accepted, following = verify_greedy(argmax, tokens, torch.tensor([4, 4, 2, 4, 1, 0]))
    assert accepted.tolist() == [4, 3, 2, 1, 1, 0]
    assert following.tolist() == [4, 3, 2, 1, 1, -1]


def test_the_drafts_past_the_count_are_ignored() -> None:
    """They are whatever the buffer holds: here what the model would have chosen."""
    argmax = torch.tensor([[5, 6, 7]])
    accepted, following = verify_greedy(argmax, torch.tensor([[4, 5, 6]]), torch.tensor([1]))
    assert (accepted.item(), following.item()) == (1, 5)


def test_steps_in_a_wider_buffer() -> None:
    argmax, tokens = torch.randint(0, 2, (5, 20)), torch.randint(0, 2, (5, 30))
    counts = torch.tensor([0, 1, 3, 17, 17])
    accepted, following = verify_greedy(argmax[:, :17], tokens[:, :17], counts)
    expected = [verified(*row) for row in zip(argmax.tolist(), tokens.tolist(), counts.tolist(), strict=True)]
    assert list(zip(accepted.tolist(), following.tolist(), strict=True)) == expected
    again = verify_greedy(argmax[:, :17].T.contiguous().T, tokens[:, :17].T.contiguous().T, counts.int())
    assert torch.equal(again[0], accepted) and torch.equal(again[1], following)


def test_agrees_with_the_verifier_of_the_host() -> None:
    """Logits to tokens: the chain that :class:`GreedyVerifier` walks, for every length of agreement."""
    logits = torch.randn(6, 6, 11)
    best = logits.argmax(-1)
    tokens = torch.cat((torch.zeros(6, 1, dtype=torch.int64), best[:, :-1]), 1)
    for row in range(5):
        tokens[row, row + 1] = (tokens[row, row + 1] + 1) % 11
    drafts = [Draft(tuple(row[1:])) for row in tokens.tolist()]
    verdicts = GreedyVerifier().verify(logits, drafts, list(range(6)))
    chosen = argmax_rows(logits.flatten(0, 1)).view(6, 6)
    accepted, following = verify_greedy(chosen, tokens, torch.full((6,), 6))
    assert accepted.tolist() == [len(v.tokens) for v in verdicts] == [1, 2, 3, 4, 5, 6]
    assert following.tolist() == [v.tokens[-1] for v in verdicts]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_chain(data: st.DataObject) -> None:
    length, batch = data.draw(st.integers(1, 33)), data.draw(st.integers(1, 3))
    token = st.integers(0, data.draw(st.sampled_from([0, 1, 2**40])))
    step = st.lists(token, min_size=length, max_size=length)
    argmax, tokens = (data.draw(st.lists(step, min_size=batch, max_size=batch)) for _ in range(2))
    counts = data.draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch))
    accepted, following = verify_greedy(torch.tensor(argmax), torch.tensor(tokens), torch.tensor(counts))
    expected = [verified(*row) for row in zip(argmax, tokens, counts, strict=True)]
    assert list(zip(accepted.tolist(), following.tolist(), strict=True)) == expected


def test_launches_are_recorded_without_contents() -> None:
    logits = torch.empty(8, 128_256, dtype=torch.bfloat16, device="meta")
    with recording() as launches:
        chosen = argmax_rows(logits).view(2, 4)
        accepted, following = verify_greedy(chosen, chosen, torch.empty(2, dtype=torch.int64, device="meta"))
    assert [launch.grid for launch in launches] == [(8, 126), (8,), (2,)]
    assert chosen.dtype == accepted.dtype == following.dtype == torch.int64
