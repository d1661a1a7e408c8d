"""What selected pages cost: the tokens that the reference's lists hold, and summaries as allocated."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from graphwright.cost_model import (
    B,
    Workload,
    cache_bytes,
    cache_expression,
    default_stores,
    graph_cost,
    predict,
    resolve_target,
)
from graphwright.cost_model.codec_work import KernelCounter
from graphwright.cost_model.cost import _function
from graphwright.cost_model.listed_pages import Listing, Paging
from graphwright.cost_model.stores import S
from graphwright.cost_model.streaming import find_streaming
from graphwright.ir.codecs import PageShape
from graphwright.ir.graph import Graph
from graphwright.ir.page_lists import listed_tokens
from graphwright.ir.selectors import Buffer, Selector, parse_selector
from graphwright.ir.selectors.selector import Samples
from graphwright.ir.sparse_ops import choose_pages, score_pages
from graphwright.optimizer.driver import capture_step
from graphwright.passes.base import parse_pass
from tests.architectures import tiny_model
from tests.quality.rounded_cache import Lab

TARGET = resolve_target("h100")
GROUPS, WIDTH, HEADS, PAGE = 2, 16, 4, 16
TOKEN = GROUPS * WIDTH * 4  # bytes of a token's keys
SPARSE = "sparsify_attention{keep=0.25}"
INT4 = "quantize_cache{codec=token_scale >> uniform(bits=4),page=16,recent=5,first=3}"


@pytest.fixture(scope="module")
def small() -> Graph:
    return capture_step(tiny_model("llama", device="meta"))[0]


def rewritten(graph: Graph, *passes: str) -> Graph:
    graph = graph.copy()
    for text in passes:
        records = parse_pass(text)(graph, Workload(), TARGET, force=True)
        assert {r.status for r in records} == {"applied"}, records
    return graph


def lists(
    listing: Listing, context: int, tokens: int = 1, groups: int = GROUPS, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the reference chooses from scores at random."""
    page, first, recent, settled = vars(listing.paging).values()
    generator = torch.Generator().manual_seed(seed)
    room = max(math.ceil((context + tokens - first) / page), 1) + 2
    scores = torch.rand((1, tokens, groups, room), generator=generator)
    lengths = torch.tensor([context])
    counts, dense = torch.tensor([tokens]), torch.tensor([0])
    positions = context + torch.arange(tokens)[None]
    return choose_pages(
        scores, positions, lengths, counts, dense, page, first, recent, settled, listing.sinks,
        listing.keep, listing.share,
    )  # fmt: skip


def number(expr: Any, context: int, tokens: int = 1) -> int:
    found = _function(expr)(1, context, tokens)
    assert found == int(found)
    return int(found)


LISTINGS = [
    Listing(Paging(page, first, recent, settled), sinks, keep, 0.0)
    for page, first, recent, settled, sinks, keep in (
        (16, 0, 32, 0, 1, 0.125),
        (16, 4, 40, 8, 1, 0.25),
        (7, 3, 1, 0, 0, 0.0625),
        (64, 4, 160, 128, 2, 0.5),
        (16, 0, 20, 30, 1, 0.1),
        (8, 0, 5, 0, 40, 0.25),
        (16, 0, 32, 0, 1, 1.0),
        (32, 300, 64, 0, 0, 1 / 32),
    )
]
CONTEXTS = (0, 1, 15, 16, 31, 47, 48, 63, 64, 200, 303, 511, 512, 1023, 2000)


@pytest.mark.parametrize("listing", LISTINGS, ids=range(len(LISTINGS)))
def test_one_token_reads_what_its_list_holds(listing: Listing) -> None:
    """Pages, and the tokens up to its own among them, at every context; the lists are the reference's."""
    for context in CONTEXTS:
        pages, chosen = lists(listing, context)
        assert set(chosen.flatten().tolist()) == {number(listing.pages, context)}, context
        held = listed_tokens(
            pages, chosen, listing.paging.page, listing.paging.first, torch.tensor([context]), context + 1
        )
        read = {int(n) for n in held.sum(-1).flatten()}
        assert read == {context + 1 - number(listing.unread_tokens, context)}, context
        assert number(listing.unseen_tokens, context) == number(listing.unread_tokens, context)


