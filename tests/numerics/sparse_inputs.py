"""Steps that select pages: the arguments of ``score_pages`` and ``choose_pages``, and lists for attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from graphwright.ir.codecs import PageShape
from graphwright.ir.ops import SEMANTIC_OPS
from graphwright.ir.packed_ops import page_count
from graphwright.ir.selectors import parse_selector
from tests.numerics.inputs import after_append, randn, step
from tests.numerics.packed_inputs import Packing, packed_step

Arguments = dict[str, Any]


def selection(
    *,
    tokens: int,
    lengths: list[int],
    counts: list[int] | None = None,
    dense: list[int] | None = None,
    page: int = 16,
    first: int = 0,
    recent: int = 32,
    settled: int = 0,
) -> Arguments:
    """What both ops say about a step of a chain."""
    at = torch.tensor(lengths)
    return dict(
        positions=at[:, None] + torch.arange(tokens),
        lengths=at,
        counts=torch.tensor(counts or [tokens] * len(lengths)),
        dense=torch.tensor(dense or [0] * len(lengths)),
        page=page,
        first=first,
        recent=recent,
        settled=settled,
    )


def pages_of(chosen: Arguments) -> int:
    """Pages of tensors that have room for a step, and for two more."""
    last = int((chosen["lengths"] + chosen["counts"]).max())
    return page_count(last, chosen["page"], chosen["first"], 0) + 2


def score_step(
    dtype: torch.dtype,
    selector: str,
    *,
    heads: tuple[int, int] = (6, 2),
    width: int = 64,
    **options: Any,
) -> Arguments:
    """Arguments of ``score_pages``; what is no candidate's summary is NaN where the reference allows it."""
    chosen = selection(**options)
    (h, g), batch, pages = heads, len(chosen["lengths"]), pages_of(chosen)
    kind = parse_selector(selector)
    shape = PageShape(g, chosen["page"], width)
    keys = randn(batch * pages, g, chosen["page"], width, dtype=dtype)
    constants = kind.constants(shape, h, _samples(g, h, width))
    tokens = torch.zeros(batch * pages, chosen["page"], dtype=torch.int64) if kind.needs_tokens else None
    summary = kind.summarize(keys, constants, tokens)
    return dict(
        q=randn(batch, options["tokens"], h, width, dtype=dtype).transpose(1, 2),
        summary=[x.unflatten(0, (batch, pages)) for x in summary.values()],
        constants=list(constants.values()),
        selector=selector,
        groups=g,
        scale=width**-0.5,
        **chosen,
    )


def _samples(groups: int, heads: int, width: int) -> Any:
    from graphwright.ir.selectors.selector import Samples

    return Samples(torch.randn(groups, 8, width), torch.randn(heads, 8, width))


SELECTIONS: dict[str, Arguments] = {
    "one-token": dict(tokens=1, lengths=[700]),
    "draft": dict(tokens=5, lengths=[300, 90], page=24),
    "nothing-to-choose": dict(tokens=2, lengths=[0, 3, 40]),
    "first-and-settled": dict(tokens=3, lengths=[290, 100], first=4, settled=7, page=32, recent=40),
    "small-pages": dict(tokens=2, lengths=[150], page=5, recent=6),
}


