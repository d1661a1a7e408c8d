"""Scores of pages and the choice of pages in Triton's interpreter, against the ops' reference bodies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.ir.ops import SEMANTIC_OPS
from graphwright.kernels import registry

pytest.importorskip("triton")

from graphwright.kernels.triton import choose_pages

PAGE, FIRST, RECENT, SETTLED = 4, 3, 6, 2


def kernel(op_name: str, arguments: dict[str, Any]) -> Any:
    """The kernel's result; fails where another would run."""
    found = registry.select(op_name, "cpu", ("triton",), **arguments)
    assert found.provider == "triton", found.reason
    return found(**arguments)


def reference(op_name: str, arguments: dict[str, Any]) -> Any:
    return SEMANTIC_OPS[op_name].overload(**arguments)


def who(lengths: list[int], tokens: int, dense: list[int] | None = None) -> dict[str, Any]:
    """The arguments that say where queries are."""
    at = torch.tensor(lengths)
    return {
        "positions": at[:, None] + torch.arange(tokens),
        "lengths": at,
        "counts": torch.full_like(at, tokens),
        "dense": torch.tensor(dense or [0] * len(lengths)),
        "page": PAGE,
        "first": FIRST,
        "recent": RECENT,
        "settled": SETTLED,
    }


# --- scores ----------------------------------------------------------------------------------------