def test_bytes_of_an_attention_are_those_of_its_lists(small: Graph) -> None:
    graph = rewritten(small, "place_cache{cut=kv}", SPARSE)
    attention = graph.calls("cache_attention")[0]
    listing = find_streaming(graph).listings[attention]
    assert (listing.keep, listing.sinks, listing.paging) == (0.25, 1, Paging(16, 0, 32, 0))
    cost = graph_cost(graph).by_node[attention]
    for context in (0, 40, 100, 999, 1000, 4096):
        pages, chosen = lists(listing, context)
        tokens = int(
            listed_tokens(pages, chosen, PAGE, 0, torch.tensor([context]), context + 1)[0, 0, 0].sum()
        )
        values = cost.at(batch=3, context=context)
        assert values.read["cache"] == 3 * tokens * 2 * TOKEN
        assert values.total_flops == 3 * tokens * 2 * HEADS * 2 * WIDTH


def test_queries_of_a_step_may_choose_differently(small: Graph) -> None:
    """As many bytes as tokens that some query reads, at most; arithmetic of every query's own list."""
    listing = LISTINGS[0]
    for tokens, context in ((2, 600), (5, 900), (8, 2000)):
        most = 0
        for seed in range(4):
            pages, chosen = lists(listing, context, tokens, seed=seed)
            held = listed_tokens(pages, chosen, 16, 0, torch.tensor([context]), context + tokens)
            read = [int(held[0, :, g].any(0).sum()) for g in range(GROUPS)]
            most = max(most, *read)
        bound = context + tokens - number(listing.unread_tokens, context, tokens)
        assert most <= bound <= context + tokens
        one = context + 1 - number(listing.unread_tokens, context)
        assert bound <= tokens * one
        unseen = number(listing.unseen_tokens, context)
        assert number(listing.unseen_tokens, context, tokens) == tokens * unseen
    graph = rewritten(small, "place_cache{cut=kv}", SPARSE)
    plain = rewritten(small, "place_cache{cut=kv}")
    costs = [graph_cost(g).by_op["cache_attention"] for g in (graph, plain)]
    long, dense = (cost.at(context=5000, tokens=65) for cost in costs)
    assert long == dense
    short, dense = (cost.at(context=5000, tokens=64) for cost in costs)
    assert short.total_flops < dense.total_flops
    assert short.read["cache"] <= dense.read["cache"]


def test_a_share_of_attention_is_priced_as_its_bound(small: Graph) -> None:
    graph = rewritten(small, "place_cache{cut=kv}", "sparsify_attention{keep=0.25,share=0.5}")
    whole = rewritten(small, "place_cache{cut=kv}", SPARSE)
    found = set(find_streaming(graph).listings.values())
    assert {x.is_bound for x in found} == {True}
    assert {x.is_bound for x in find_streaming(whole).listings.values()} == {False}
    (listing,) = found
    _, chosen = lists(listing, 3000)
    assert int(chosen.max()) <= number(listing.pages, 3000)
    costs = [graph_cost(g).by_op["cache_attention"].at(context=3000) for g in (graph, whole)]
    assert costs[0] == costs[1]


def test_layers_that_keep_more_cost_more(small: Graph) -> None:
    graph = rewritten(
        small, "place_cache{cut=kv}", "sparsify_attention{keep=0.5,layers=0}",
        "sparsify_attention{keep=0.125,layers=1}",
    )  # fmt: skip
    first, second = (
        graph_cost(graph).by_node[n].at(context=4000).read["cache"] for n in graph.calls("cache_attention")
    )
    assert first > 3 * second


# --- packed stores -------------------------------------------------------------------------------


