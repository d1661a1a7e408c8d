"""What holds of every selector: its layout, its text, its scores, and what it is worth."""

from __future__ import annotations

import math

import pytest
import torch

from graphwright.ir.codecs.part import PageShape
from graphwright.ir.errors import SelectorError
from graphwright.ir.selectors import parse_selector, registered_selectors
from graphwright.ir.selectors.selector import Samples
from graphwright.ir.sparse_ops import choose_pages, score_pages
from graphwright.optimizer.catalog import selectors as catalog
from tests.numerics.selectors.pages import HEADS, SCALE, SHAPE, exact_mass, normal, summarize

#: Texts that use the options of selectors; of the others the name is one.
EXAMPLES: dict[str, tuple[str, ...]] = {
    "channels": ("channels(count=4)", "channels(count=6, bits=4)", "channels(count=8, bits=8)"),
    "hashing": ("hashing", "hashing(bits=24, rounds=2)"),
    "sentences": ("sentences", "sentences(parts=3)"),
    "spans": ("spans", "spans(pages=3, spans=1)"),
}
TEXTS = [text for name in sorted(registered_selectors()) for text in EXAMPLES.get(name, (name,))]
PAGES = 11

every_selector = pytest.mark.parametrize("text", TEXTS)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def some_keys(batch: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``[B, N, G, P, D]``."""
    return normal(batch, PAGES, SHAPE.groups, SHAPE.tokens, SHAPE.features, dtype=dtype)


def test_every_selector_has_a_line_in_the_catalog() -> None:
    assert set(EXAMPLES) <= set(registered_selectors())
    listed = {name for name in catalog() if not name.startswith("evict_tokens{")}
    assert listed == {"all", *registered_selectors()}
    for name, cls in registered_selectors().items():
        assert cls.source and cls.source in catalog()[name] and cls.summary in catalog()[name]


@every_selector
@both_dtypes
def test_summaries_are_as_the_layout_says(text: str, dtype: torch.dtype) -> None:
    selector = parse_selector(text)
    found = summarize(text, some_keys(dtype=dtype))
    layout = selector.layout(SHAPE, dtype)
    for name, (size, kind, span) in layout.items():
        kept = found.summary[name]
        assert kept.shape == (2, -(-PAGES // span), *size) and kept.dtype == kind
    assert next(iter(layout.values())).span == 1
    stored = sum(kept[0, 0].nbytes / layout[name].span for name, kept in found.summary.items())
    assert selector.page_bytes(SHAPE, dtype) == pytest.approx(stored)
    assert selector.constant_names(SHAPE) == list(found.constants)
    assert parse_selector(str(selector)) == selector and hash(selector) == hash(parse_selector(text))


@every_selector
@both_dtypes
def test_a_query_is_scored_alike_alone_and_in_company(text: str, dtype: torch.dtype) -> None:
    keys, q = some_keys(dtype=dtype), normal(2, HEADS, 8, SHAPE.features, seed=1, dtype=dtype)
    found = summarize(text, keys)
    together = found.score(q)
    assert together.shape == (2, HEADS, 8, PAGES) and together.isfinite().all()
    alone = torch.cat([found.score(q[:, :, t : t + 1]) for t in range(8)], dim=2)
    assert torch.equal(alone.float(), together.float())
    second = summarize(text, keys)._replace(
        summary={name: kept[1:] for name, kept in summarize(text, keys).summary.items()}
    )
    assert torch.equal(second.score(q[1:]).float(), together[1:].float())


@every_selector
def test_pages_are_summarized_alike_alone_and_in_company(text: str) -> None:
    tokens = torch.arange(2 * PAGES * SHAPE.tokens).view(2, PAGES, -1) % 50
    together = summarize(text, some_keys(), tokens)
    alone = summarize(text, some_keys()[:, 3:4], tokens[:, 3:4])
    for name, (_, _, span) in together.selector.layout(SHAPE, torch.float32).items():
        if span == 1:
            assert torch.equal(alone.summary[name], together.summary[name][:, 3:4])


@every_selector
@both_dtypes
def test_pages_that_were_never_written_have_finite_scores(text: str, dtype: torch.dtype) -> None:
    found = summarize(text, some_keys(dtype=dtype))
    empty = {name: torch.zeros_like(kept) for name, kept in found.summary.items()}
    q = normal(2, HEADS, 3, SHAPE.features, dtype=dtype)
    for closed in (0, 4, PAGES):
        scores = found._replace(summary=empty).score(q, torch.full((2, 3), closed))
        assert scores.isfinite().all()
    zeros = summarize(text, torch.zeros_like(some_keys(dtype=dtype)))
    assert zeros.score(torch.zeros_like(q)).isfinite().all()


@pytest.mark.parametrize("text", [text for text in TEXTS if text not in ("random", "recent")])
@pytest.mark.parametrize("at", [0, 5, 10])
def test_a_key_like_the_query_brings_its_page_to_the_top(text: str, at: int) -> None:
    keys, q = some_keys(), normal(2, HEADS, 2, SHAPE.features, seed=5)
    for head in range(0, HEADS, HEADS // SHAPE.groups):  # one query of a head of each group
        keys[:, at, head // 2, 3] = q[:, head, 1] * 20
    scores = summarize(text, keys).score(q)
    assert (scores[:, [0, 2], 1].argmax(-1) == at).all()


@pytest.mark.parametrize(
    "text",
    [
        "channels(count=0)", "channels(bits=5)", "spans(pages=1)", "spans(spans=-1)", "hashing(bits=12)",
        "hashing(bits=0)", "hashing(rounds=0)", "sentences(parts=0)",
    ],
)  # fmt: skip
def test_bad_options(text: str) -> None:
    with pytest.raises(SelectorError) as caught:
        parse_selector(text)
    assert caught.value.hint and not caught.value.hint.startswith("for example")


# --- what they are worth ---------------------------------------------------------------------------


_SIZES = 1.5 * torch.linspace(1, 0.2, SHAPE.features)


def _topics(rows: int, pages: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys ``[B, N, G, P, D]`` about topics that last for four pages, and where the last topic is.

    The text drifts, so that what is near is more alike than what is far; features are not equally large.
    """
    size = (rows, pages // 4, SHAPE.groups, SHAPE.features)
    drift = normal(*size, seed=11).cumsum(1) * 0.3
    topics = (drift + normal(*size, seed=12)).repeat_interleave(4, dim=1)[:, :, :, None]
    noise = normal(rows, pages, SHAPE.groups, SHAPE.tokens, SHAPE.features, seed=13)
    return (topics + 0.5 * noise) * _SIZES, drift[:, -1] * _SIZES


def _captured(text: str) -> float:
    """The share of the candidates' attention that a quarter of the pages has, on average."""
    rows, pages, queries = 16, 32, 8
    keys, last = _topics(rows, pages)
    heads = last.repeat_interleave(HEADS // SHAPE.groups, dim=1)[:, :, None]
    q = 0.3 * heads + 1.5 * normal(rows, HEADS, queries, SHAPE.features, seed=14) * _SIZES
    flat = keys.transpose(1, 2).flatten(2, 3).transpose(0, 1).flatten(1, 2)  # [G, n, D]
    sampled = q.transpose(0, 1).flatten(1, 2)
    ratio = flat.shape[1] // sampled.shape[1]
    samples = Samples(flat, sampled.repeat_interleave(ratio, dim=1), torch.arange(50) % 10 == 0)
    filling = torch.zeros_like(keys[:, :1])
    found = summarize(text, torch.cat((keys, filling), dim=1), samples=samples)
    length = torch.full((rows,), pages * SHAPE.tokens)
    step = (
        length[:, None].expand(-1, queries),
        length,
        torch.full((rows,), queries),
        torch.zeros(rows).long(),
    )
    paging = (SHAPE.tokens, 0, 1, 0)
    buffers, tables = list(found.summary.values()), list(found.constants.values())
    weights = score_pages(q, buffers, tables, *step, text, SHAPE.groups, *paging, SCALE)
    lists, chosen = choose_pages(weights, *step, *paging, 0, 0.25, 0.0)
    # A quarter of 33 pages is 9, of which one is being filled.
    assert (chosen == 9).all() and (lists[..., 8] == pages).all()
    mass = exact_mass(q, keys).softmax(-1).unflatten(1, (SHAPE.groups, -1)).mean(2).transpose(1, 2)
    return float(mass.gather(-1, lists[..., :8].long()).sum(-1).mean())


def test_what_a_quarter_of_the_pages_holds() -> None:
    captured = {text: _captured(text) for text in TEXTS}
    best, worst = captured.pop("oracle"), captured.pop("random")
    assert math.isclose(worst, 0.25, abs_tol=0.05)
    assert all(worst < share <= best + 1e-9 for share in captured.values()), captured
    # A summary that looks at keys is worth more than one that does not.
    assert all(share > captured["recent"] for text, share in captured.items() if text != "recent"), captured


def test_keys_have_no_more_channels_than_they_are_wide() -> None:
    narrow = PageShape(2, 8, 12)
    selector = parse_selector("channels")
    assert "12 channels" in str(selector.obstacle(narrow)) and selector.obstacle(SHAPE) is None
    for wrong in (lambda: selector.layout(narrow, torch.float32), lambda: selector.constant_names(narrow)):
        with pytest.raises(SelectorError) as caught:
            wrong()
        assert "12" in str(caught.value.hint)
