"""``spans``: which are kept, what comes after them, and spans that are not whole."""

from __future__ import annotations

import pytest
import torch

from tests.numerics.selectors.pages import HEADS, SHAPE, normal, summarize

PAGES = 22


def some_keys(pages: int = PAGES) -> torch.Tensor:
    """``[2, N, G, P, D]``."""
    return normal(2, pages, SHAPE.groups, SHAPE.tokens, SHAPE.features)


def kept_spans(keys: torch.Tensor, q: torch.Tensor, span: int, whole: int, count: int) -> torch.Tensor:
    """Numbers of the best whole spans by their mean keys, ``[B, H, T, count]``."""
    means = keys[:, : whole * span].mean(3).unflatten(1, (whole, span)).mean(2)  # [B, spans, G, D]
    repeated = means.repeat_interleave(q.shape[1] // means.shape[2], dim=2)
    return torch.einsum("bhtd,bshd->bhts", q, repeated).topk(count, dim=-1).indices


@pytest.mark.parametrize(
    ("text", "span", "kept"),
    [
        ("spans(pages=4)", 4, 3), ("spans(pages=4, spans=2)", 4, 2), ("spans(pages=2)", 2, 4),
        ("spans(pages=30)", 30, 0),
    ],
)  # fmt: skip
def test_pages_of_the_best_spans_come_first(text: str, span: int, kept: int) -> None:
    """Automatically, the square root of the whole spans is kept: 3 of 5, 4 of 11."""
    keys, q = some_keys(), normal(2, HEADS, 3, SHAPE.features, seed=1)
    scores, mean = summarize(text, keys).score(q), summarize("mean", keys).score(q)
    whole = PAGES // span
    looked_at = torch.arange(PAGES).expand(scores.shape) >= whole * span
    if whole:
        best = kept_spans(keys, q, span, whole, kept)
        looked_at = looked_at | (torch.arange(PAGES)[:, None] // span == best[..., None, :]).any(-1)
    assert (looked_at.sum(-1) == kept * span + PAGES - whole * span).all()
    assert torch.allclose(scores[looked_at], mean[looked_at], atol=1e-6)
    worst = scores.masked_fill(~looked_at, torch.inf).amin(-1, keepdim=True)
    assert ((scores < worst) | looked_at).all()


def test_pages_of_other_spans_are_in_the_order_of_their_spans() -> None:
    keys, q = some_keys(24), normal(2, HEADS, 3, SHAPE.features, seed=1)
    found = summarize("spans(pages=4, spans=2)", keys)
    order = found.score(q)[..., ::4].argsort(-1, descending=True)[..., 2:]
    assert torch.equal(order, kept_spans(keys, q, 4, 6, 6)[..., 2:])


def test_what_a_query_may_not_know_changes_nothing() -> None:
    """Spans that are not whole among its candidates, and pages after those."""
    keys, q = some_keys(), normal(2, HEADS, 2, SHAPE.features, seed=1)
    found = summarize("spans(pages=4, spans=1)", keys)
    closed = torch.tensor([[10, 11], [3, 13]])
    scores = found.score(q, closed)
    for name, (of, span) in {"mean": (PAGES, 1), "span_mean": (6, 4)}.items():
        spoiled = dict(found.summary)
        spoiled[name] = found.summary[name].clone()
        for row in range(2):
            spoiled[name][row, (int(closed[row].max()) // span) :] = 99.0
        assert spoiled[name].shape[1] == of
        again = found._replace(summary=spoiled).score(q, closed)
        for row in range(2):
            for t in range(2):
                count = int(closed[row, t])
                assert torch.equal(again[row, :, t, :count], scores[row, :, t, :count])
    # Of 3 pages no span is whole; of 13, three are and one page is beside them.
    mean = summarize("mean", keys).score(q)
    same = (scores - mean).abs() < 1e-6
    assert same[1, :, 0, :3].all() and (same[1, :, 1, :13].sum(-1) == 4 + 1).all()
