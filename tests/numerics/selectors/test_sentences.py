"""``sentences``: which tokens make a piece, and what a page of pieces scores."""

from __future__ import annotations

import pytest
import torch

from graphwright.ir.errors import SelectorError
from graphwright.ir.selectors.selector import Samples
from tests.numerics.selectors.pages import HEADS, SCALE, SHAPE, normal, summarize

ENDS = Samples(ends=torch.tensor([False, True, False]))
#: Pages of 8 tokens, of which 1 ends a sentence, and how many tokens the pieces have.
PIECES = {
    (0, 2, 1, 0, 0, 0, 0, 0): [3, 5],
    (0, 0, 0, 0, 0, 0, 0, 1): [8, 0],
    (1, 0, 0, 0, 0, 0, 0, 0): [1, 7],
    (0, 1, 1, 0, 1, 0, 0, 0): [2, 6],
    (0, 0, 0, 7, 99, 0, 2, 2): [8, 0],  # 7 and 99 are not in the table
}


def pages(samples: Samples = ENDS, text: str = "sentences"):  # type: ignore[no-untyped-def]
    """Random keys as pages of these tokens, and their summaries."""
    keys = normal(1, len(PIECES), SHAPE.groups, SHAPE.tokens, SHAPE.features)
    return keys, summarize(text, keys, torch.tensor([list(PIECES)]), samples)


def test_pieces_have_their_mean_keys_and_the_last_one_takes_the_rest() -> None:
    keys, found = pages()
    assert found.summary["counts"].tolist() == [list(PIECES.values())]
    for page, (head, rest) in enumerate(PIECES.values()):
        means = found.summary["means"][0, page]
        assert torch.allclose(means[:, 0], keys[0, page, :, :head].mean(1), atol=1e-6)
        last = keys[0, page, :, head:].mean(1) if rest else torch.zeros_like(means[:, 1])
        assert torch.allclose(means[:, 1], last, atol=1e-6)


def test_more_parts_keep_more_pieces() -> None:
    _, found = pages(text="sentences(parts=4)")
    assert found.summary["counts"][0, 3].tolist() == [2, 1, 2, 3]


def test_scores_weigh_pieces_by_their_tokens() -> None:
    keys, found = pages()
    q = normal(1, HEADS, 2, SHAPE.features, seed=1)
    scores = found.score(q)
    for head in range(HEADS):
        group = head * SHAPE.groups // HEADS
        for page, (first, rest) in enumerate(PIECES.values()):
            own = keys[0, page, group].double()
            mass = first * (SCALE * q[0, head].double() @ own[:first].mean(0)).exp()
            if rest:
                mass += rest * (SCALE * q[0, head].double() @ own[first:].mean(0)).exp()
            assert torch.allclose(scores[0, head, :, page], mass.log(), atol=1e-6)


def test_without_a_tokenizer_it_is_the_mean() -> None:
    keys, found = pages(Samples())
    assert found.constants["ends"].tolist() == [False]
    q = normal(1, HEADS, 2, SHAPE.features, seed=1)
    apart = found.score(q) - summarize("mean", keys).score(q)
    assert torch.allclose(apart, torch.tensor(float(SHAPE.tokens)).log().double(), atol=1e-6)


def test_tokens_are_needed() -> None:
    keys, found = pages()
    with pytest.raises(SelectorError, match="by their tokens"):
        found.selector.summarize(keys[0], found.constants, None)
