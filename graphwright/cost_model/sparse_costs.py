"""Cost rules of selecting pages: scoring their summaries, choosing, and writing summaries.

Attention over the chosen pages is priced where attention is (:mod:`graphwright.cost_model.op_costs`), by
what its lists hold (:mod:`graphwright.cost_model.listed_pages`).

A kernel reads the summaries of the candidate pages once and works on them in registers. What the reference
does where there is no kernel is counted by running it on a few pages of zeros. Steps of more than 64 tokens
select nothing.
"""

from __future__ import annotations

from functools import lru_cache

import sympy
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from graphwright.cost_model.codec_work import KernelCounter, Work
from graphwright.cost_model.cost import ACTIVATIONS, CACHE, B, Cost, Expr, T
from graphwright.cost_model.listed_pages import SELECTS, paging_of
from graphwright.cost_model.op_costs import add_parts, cost_of
from graphwright.cost_model.shapes import Call
from graphwright.ir.codecs import PageShape
from graphwright.ir.selectors import parse_selector
from graphwright.ir.selectors.selector import Samples
from graphwright.ir.sparse_ops import choose_pages, score_pages

# Pages that a selector is counted on: as many as share an entry of any summary, so that all is seen.
_PAGES = 64


@cost_of("score_pages")
def _score_pages(call: Call) -> Cost:
    """Scoring the candidates of every query, and summarizing the pages that the step's tokens complete."""
    _, heads, _, width = call.shape("q")
    selector, groups, page = call.arg("selector"), call.arg("groups"), call.arg("page")
    shape, dtype = PageShape(groups, page, int(width)), call.val("q").dtype
    candidates = paging_of(call.node).candidates
    summaries = {CACHE: B * candidates * summary_bytes(selector, shape, dtype)}
    read = add_parts(summaries, call.reads("q", "constants"))
    kernels = call.shapes.streaming.kernels
    if kernels is not None and kernels.scores(selector):
        # Every element of a summary meets one of each query head: a product and a sum.
        flops = 2 * B * T * heads * candidates * _elements(selector, shape, dtype) / groups
        cost = Cost({"float32": flops}, read, call.writes(), 1)
    else:  # of every page that there is room for
        work = scoring_work(selector, shape, int(heads), dtype)
        scored = B * T * heads * call.shapes.shape(call.nodes("summary")[0].meta["val"])[1]
        handed = {ACTIVATIONS: scored * _number(work.nbytes)}
        cost = Cost({"float32": scored * _number(work.flops)}, add_parts(read, handed), launches=work.kernels)
    return cost * SELECTS + _summarizing(selector, shape, dtype)


def _summarizing(selector: str, shape: PageShape, dtype: torch.dtype) -> Cost:
    """What a step's tokens add to pages that become whole, in one call for all of them after the step."""
    work = summarizing_work(selector, shape, dtype)
    token = shape.groups * shape.features
    values = B * T * token
    read = {CACHE: values * dtype.itemsize, ACTIVATIONS: values * _number(work.nbytes)}
    written = {CACHE: B * T * summary_bytes(selector, shape, dtype) / shape.tokens}
    calls = sympy.Min(1, T / shape.tokens)
    return Cost({"float32": values * _number(work.flops)}, read, written, calls * work.kernels)


@cost_of("choose_pages")
def _choose_pages(call: Call) -> Cost:
    """Lists of pages from their scores; by comparisons, which no arithmetic is charged for."""
    kernels = call.shapes.streaming.kernels
    scores = call.numel("scores")
    if kernels is not None and kernels.chooses:
        return Cost(read=call.reads("scores"), written=call.writes(), launches=1) * SELECTS
    work = choosing_work(bool(call.arg("share")))
    return Cost({}, {ACTIVATIONS: scores * _number(work.nbytes)}, launches=work.kernels) * SELECTS


def summary_bytes(selector: str, shape: PageShape, dtype: torch.dtype) -> Expr:
    """Bytes of the summary of one page of one sequence, of keys of this dtype."""
    return sympy.nsimplify(parse_selector(selector).page_bytes(shape, dtype))


def _elements(selector: str, shape: PageShape, dtype: torch.dtype) -> int:
    return sum(torch.Size(b.size).numel() for b in parse_selector(selector).layout(shape, dtype).values())


def _number(amount: float) -> Expr:
    return sympy.Rational(round(1000 * amount), 1000)


# --- what selectors take, counted ------------------------------------------------------------------


@lru_cache(maxsize=256)
def scoring_work(selector: str, shape: PageShape, heads: int, dtype: torch.dtype) -> Work:
    """The reference of ``score_pages``, for each query head, query and page there is room for."""
    chosen = parse_selector(selector)
    with unset_fake_temporarily(), torch.no_grad():
        tables = chosen.constants(shape, heads, Samples())
        summary = [
            torch.zeros((1, -(-_PAGES // buffer.span), *buffer.size), dtype=buffer.dtype)
            for buffer in chosen.layout(shape, dtype).values()
        ]
        q = torch.zeros((1, heads, 1, shape.features), dtype=dtype)
        size = torch.full((1,), _PAGES * shape.tokens)
        step = (size[:, None], size, torch.ones_like(size), torch.zeros_like(size))
        paging = (shape.tokens, 0, 1, 0)
        with KernelCounter() as counter:
            score_pages(q, summary, list(tables.values()), *step, selector, shape.groups, *paging, 1.0)
    return _each(counter, heads * _PAGES)


@lru_cache(maxsize=256)
def summarizing_work(selector: str, shape: PageShape, dtype: torch.dtype) -> Work:
    """Summarizing one page, for each value of its keys."""
    chosen = parse_selector(selector)
    with unset_fake_temporarily(), torch.no_grad():
        tables = chosen.constants(shape, shape.groups, Samples())
        keys = torch.zeros((1, shape.groups, shape.tokens, shape.features), dtype=dtype)
        tokens = torch.zeros((1, shape.tokens), dtype=torch.int64) if chosen.needs_tokens else None
        with KernelCounter() as counter:
            chosen.summarize(keys, tables, tokens)
    return _each(counter, shape.values)


@lru_cache(maxsize=2)
def choosing_work(share: bool) -> Work:
    """The reference of ``choose_pages``, for each score."""
    with unset_fake_temporarily(), torch.no_grad():
        size = torch.full((1,), _PAGES * 16)
        step = (size[:, None], size, torch.ones_like(size), torch.zeros_like(size))
        with KernelCounter() as counter:
            choose_pages(torch.zeros((1, 1, 1, _PAGES)), *step, 16, 0, 1, 0, 1, 0.5, 0.5 if share else 0.0)
    return _each(counter, _PAGES)


def _each(counter: KernelCounter, count: int) -> Work:
    return Work(counter.flops / count, counter.nbytes / count, counter.kernels)