def score_cases(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    """Steps of ``score_pages`` whose every query selects, by name."""
    for selector in ("bounds", "mean"):
        for name, options in SELECTIONS.items():
            yield f"{selector}-{name}", score_step(dtype, selector, **options)
        yield f"{selector}-smollm2", score_step(dtype, selector, tokens=2, lengths=[400], heads=(9, 3))
        yield f"{selector}-odd", score_step(dtype, selector, tokens=1, lengths=[400], heads=(4, 1), width=35)


def choose_step(
    *, groups: int = 2, sinks: int = 1, keep: float = 0.25, share: float = 0.0, **options: Any
) -> Arguments:
    """Arguments of ``choose_pages``; some scores are equal."""
    chosen = selection(**options)
    shape = (len(chosen["lengths"]), options["tokens"], groups, pages_of(chosen))
    scores = torch.rand(shape).mul(16).round().div(16) ** 2  # their sums are exact in any order
    return dict(scores=scores, sinks=sinks, keep=keep, share=share, **chosen)


def choose_cases(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    """Steps of ``choose_pages``, by name; scores are float32 whatever the model's dtype is."""
    for name, options in SELECTIONS.items():
        yield name, choose_step(**options)
        yield f"{name}-share", choose_step(share=0.6, keep=0.5, **options)
    yield "dense-tokens", choose_step(tokens=4, lengths=[300, 200], dense=[2, 4])
    yield "padding", choose_step(tokens=4, lengths=[300, 200], counts=[1, 0])
    yield "too-long", choose_step(tokens=65, lengths=[300])


def with_lists(
    arguments: Arguments,
    groups: int,
    *,
    page: int = 16,
    first: int = 0,
    keep: float = 0.25,
    recent: int = 24,
    settled: int = 0,
    dense: list[int] | None = None,
) -> Arguments:
    """Arguments of attention over a cache with lists that random scores choose."""
    counts = arguments["counts"]
    step_of = {name: arguments[name] for name in ("positions", "lengths", "counts")}
    tail = dict(page=page, first=first, recent=recent, settled=settled)
    pages = page_count(int((arguments["lengths"] + counts).max()), page, first, 0) + 1
    batch, tokens = arguments["positions"].shape
    lists, chosen = SEMANTIC_OPS["choose_pages"].reference(
        torch.rand(batch, tokens, groups, pages),
        dense=torch.tensor(dense or [0] * batch),
        sinks=1,
        keep=keep,
        share=0.0,
        **step_of,
        **tail,
    )
    place = torch.arange(pages)
    lists = torch.where(place < chosen[..., None], lists, 10**6)  # nobody may read what is not chosen
    return dict(arguments, pages=lists, chosen=chosen, page=page, first=first)


LISTED: dict[str, tuple[Arguments, Arguments]] = {
    "one-token": (dict(tokens=1, lengths=[560], heads=(9, 3), slots=600), dict(keep=0.125)),
    "draft-ragged": (dict(tokens=5, lengths=[290, 12, 100], counts=[5, 2, 0]), dict()),
    "first": (dict(tokens=3, lengths=[250, 2]), dict(first=4, page=32)),
    "odd-pages": (dict(tokens=3, lengths=[250], dims=(7, 5)), dict(page=11, first=3, keep=0.5)),
    "tree": (dict(tokens=15, lengths=[200, 0], tree=True, sinks=True), dict()),
    "softcap": (dict(tokens=2, lengths=[260], softcap=3.0), dict()),
    "dense-and-not": (dict(tokens=9, lengths=[200, 150, 90]), dict(dense=[9, 4, 0])),
    "all-dense": (dict(tokens=9, lengths=[200]), dict(dense=[9])),
    "many-heads": (dict(tokens=2, lengths=[200], heads=(40, 1), dims=(16, 16)), dict(dense=[1])),
}


def listed_cases(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    """Steps of ``cache_attention`` with lists, by name."""
    for name, (options, lists) in LISTED.items():
        arguments = after_append(step(dtype, **options))
        yield f"listed-{name}", with_lists(arguments, arguments["keys"].shape[1], **lists)


def listed_packed_step(dtype: torch.dtype, codecs: tuple[str, str], **options: Any) -> Arguments:
    """Arguments of ``packed_attention`` with lists; both stores have the same pages."""
    page, first, dense = options.pop("page", 32), options.pop("first", 0), options.pop("dense", None)
    lags = options.pop("lags", (8, 8))
    stores = [Packing(codec, page, first, lag) for codec, lag in zip(codecs, lags, strict=True)]
    arguments = packed_step(dtype, *stores, **options)
    lists = dict(page=page, first=first, settled=max(lags), recent=max(lags) + options["tokens"])
    return with_lists(arguments, arguments["keys"][1].shape[1], dense=dense, **lists)


PLAIN = ("channel_range >> uniform(bits=8)", "token_scale >> uniform(bits=4)")
LISTED_PACKED: dict[str, Arguments] = {
    "one-token": dict(tokens=1, lengths=[460], heads=(9, 3), page=16),
    "nothing-packed": dict(tokens=3, lengths=[0, 5, 31, 36], first=4),
    "padding-row": dict(tokens=4, lengths=[300, 130], counts=[4, 0], sinks=True, first=4),
    "tree": dict(tokens=7, lengths=[325, 0], tree=True),
    "dense-and-not": dict(tokens=5, lengths=[300, 150], dense=[5, 2], page=24, lags=(40, 9)),
}


def listed_packed_cases(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    """Steps of ``packed_attention`` with lists, by name."""
    for name, options in LISTED_PACKED.items():
        yield f"listed-{name}", listed_packed_step(dtype, PLAIN, **dict(options))
