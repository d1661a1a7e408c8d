"""``recent``: the window, also of a very long text."""

from __future__ import annotations

import torch

from graphwright.ir.sparse_ops import choose_pages, score_pages
from tests.numerics.selectors.pages import HEADS, SHAPE, normal


def test_the_newest_pages_fill_the_budget_however_many_there_are() -> None:
    pages, size, sinks = 200_000, 4, 2
    q = normal(1, HEADS, 1, SHAPE.features)
    written = torch.ones((1, pages + 1, 1), dtype=torch.uint8)  # one page is being filled
    length = torch.tensor([pages * size])
    step = (length[:, None], length, torch.ones_like(length), torch.zeros_like(length))
    paging = (size, 0, 1, 0)
    scores = score_pages(q, [written], [], *step, "recent", SHAPE.groups, *paging, 0.25)
    assert (scores[..., :-1].diff(dim=-1) > 0).all()
    lists, chosen = choose_pages(scores, *step, *paging, sinks, 0.75, 0.0)
    count = int(chosen[0, 0, 0])
    assert count == -(-3 * (pages + 1) // 4) and (chosen == count).all()
    wanted = torch.cat((torch.arange(sinks), torch.arange(pages + 1 - (count - sinks), pages + 1)))
    assert torch.equal(lists[0, 0, 1, :count].long(), wanted)
