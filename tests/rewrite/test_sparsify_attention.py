"""Selected pages: the graph that the pass leaves, the same logits from it, and everything it refuses."""

from __future__ import annotations

import json
import operator

import pytest
import torch

from graphwright.cost_model.workload import Workload
from graphwright.ir.errors import PassError, SelectorError
from graphwright.ir.graph import argument, value
from graphwright.ir.serialize import dumps, graph_from_json, graph_to_json
from graphwright.passes.base import SiteRecord, parse_pass
from tests.rewrite.cached_programs import TARGET, largest_difference, program, rewrite

KV = "place_cache{cut=kv}"
ALL = "sparsify_attention{keep=1.0,recent=40,page=8}"
FLOAT = "quantize_cache{codec=float(bits=32),page=8,first=3,recent=2}"


def said(records: list[SiteRecord]) -> list[SiteRecord]:
    return [r for r in records if r.pass_string.startswith("sparsify_attention")]


def test_op_counts(captured) -> None:
    before, _ = rewrite(captured("llama"), KV)
    graph, records = rewrite(captured("llama"), KV, "sparsify_attention{page=8}")
    assert graph.counts() == before.counts() | {"score_pages": 2, "choose_pages": 2}
    assert [r.status for r in said(records)] == ["applied", "applied"]
    for attention in graph.calls("cache_attention"):
        pages, chosen = (argument(attention, name) for name in ("pages", "chosen"))
        assert (pages.target, pages.args[1], chosen.args[1]) == (operator.getitem, 0, 1)
        assert (argument(attention, "page"), argument(attention, "first")) == (8, 0)
        choice = pages.args[0]
        assert argument(choice, "scores") in graph.calls("score_pages")
        assert (argument(choice, "keep"), argument(choice, "sinks"), argument(choice, "recent")) == (
            0.125,
            1,
            32,
        )


def test_summaries_are_states_that_share_their_size(captured) -> None:
    graph, _ = rewrite(captured("llama"), KV, "sparsify_attention{page=8}")
    states = {n.meta["name"]: n for n in graph.placeholders("state") if "store" in n.meta}
    assert list(states) == [f"model.layers.{i}.self_attn.keys.summary.extremes" for i in (0, 1)]
    fakes = [value(node) for node in states.values()]
    assert {tuple(f.shape[2:]) for f in fakes} == {(2, 2, 16)}
    assert len({str(f.shape[1]) for f in fakes}) == 1
    assert [n.meta["name"] for n in graph.placeholders("input")][-1] == "dense"


def test_pages_are_those_of_the_codec(captured) -> None:
    graph, records = rewrite(captured("llama"), KV, FLOAT, "sparsify_attention")
    assert {r.status for r in said(records)} == {"applied"}
    for attention in graph.calls("cache_attention"):
        choice = argument(attention, "pages").args[0]
        pages = [argument(choice, name) for name in ("page", "first", "settled", "recent")]
        assert pages == [8, 3, 2, 2 + 32]


@pytest.mark.parametrize("passes", [(KV, ALL), (KV, FLOAT, "sparsify_attention{keep=1.0}")])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_reading_everything_gives_stock_logits(name: str, passes: tuple[str, ...], captured) -> None:
    """With softcap, sinks of attention, windows beside, and rows that are shorter than a page."""
    model = captured(name)
    graph, records = rewrite(model, *passes)
    assert "applied" in {r.status for r in said(records)}
    assert largest_difference(model.model, program(model.model, graph)) < 1e-4


def test_a_graph_survives_being_saved(captured) -> None:
    graph, _ = rewrite(captured("llama"), KV, "sparsify_attention{page=8}")
    data = json.loads(dumps(graph_to_json(graph)))
    again = graph_from_json(data, graph.parameters, torch.device("cpu"))
    assert again.counts() == graph.counts()
    assert [n.meta.get("store") for n in again.placeholders("state")] == [
        n.meta.get("store") for n in graph.placeholders("state")
    ]


@pytest.mark.parametrize(
    ("passes", "reason"),
    [
        (("place_cache{cut=pre_rotary}", "sparsify_attention"), "computed from what is stored"),
        ((KV, FLOAT, "sparsify_attention{page=16}"), "packed in pages of 8 tokens: leave page=16 out"),
        ((KV, FLOAT, "sparsify_attention{refresh=8}"), "quantize_cache{recent=7} keeps them"),
        ((KV, "quantize_cache{codec=int,bits=4,only=keys}", "sparsify_attention"), "values are not"),
        ((KV, "sparsify_attention{recent=4,refresh=8}"), "recent=4 is too little here"),
        ((KV, "sparsify_attention", "sparsify_attention{selector=mean}"), "selected already"),
    ],
)
def test_refusals_say_why(captured, passes: tuple[str, ...], reason: str) -> None:
    _, records = rewrite(captured("llama"), *passes)
    refused = [r for r in said(records) if r.status == "illegal"]
    assert len(refused) == 2
    assert all(reason in r.reason for r in refused)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("keep=0", "keep=0.0 is not a share"),
        ("keep=1.5", "keep=1.5 is not a share"),
        ("keep=-0.1", "is not a share"),
        ("share=1.0", "share=1.0 is not a share of the attention"),
        ("share=0.9,selector=random", "needs scores that estimate attention"),
        ("page=-1", "page=-1 is out of range"),
        ("refresh=64", "refresh=64 is out of range"),
    ],
)
def test_bad_options(options: str, words: str) -> None:
    with pytest.raises(PassError, match=words) as error:
        parse_pass(f"sparsify_attention{{{options}}}")
    assert error.value.hint


def test_an_unknown_selector_names_the_nearest() -> None:
    with pytest.raises(SelectorError, match="no selector named 'bound'") as error:
        parse_pass("sparsify_attention{selector=bound}")
    assert "bounds" in str(error.value.hint)


def test_a_context_shorter_than_a_page_gains_nothing(captured) -> None:
    """Everything is among the newest tokens: legal, exact, and not worth it."""
    graph = captured("llama").canonical.copy()
    parse_pass(KV)(graph, Workload(), TARGET, force=True)
    records = parse_pass("sparsify_attention")(graph, Workload(prompt=8, generate=4), TARGET)
    assert {r.status for r in records} == {"unprofitable"}
    assert all("everything is read" in r.reason for r in records)
    assert torch.tensor([r.predicted["seconds_per_token"] for r in records if r.predicted]).abs().max() == 0