def scoring(
    lengths: list[int],
    heads: tuple[int, int] = (4, 2),
    tokens: int = 1,
    features: int = 64,
    pages: int = 75,
    selector: str = "bounds",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Arguments of ``score_pages``; summaries that belong to no candidate are huge."""
    batch, (h, g) = len(lengths), heads
    keys = torch.randn(batch, pages, g, PAGE, features)
    summary = torch.stack((keys.amin(3), keys.amax(3)), 3) if selector == "bounds" else keys.mean(3)
    for row, length in enumerate(lengths):
        summary[row, max(0, length - SETTLED - FIRST) // PAGE :] = 1e4
    q = torch.randn(batch, tokens, h, features).to(dtype).transpose(1, 2)
    arguments = who(lengths, tokens)
    return dict(q=q, summary=[summary.to(dtype)], constants=[], **arguments, selector=selector, groups=g,
                scale=features**-0.5)  # fmt: skip


def check_scores(arguments: dict[str, Any]) -> torch.Tensor:
    found = kernel("score_pages", arguments)
    expected = reference("score_pages", arguments)
    assert found.dtype == torch.float32 and found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-7)
    assert torch.equal(found == 0, expected == 0)
    return found


@pytest.mark.parametrize("selector", ["bounds", "mean"])
@pytest.mark.parametrize(("heads", "features"), [((4, 4), 64), ((6, 2), 80), ((8, 1), 128)])
def test_scores_of_groups_and_head_sizes(
    heads: tuple[int, int], features: int, selector: str, poisoned: None
) -> None:
    shares = check_scores(scoring([300, 97], heads, features=features, selector=selector))
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 1, heads[1]))


def test_half_precision_queries() -> None:
    """Products of float16 numbers are exact in float32, so only the order of the sum is the kernel's own."""
    check_scores(scoring([160, 40], tokens=2, features=96, pages=45, dtype=torch.float16))


@pytest.mark.parametrize("lengths", [[0, 1], [8, 12], [13, 15], [268, 269]])
def test_few_candidates_and_blocks_that_end(lengths: list[int], poisoned: None) -> None:
    """Candidates may be none; queries of a step have candidates of their own."""
    check_scores(scoring(lengths, tokens=3, pages=80))


def test_a_query_alone_and_in_a_step(fair_dots: None) -> None:
    step = scoring([290, 33], (8, 2), tokens=9)
    among = check_scores(step)
    for t in (0, 4, 8):
        alone = {**step, "q": step["q"][:, :, t : t + 1], "positions": step["positions"][:, t : t + 1]}
        assert torch.equal(kernel("score_pages", alone)[:, 0], among[:, t])


def test_scores_that_are_left_to_the_reference() -> None:
    arguments = scoring([20])
    prompt = scoring([0], tokens=65, pages=20)
    assert kernel("score_pages", prompt).shape == (1, 65, 2, 20)
    wide = {**arguments, "summary": [arguments["summary"][0].transpose(1, 2).contiguous().transpose(1, 2)]}
    for changed, reason in (
        (wide, "not contiguous"),
        (
            {**arguments, "q": arguments["q"].half()},
            "queries of torch.float16 and summaries of torch.float32",
        ),
        (scoring([20], features=264), "264 features is above 256"),
    ):
        found = registry.select("score_pages", "cpu", ("triton",), **changed)
        assert found.provider == registry.REFERENCE and reason in found.reason


# --- the choice ------------------------------------------------------------------------------------


def choosing(
    scores: torch.Tensor, lengths: list[int], dense: list[int] | None = None, **options: Any
) -> dict[str, Any]:
    """Arguments of ``choose_pages``."""
    more = {"sinks": 1, "keep": 0.5, "share": 0.0, **options}
    return dict(scores=scores, **who(lengths, scores.shape[1], dense), **more)


def check_choice(arguments: dict[str, Any]) -> torch.Tensor:
    """Every query's list is the reference's; the counts."""
    before = copy.deepcopy(arguments)
    pages, chosen = kernel("choose_pages", arguments)
    expected, counts = reference("choose_pages", before)
    assert pages.dtype == chosen.dtype == torch.int32 and pages.shape == expected.shape
    assert torch.equal(chosen, counts)
    there = torch.arange(pages.shape[3]) < chosen[..., None]
    assert torch.equal(pages[there], expected[there])
    return chosen


@pytest.mark.parametrize("share", [0.0, 0.7])
@pytest.mark.parametrize("lengths", [[0, 2], [3, 14], [120, 401]])
def test_choice_among_random_scores(lengths: list[int], share: float, poisoned: None) -> None:
    pages = -(-max(max(lengths) + 5 - FIRST, 1) // PAGE)
    scores = torch.randn(2, 2, 1, pages).mul(3).softmax(-1)
    for keep in (0.0, 0.15, 1.0):
        check_choice(choosing(scores, lengths, keep=keep, share=share))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_more_pages_than_a_program_holds(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose_pages, "RESIDENT", 64)
    monkeypatch.setattr(choose_pages, "_CHUNK", 64)
    scores = torch.randn(2, 1, 1, 160).mul(4).softmax(-1)
    for sinks in (1, 70):
        check_choice(choosing(scores, [640, 400], keep=0.3, share=share, sinks=sinks))
    check_choice(choosing(scores.mul(50).floor(), [640, 400], keep=0.3, share=share))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_ties_take_the_lower_page(share: float) -> None:
    few = torch.randint(0, 3, (2, 1, 1, 90)) / 128
    for scores in (torch.full_like(few, 1 / 64), few, torch.zeros_like(few)):
        check_choice(choosing(scores, [330, 361], keep=0.3, share=share))
    check_choice(choosing(few, [330, 361], keep=1.0, share=share))


@pytest.mark.parametrize("sinks", [0, 1, 3, 40])
def test_pages_that_are_read_in_any_case(sinks: int) -> None:
    """They fill the budget first, and may exceed it."""
    scores = torch.rand(3, 1, 1, 30)
    for keep in (0.0, 0.2, 0.9):
        chosen = check_choice(choosing(scores, [5, 40, 110], sinks=sinks, keep=keep))
    assert chosen[2, 0, 0] >= min(sinks, 27)


def test_queries_that_read_everything() -> None:
    chosen = check_choice(choosing(torch.rand(3, 4, 2, 30), [50, 60, 70], [0, 2, 4]))
    assert (chosen < 0)[:, :, 0].sum(1).tolist() == [0, 2, 4]
    _, prompt = kernel("choose_pages", choosing(torch.rand(1, 65, 1, 30), [0]))
    assert prompt.eq(-1).all()


def test_a_list_alone_and_in_a_step() -> None:
    step = choosing(torch.rand(2, 3, 1, 60), [150, 200], share=0.8)
    pages, chosen = kernel("choose_pages", step)
    for t in range(3):
        alone = {**step, "scores": step["scores"][:, t : t + 1].contiguous(),
                 "positions": step["positions"][:, t : t + 1]}  # fmt: skip
        own, count = kernel("choose_pages", alone)
        there = torch.arange(60) < count[..., None]
        assert torch.equal(count[:, 0], chosen[:, t])
        assert torch.equal(own[there], pages[:, t : t + 1][there])


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_scores(data: st.DataObject) -> None:
    """Few distinct values, so that ties at the threshold are the rule."""
    values = data.draw(st.lists(st.floats(0, 1, width=16), min_size=1, max_size=5))
    row = data.draw(st.lists(st.sampled_from(values), min_size=1, max_size=40))
    length = data.draw(st.integers(0, FIRST + PAGE * len(row) - 1))
    keep, share = data.draw(st.floats(0, 1)), data.draw(st.sampled_from([0.0, 0.5, 0.75]))
    scores = torch.tensor(row, dtype=torch.float32)[None, None, None]
    check_choice(choosing(scores, [length], keep=keep, share=share, sinks=data.draw(st.integers(0, 4))))
