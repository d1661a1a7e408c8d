"""The likeliest tokens: C++ and PyTorch against a plain sort, equal entries and odd shapes among them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.ir.errors import InputError
from graphwright.kernels.cpp import build
from graphwright.kernels.top_tokens import MAX_TOP_TOKENS, _sorted, top_tokens

DTYPES = (torch.float32, torch.bfloat16)
TopTokens = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


def check(logits: torch.Tensor, k: int, function: TopTokens = top_tokens) -> None:
    """Ids exactly, log-probabilities to 1e-4."""
    ids, log_probs = function(logits, k)
    expected = [
        sorted(range(len(row)), key=lambda column: (-row[column], column))[:k] for row in logits.tolist()
    ]
    assert ids.dtype == torch.int64
    assert log_probs.dtype == torch.float32
    assert ids.tolist() == expected
    exact = logits.double().log_softmax(-1).gather(1, ids).float()
    torch.testing.assert_close(log_probs, exact, atol=1e-4, rtol=1e-5)


def test_the_library_answers_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.available() == (True, "")
    monkeypatch.setattr("graphwright.kernels.top_tokens._sorted", None)
    check(torch.randn(2, 500), 3)


@pytest.mark.parametrize("function", [top_tokens, _sorted])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "size", "k"), [(1, 20001, 16), (3, 4096, 8), (2, 128, 16), (4, 5, 5), (1, 1, 1)]
)
def test_random_rows(function: TopTokens, dtype: torch.dtype, rows: int, size: int, k: int) -> None:
    generator = torch.Generator().manual_seed(size)
    check((torch.randn(rows, size, generator=generator) * 4).to(dtype), k, function)


@pytest.mark.parametrize("function", [top_tokens, _sorted])
def test_equal_entries_come_in_order(function: TopTokens) -> None:
    for row in (
        torch.zeros(300),
        torch.arange(300.0),
        -torch.arange(300.0),
        torch.arange(300) // 7 % 5 * 1.0,
    ):
        check(row[None], 16, function)


def test_masked_entries_come_last() -> None:
    logits = torch.full((2, 400), -torch.inf)
    logits[0, 390], logits[1, 7] = 2.0, -3.0
    check(logits, 4)


def test_rows_of_a_wider_matrix_and_columns() -> None:
    wide = torch.randn(6, 700)
    check(wide[::2, 100:433], 5)
    check(wide.T, 3)


def test_a_row_does_not_depend_on_the_others() -> None:
    logits = torch.randn(5, 20000).bfloat16()
    ids, log_probs = top_tokens(logits, 7)
    for row in range(5):
        alone = top_tokens(logits[row : row + 1], 7)
        assert torch.equal(alone[0][0], ids[row])
        assert torch.equal(alone[1][0], log_probs[row])


def test_other_types_are_sorted_by_torch() -> None:
    check(torch.randn(2, 90, generator=torch.Generator().manual_seed(0)).half(), 4)
    assert top_tokens(torch.empty(0, 10), 2)[0].shape == (0, 2)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_small_alphabets(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 400))
    k = data.draw(st.integers(1, min(MAX_TOP_TOKENS, size)))
    values = data.draw(st.integers(1, 30))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    logits = torch.randint(0, values, (data.draw(st.integers(1, 3)), size), generator=generator)
    check(logits.to(data.draw(st.sampled_from(DTYPES))), k)


@pytest.mark.parametrize(
    ("logits", "k"),
    [
        (torch.zeros(3), 1),
        (torch.zeros(1, 3, dtype=torch.int64), 1),
        (torch.zeros(1, 3), 0),
        (torch.zeros(1, 3), 4),
        (torch.zeros(1, 30), 17),
    ],
)
def test_unusable_arguments(logits: torch.Tensor, k: int) -> None:
    with pytest.raises(InputError, match="top_tokens"):
        top_tokens(logits, k)
