"""Page scores and the choice of pages in Triton's interpreter, against plain torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from graphwright.kernels.triton.launch import recording
from graphwright.kernels.triton.page_scores import page_scores
from graphwright.kernels.triton.select_pages import RESIDENT, select_pages

INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """New memory is NaN, or the largest integer: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def expected_scores(q: torch.Tensor, summary: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """Tang et al. 2024, word for word, in float64."""
    pages, groups = summary.shape[1:3]
    by_group = q.double().unflatten(1, (groups, -1)).flatten(2, 3)[:, :, :, None]  # [B, G, R, 1, D]
    lowest, highest = summary.double().permute(3, 0, 2, 1, 4)[:, :, :, None]  # [B, G, 1, N, D] each
    scores = torch.maximum(by_group * lowest, by_group * highest).sum(-1).amax(2)
    absent = torch.arange(pages) >= used[:, None]
    return scores.masked_fill(absent[:, None], -INF)


def summaries(batch: int, pages: int, groups: int, features: int) -> torch.Tensor:
    """Of pages of four random keys: ``[B, N, G, 2, D]``."""
    keys = torch.randn(batch, pages, groups, 4, features)
    return torch.stack((keys.amin(3), keys.amax(3)), 3)


def expected_pages(scores: torch.Tensor, used: int, keep: int) -> list[int]:
    """The best pages of one head by a stable sort."""
    there = scores[:used].nan_to_num(nan=-INF, posinf=INF, neginf=-INF)
    best = torch.sort(there, descending=True, stable=True).indices[:keep]
    return sorted(best.tolist())


def check_selection(scores: torch.Tensor, used: list[int], keep: int) -> None:
    """The selection, where scores of no page are the highest."""
    absent = torch.arange(scores.shape[2]) >= torch.tensor(used)[:, None]
    check_heads(scores.masked_fill(absent[:, None], INF), used, keep)


def check_heads(scores: torch.Tensor, used: list[int], keep: int) -> None:
    """Every head's pages and counts, and -1 behind them."""
    pages, counts = select_pages(scores, torch.tensor(used), keep)
    assert pages.dtype == counts.dtype == torch.int32
    for b, here in enumerate(used):
        for g in range(scores.shape[1]):
            best = expected_pages(scores[b, g], here, keep)
            assert counts[b, g] == min(keep, here)
            assert pages[b, g].tolist() == best + [-1] * (keep - len(best))


@pytest.mark.parametrize("features", [64, 80, 128])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 2), (8, 1)])
def test_scores_of_groups_and_head_sizes(features: int, heads: int, groups: int) -> None:
    q, summary = torch.randn(2, heads, 1, features), summaries(2, 75, groups, features)
    used = torch.tensor([75, 33])
    torch.testing.assert_close(
        page_scores(q, summary, used).double(), expected_scores(q, summary, used), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("tokens", [1, 5, 8, 21])
def test_the_best_token_of_the_step_counts(tokens: int) -> None:
    q, summary, used = torch.randn(1, 8, tokens, 64), summaries(1, 20, 2, 64), torch.tensor([19])
    torch.testing.assert_close(
        page_scores(q, summary, used).double(), expected_scores(q, summary, used), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("summary_dtype", [torch.float16, torch.float32])
def test_half_precision_queries(summary_dtype: torch.dtype) -> None:
    """Products of float16 numbers are exact in float32, so only the order of the sum is the kernel's own."""
    q, summary = torch.randn(2, 4, 2, 128).half(), summaries(2, 9, 2, 128).to(summary_dtype)
    used = torch.tensor([9, 4])
    torch.testing.assert_close(
        page_scores(q, summary, used).double(), expected_scores(q, summary, used), rtol=1e-5, atol=1e-4
    )


def test_scores_below_zero() -> None:
    """Rows of a tile that belong to no query would have 0."""
    q, summary, used = torch.rand(1, 2, 3, 64), -1 - summaries(1, 5, 1, 64).abs(), torch.tensor([5])
    summary = summary.sort(3).values
    scores = page_scores(q, summary, used)
    assert scores.max() < 0
    torch.testing.assert_close(scores.double(), expected_scores(q, summary, used), rtol=1e-5, atol=1e-4)


def test_queries_need_not_be_contiguous() -> None:
    tokens_first = torch.randn(2, 3, 4, 64)
    q, summary, used = tokens_first.transpose(1, 2), summaries(2, 7, 2, 64), torch.tensor([7, 7])
    assert torch.equal(page_scores(q, summary, used), page_scores(q.contiguous(), summary, used))


@pytest.mark.parametrize("used", [[0, 0], [0, 70], [1, 64], [63, 65]])
def test_what_absent_pages_hold_does_not_matter(used: list[int]) -> None:
    q, summary, lengths = torch.randn(2, 4, 1, 64), summaries(2, 70, 2, 64), torch.tensor(used)
    poisoned = summary.clone()
    for b, here in enumerate(used):
        poisoned[b, here:] = NAN
    scores = page_scores(q, poisoned, lengths)
    assert scores.isneginf().sum(-1).tolist() == [[70 - here] * 2 for here in used]
    torch.testing.assert_close(scores.double(), expected_scores(q, summary, lengths), rtol=1e-5, atol=1e-4)


def test_a_product_that_is_no_number_does_not_count() -> None:
    q, summary = torch.randn(1, 2, 2, 64), summaries(1, 5, 1, 64)
    q[0, 1, 0, 3] = NAN
    summary[0, 2, 0, :, 7] = NAN
    scores = page_scores(q, summary, torch.tensor([5]))[0, 0]
    assert scores[2] == -INF and torch.isfinite(scores[[0, 1, 3, 4]]).all()


def test_scores_go_on_to_the_selection_as_they_are() -> None:
    """Rows of an odd number of scores lie apart as the selection wants them: no copy between the two."""
    q, summary, used = torch.randn(2, 4, 1, 64), summaries(2, 13, 2, 64), torch.tensor([13, 6])
    scores = page_scores(q, summary, used)
    pages, _ = select_pages(scores, used, 3)
    assert pages[1, 1].tolist() == expected_pages(scores[1, 1], 6, 3)
    with recording() as launches:
        scores = page_scores(q.to("meta"), summary.to("meta"), used.to("meta"))
        pages, counts = select_pages(scores, used.to("meta"), 3)
    assert [launch.label.split()[0] for launch in launches] == ["page_scores", "select_pages"]
    assert launches[1].arguments["scores"] is scores
    assert (pages.shape, counts.shape) == ((2, 2, 3), (2, 2))


@pytest.mark.parametrize("pages", [1, 7, 64, 1023, 1025, 3001, RESIDENT, RESIDENT + 1, 2 * RESIDENT + 5])
@pytest.mark.parametrize("share", [16, 2])
def test_selection_of_random_scores(pages: int, share: int) -> None:
    check_selection(torch.randn(2, 2, pages), [pages, pages // 2], max(1, pages // share))


@pytest.mark.parametrize("pages", [100, RESIDENT + 100])
def test_ties_keep_the_lower_page(pages: int) -> None:
    check_selection(torch.zeros(1, 1, pages), [pages], 7)
    check_selection(torch.randint(0, 3, (2, 2, pages)).float(), [pages, pages - 3], pages // 2)


def test_zeros_of_either_sign_are_equal() -> None:
    check_selection(torch.tensor([[[-0.0, 0.0, -0.0, 0.0, -1.0]]]), [5], 2)


def test_infinities_and_numbers_that_are_none() -> None:
    scores = torch.tensor([NAN, -INF, INF, 3.0, NAN, INF, -INF, -3.0e38, 1e-45, -1e-45])
    for keep in range(1, 12):
        check_selection(torch.stack((scores, scores.flip(0)))[None], [10], keep)
    check_selection(torch.full((1, 1, 9), NAN), [9], 4)
    check_selection(torch.full((1, 1, 9), -INF), [9], 4)


@pytest.mark.parametrize("keep", [1, 4, 5, 6, 2000])
def test_more_wanted_than_there_are(keep: int) -> None:
    check_selection(torch.randn(4, 3, 5), [0, 1, 4, 5], keep)


def test_scores_may_lie_anywhere() -> None:
    """Rows that do not start at multiples of 16 bytes, one after the other, are copied."""
    scores = torch.randn(3, 2, 24)
    apart = [scores[:, :, ::2], scores.transpose(0, 1), scores[..., 1:12], scores[:, :1].expand(3, 2, 24)]
    for view in (*apart, scores[..., :11], scores[1:, :, 4:23], scores[0, 0].expand(3, 2, 24)):
        check_heads(view, [10, 7, 9][: len(view)], 3)


def test_a_count_past_the_end_is_the_end() -> None:
    pages, counts = select_pages(torch.randn(1, 2, 11), torch.tensor([40]), 12)
    assert pages[0].tolist() == [[*range(11), -1]] * 2 and counts.tolist() == [[11, 11]]


def test_nothing_to_keep_is_refused() -> None:
    with pytest.raises(ValueError, match="keep is 0"):
        select_pages(torch.zeros(1, 1, 4), torch.tensor([4]), 0)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_scores(data: st.DataObject) -> None:
    """Few distinct values, so that ties at the threshold are the rule."""
    values = data.draw(st.lists(st.floats(width=32), min_size=1, max_size=5))
    row = data.draw(st.lists(st.sampled_from(values), min_size=1, max_size=40))
    used, keep = data.draw(st.integers(0, len(row))), data.draw(st.integers(1, 45))
    check_selection(torch.tensor(row, dtype=torch.float32)[None, None], [used], keep)