def test_packed_pages_that_are_not_listed_are_not_read(small: Graph) -> None:
    graph, dense = (
        rewritten(small, "place_cache{cut=kv}", INT4, SPARSE),
        rewritten(small, "place_cache{cut=kv}", INT4),
    )
    listing = find_streaming(graph).listings[graph.calls("cache_attention")[0]]
    assert listing.paging == Paging(16, 3, 5 + 32, 5)
    costs = [graph_cost(g).by_op["packed_attention"] for g in (graph, dense)]
    for context in (10, 100, 1000, 5000):
        sparse, whole = (cost.at(context=context) for cost in costs)
        skipped = number(listing.skipped, context)
        page_bytes = 2 * 16 * (WIDTH // 2 + 2)  # two heads: four bits and a scale in bfloat16
        assert whole.read["cache"] - sparse.read["cache"] == pytest.approx(2 * 2 * skipped * page_bytes)
        assert (skipped > 0) == (whole.total_flops > sparse.total_flops)


def test_the_reference_reads_everything(small: Graph) -> None:
    """Without kernels what is not listed is left out after reading it."""
    for passes in (("place_cache{cut=kv}",), ("place_cache{cut=kv}", INT4)):
        graph, dense = rewritten(small, *passes, SPARSE), rewritten(small, *passes)
        for one in (graph, dense):
            one.annotations["decode_kernels"] = False
        assert not find_streaming(graph).listings
        costs = [graph_cost(g).by_op for g in (graph, dense)]
        for name in set(costs[1]) & {"cache_attention", "cache_read"}:
            assert costs[0][name].key == costs[1][name].key


# --- scores and summaries ------------------------------------------------------------------------


def test_a_kernel_reads_the_summaries_of_candidates(small: Graph) -> None:
    graph = rewritten(small, "place_cache{cut=kv}", SPARSE)
    scores = graph_cost(graph).by_node[graph.calls("score_pages")[0]]
    for context, candidates in ((0, 0), (47, 1), (1000, (1000 - 31) // 16)):
        values = scores.at(batch=2, context=context)
        summarizing = 2 * TOKEN
        assert values.read["cache"] == 2 * candidates * 2 * TOKEN + summarizing
        assert values.written["cache"] == pytest.approx(2 * 2 * TOKEN / PAGE)
        one_page = 2 * HEADS * 2 * WIDTH  # of every head: an upper bound is two products of a key's width
        assert values.total_flops == pytest.approx(2 * candidates * one_page, abs=2 * TOKEN)
    assert scores.at(context=5000, tokens=65).total_flops < scores.at(context=5000, tokens=1).total_flops
    # Prompts are not scored: what is left is summarizing, which every token has its part in.
    assert scores.at(context=0, tokens=640).written["cache"] == 640 * 2 * TOKEN / PAGE


def test_the_reference_of_other_selectors_is_counted(small: Graph) -> None:
    graph = rewritten(small, "place_cache{cut=kv}", "sparsify_attention{selector=recent}")
    cost = graph_cost(graph).by_node[graph.calls("score_pages")[0]]
    shape, selector = PageShape(GROUPS, PAGE, WIDTH), parse_selector("recent")
    size = torch.tensor([1600])
    step = (size[:, None], size, torch.ones_like(size), torch.zeros_like(size))
    summary = [torch.zeros((1, 100, *b.size), dtype=b.dtype) for b in _layout(selector, shape)]
    tables = list(selector.constants(shape, HEADS, Samples()).values())
    q = torch.zeros(1, HEADS, 1, WIDTH)
    with KernelCounter() as counter:
        score_pages(q, summary, tables, *step, "recent", GROUPS, PAGE, 0, 32, 0, 1.0)
    # A step that does not select has only the summarizing in it, which others do every 16th time.
    summarizing = cost.at(context=1600, tokens=65)
    values = cost.at(context=1600)
    assert values.launches - summarizing.launches / PAGE == counter.kernels
    assert values.activation_bytes == pytest.approx(counter.nbytes, rel=0.2)


def _layout(selector: Selector, shape: PageShape) -> list[Buffer]:
    return list(selector.layout(shape, torch.float32).values())


def test_sparse_attention_pays_where_contexts_are_long(small: Graph) -> None:
    graph, dense = rewritten(small, "place_cache{cut=kv}", SPARSE), rewritten(small, "place_cache{cut=kv}")
    costs = [graph_cost(g) for g in (graph, dense)]
    for machine in ("h100", "cpu"):
        short, long = (
            [predict(cost, resolve_target(machine), batch=2, context=n, phase="decode") for cost in costs]
            for n in (40, 1_000_000)
        )
        assert short[0].seconds > short[1].seconds
        assert long[0].memory_seconds < 0.5 * long[1].memory_seconds


# --- memory --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab() -> Lab:
    """Two layers, two heads of keys and values."""
    return Lab()


@pytest.mark.parametrize(
    "passes",
    [
        (SPARSE,),
        ("sparsify_attention{selector=mean,page=8}",),
        ("sparsify_attention{selector=spans(pages=4),page=8}",),
        (INT4, SPARSE),
    ],
    ids=["bounds", "mean", "spans", "packed"],
)
def test_summaries_take_what_the_runtime_allocates(lab: Lab, passes: tuple[str, ...]) -> None:
    graph = rewritten(lab.graph, *passes)
    stores, program = default_stores(graph), lab.program(graph)
    assert len({s.name for s in stores}) == len(stores) > 4
    for batch, capacity in ((1, 1), (3, 20), (2, 21), (1, 100), (2, 250)):
        allocated = program.allocate(batch, capacity).nbytes()
        assert cache_bytes(stores, batch, capacity) == allocated
        assert cache_expression(stores).subs({B: batch, S: capacity}) == allocated


def test_devices_share_summaries_by_heads(lab: Lab) -> None:
    for text, heads in ((SPARSE, 2), ("sparsify_attention{selector=mean}", 2)):
        found = [s for s in default_stores(rewritten(lab.graph, text)) if s.summarized]
        assert {s.heads for s in found} == {heads}
        assert all(s.on_device(2).nbytes(1, 160) * 2 == s.nbytes(1, 160) for s in found)
