"""The ops of sparse attention on small cases whose results are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphwright.ir.ops import SEMANTIC_OPS
from graphwright.ir.sparse_ops import SPARSE_TOKENS, candidate_pages, pages_so_far
from tests.numerics.sparse_inputs import listed_packed_step, selection

SCORE, CHOOSE = (SEMANTIC_OPS[name].overload for name in ("score_pages", "choose_pages"))
ATTEND, PACKED, READ = (
    SEMANTIC_OPS[name].overload for name in ("cache_attention", "packed_attention", "cache_read")
)


def choose(scores: list[float], length: int, **options: Any) -> list[int]:
    """The pages that the only query of a step after ``length - 1`` tokens reads."""
    rest = {"sinks": 1, "keep": 0.5, "share": 0.0}
    rest.update({name: options.pop(name) for name in list(options) if name in rest})
    step = selection(tokens=1, lengths=[length - 1], **options)
    lists, chosen = CHOOSE(torch.tensor(scores).view(1, 1, 1, -1), **step, **rest)
    return lists[0, 0, 0, : int(chosen)].tolist()


def test_the_newest_pages_are_no_candidates() -> None:
    positions, lengths = torch.tensor([[159, 160, 175, 176]]), torch.tensor([159])
    # 160 tokens, 32 recent: 8 whole pages are older; the 9th is with 176 tokens.
    assert candidate_pages(positions, lengths, 16, 0, 32, 0).tolist() == [[8, 8, 9, 9]]
    assert candidate_pages(positions, lengths, 16, 0, 32, 40).tolist() == [[7, 7, 7, 7]]
    assert candidate_pages(positions, lengths, 16, 1, 32, 0).tolist() == [[7, 8, 8, 9]]
    assert candidate_pages(torch.tensor([[5]]), torch.tensor([5]), 16, 0, 32, 0).tolist() == [[0]]
    assert pages_so_far(positions, 16, 0).tolist() == [[10, 11, 11, 12]]
    assert pages_so_far(torch.tensor([[2, 4, 20]]), 16, 4).tolist() == [[0, 1, 2]]


SCORES = [0.0, 0.1, 0.3, 0.05, 0.2, 0.25, 0.02, 0.08, 9.0, 9.0]


def test_the_budget_counts_the_pages_that_are_always_read() -> None:
    # Pages 0, 8 and 9 are; half of ten are five.
    assert choose(SCORES, 160) == [0, 2, 5, 8, 9]
    assert choose(SCORES, 160, sinks=0) == [2, 4, 5, 8, 9]
    assert choose(SCORES, 160, sinks=3) == [0, 1, 2, 8, 9]
    assert choose(SCORES, 160, keep=0.41) == [0, 2, 5, 8, 9]  # rounded up
    assert choose(SCORES, 160, keep=1.0) == list(range(10))


def test_pages_that_are_always_read_may_be_more_than_the_budget() -> None:
    assert choose(SCORES, 160, keep=0.1) == [0, 8, 9]
    assert choose(SCORES, 160, keep=0.1, recent=80) == [0, 5, 6, 7, 8, 9]


def test_of_equal_pages_the_lower_one_is_read() -> None:
    assert choose([0.0, 0.1, 0.2, 0.2, 0.2, 0.2, 0.2, 0.1, 0, 0], 160) == [0, 2, 3, 8, 9]
    assert choose([0.0] * 10, 160) == [0, 1, 2, 8, 9]


def test_a_share_of_the_mass_takes_the_fewest_pages() -> None:
    scores = [0.0, 0.0625, 0.5, 0.0, 0.25, 0.125, 0.0, 0.0625, 0, 0]
    shares = {0.3: [2], 0.5: [2], 0.51: [2, 4], 0.75: [2, 4], 0.8: [2, 4, 5], 0.95: [1, 2, 4, 5, 7]}
    for share, pages in shares.items():
        assert choose(scores, 160, share=share, keep=1.0) == [0, *pages, 8, 9], share
    assert choose(scores, 160, share=0.8, keep=0.5) == [0, 2, 4, 8, 9]  # no more than the budget
    # The mass of the first page is not counted: it is read anyhow.
    assert choose([7.0, *scores[1:]], 160, share=0.5, keep=1.0) == [0, 2, 8, 9]
    assert choose([0.0] * 10, 160, share=0.5, keep=1.0) == [0, 8, 9]


def test_where_there_is_nothing_to_choose_all_is_read() -> None:
    for length in (1, 16, 17, 47):
        assert choose([9.0] * 4, length) == list(range(-(-length // 16)))
    assert choose([9.0] * 4, 3, first=4) == []
    assert choose([9.0] * 4, 5, first=4) == [0]


def test_rows_have_lengths_of_their_own_and_tokens_lists_of_their_own() -> None:
    step = selection(tokens=2, lengths=[159, 20], dense=[0, 1])
    scores = torch.tensor([*SCORES, 0.0, 0.0]).expand(2, 2, 1, 12).clone()
    scores[0, 1, 0, 3] = 1.0
    lists, chosen = CHOOSE(scores, sinks=1, keep=0.5, share=0.0, **step)
    assert chosen.tolist() == [[[5], [6]], [[-1], [2]]]
    assert lists[0, 0, 0, :5].tolist() == [0, 2, 5, 8, 9]
    assert lists[0, 1, 0, :6].tolist() == [0, 2, 3, 8, 9, 10]
    assert lists[1, 1, 0, :2].tolist() == [0, 1]
    assert lists.dtype == chosen.dtype == torch.int32


def test_long_steps_read_everything() -> None:
    for tokens, alone in ((SPARSE_TOKENS, False), (SPARSE_TOKENS + 1, True)):
        step = selection(tokens=tokens, lengths=[300], recent=100)
        _, chosen = CHOOSE(torch.rand(1, tokens, 2, 30), sinks=1, keep=0.25, share=0.0, **step)
        assert bool((chosen == -1).all()) == alone and bool((chosen == -1).any()) == alone
        q, summary = torch.randn(1, 2, tokens, 8), torch.randn(1, 30, 1, 2, 8)
        options = dict(selector="bounds", groups=1, scale=1.0, **step)
        assert SCORE(q, [summary], [], **options).shape == (1, tokens, 1, 30)


def test_scores_are_shares_of_the_candidates() -> None:
    step = selection(tokens=1, lengths=[79], page=16, recent=32)  # pages 0, 1 and 2 are candidates
    low = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [-3.0, 1.0], [50.0, 50.0], [50.0, 50.0]])
    high = torch.tensor([[1.0, 0.0], [2.0, 5.0], [0.0, 1.0], [60.0, 60.0], [60.0, 60.0]])
    summary = torch.stack((low, high), 1)[None, :, None]  # [B, N, G, 2, D]
    q = torch.tensor([[1.0, 0.0], [-2.0, 1.0]])[None, :, None]
    found = SCORE(q, [summary], [], selector="bounds", groups=1, scale=0.5, **step)
    # The highest q.k: 1, 2, 0 of the first head and 2, 5, 7 of the second.
    heads = torch.tensor([[1.0, 2.0, 0.0], [2.0, 5.0, 7.0]]) * 0.5
    torch.testing.assert_close(found[0, 0, 0, :3], heads.softmax(-1).mean(0))
    assert not found[0, 0, 0, 3:].any()
    mean = SCORE(q, [high[None, :, None]], [], selector="mean", groups=1, scale=0.5, **step)
    heads = torch.einsum("hd,nd->hn", q[0, :, 0], high[:3]) * 0.5
    torch.testing.assert_close(mean[0, 0, 0, :3], heads.softmax(-1).mean(0))
    short = selection(tokens=1, lengths=[7])
    assert not SCORE(q, [summary], [], selector="bounds", groups=1, scale=0.5, **short).any()


@pytest.mark.parametrize("first", [0, 3])
def test_attention_over_lists_is_attention_over_their_tokens(first: int) -> None:
    q, keys, values = (torch.randn(1, *shape) for shape in ((4, 1, 8), (2, 60, 8), (2, 60, 8)))
    step = dict(positions=torch.tensor([[52]]), lengths=torch.tensor([52]), counts=torch.tensor([1]))
    rest = dict(tree=torch.zeros(1, 0, dtype=torch.int64), scale=0.3)
    pages = torch.full((1, 1, 2, 6), 77, dtype=torch.int32)
    own = [[1, 3, 5], [0, 4]]
    for group, numbers in enumerate(own):
        pages[0, 0, group, : len(numbers)] = torch.tensor(numbers)
    chosen = torch.tensor([[[3, 2]]], dtype=torch.int32)
    found = ATTEND(q, keys, values, **step, **rest, pages=pages, chosen=chosen, page=10, first=first)
    for group, numbers in enumerate(own):
        read = [n for n in range(53) if n < first or n == 52 or (n - first) // 10 in numbers]
        weights = (q[0, 2 * group : 2 * group + 2, 0] @ keys[0, group, read].T * 0.3).softmax(-1)
        expected = weights @ values[0, group, read]
        torch.testing.assert_close(found[0, 0, 2 * group : 2 * group + 2], expected)
    everything = ATTEND(q, keys, values, **step, **rest, pages=pages, chosen=chosen * 0 - 1, page=10)
    assert torch.equal(everything, ATTEND(q, keys, values, **step, **rest))


def test_packed_lists_read_what_the_unpacked_ones_read() -> None:
    step = listed_packed_step(
        torch.float32, ("channel_range >> uniform(bits=8)",) * 2, tokens=2, lengths=[200, 90], first=4
    )
    stores = [
        READ(step[f"{side}s"], step[f"{side}_constants"], step["slots"][:, :, :210], step["lengths"],
             step["counts"], step[f"{side}_codec"], step[f"{side}_page"])
        for side in ("key", "value")
    ]  # fmt: skip
    shared = ("positions", "lengths", "counts", "tree", "scale", "sinks", "pages", "chosen", "page", "first")
    plain = ATTEND(step["q"], *stores, **{name: step[name] for name in shared})
    torch.testing.assert_close(PACKED(**step), plain, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(plain, PACKED(**{**step, "chosen": step["chosen"] * 0 - 1}), atol=1e-3)
