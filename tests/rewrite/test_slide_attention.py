"""The pass ``slide_attention``: windows in chosen layers, rings as their stores, what it leaves alone."""

from __future__ import annotations

import pytest
import torch

from graphwright.cost_model import Workload
from graphwright.cost_model.stores import cache_bytes, default_stores
from graphwright.ir.errors import PassError
from graphwright.ir.graph import Graph, argument, value
from graphwright.passes.base import SiteRecord, parse_pass
from graphwright.passes.slide_attention import SlideAttention
from tests.architectures import POSITIONS, WINDOW, tiny_model
from tests.rewrite.cached_programs import TARGET, largest_difference, program, rewrite

KV = "place_cache{cut=kv}"


def sliding(records: list[SiteRecord]) -> list[SiteRecord]:
    return [r for r in records if r.pass_string.startswith("slide_attention")]


def windows(graph: Graph) -> dict[str, int]:
    """Of each store."""
    return {n.meta["name"]: n.meta["window"] for n in graph.placeholders("state")}


@pytest.mark.parametrize("order", [1, -1])
def test_the_layers_that_are_named_get_a_ring(captured, order: int) -> None:
    passes = ["slide_attention{window=8,layers=1}", KV][::order]
    graph, records = rewrite(captured("llama"), *passes)
    (own,) = sliding(records)
    assert own.status == "applied" and "sees 8 tokens, and stores at most 72" in own.reason
    assert [argument(a, "window") for a in graph.calls("cache_attention")] == [0, 8]
    assert sorted(windows(graph).values()) == [0, 0, 8, 8]
    assert all((".1." in store) == (window == 8) for store, window in windows(graph).items())
    state = program(captured("llama").model, graph).allocate(1, POSITIONS)
    assert {state.stores[n].shape[2] for n, window in windows(graph).items() if window} == {72}
    assert state.nbytes() == cache_bytes(default_stores(graph), 1, POSITIONS)
    assert len({str(value(n).shape[2]) for n in graph.placeholders("state")}) == 2


@pytest.mark.parametrize("passes", [("slide_attention{window=16}", KV), (KV, "slide_attention{window=16}")])
def test_it_computes_what_a_model_with_that_window_does(captured, passes: tuple[str, str]) -> None:
    """The stock Mistral with a window of 16, over tokens that leave it and rings that go around."""
    found = captured("mistral", sliding_window=None)
    windowed = tiny_model("mistral", sliding_window=WINDOW)
    windowed.load_state_dict(found.model.state_dict())
    graph, _ = rewrite(found, *passes)
    runs = program(found.model, graph)
    assert largest_difference(windowed, runs, prompts=(90, 100, 3), steps=(1, 8, 30, 5)) < 1e-5
    assert largest_difference(found.model, runs, prompts=(90,), steps=(1,)) > 1e-3


def test_the_minimum_cut_stores_the_window_too(captured) -> None:
    found = captured("gpt2")
    slide, place = "slide_attention{window=8}", "place_cache{cut=minimum}"
    graph, _ = rewrite(found, slide, place)
    assert set(windows(graph).values()) == {8} and len(windows(graph)) == 2
    expected, _ = rewrite(found, slide, KV)
    runs = [program(found.model, g) for g in (graph, expected)]
    ids = torch.randint(3, 90, (1, 40))
    outs = []
    for one in runs:
        state = one.allocate(1, 40)
        outs.append(one.prefill(state, ids, torch.tensor([40])))
    torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-4)


def test_a_window_that_is_not_larger_stays(captured) -> None:
    """Gemma2 has one in every other layer."""
    for text, statuses in (
        (f"slide_attention{{window={WINDOW}}}", ["illegal", "applied"]),
        ("slide_attention{window=100}", ["illegal", "applied"]),
        ("slide_attention{window=8}", ["applied", "applied"]),
    ):
        graph, records = rewrite(captured("gemma2"), text, KV)
        own = sliding(records)
        assert [r.status for r in own] == statuses
        if statuses[0] == "illegal":
            assert own[0].reason == f"it has a window of {WINDOW} tokens, which is no larger: left alone"
        assert argument(graph.calls("cache_attention")[0], "softcap") == 50.0


@pytest.mark.parametrize(
    ("passes", "reason"),
    [
        ([KV, "quantize_cache{codec=int,bits=8,page=16}"], "before place_cache"),
        (["place_cache{cut=pre_rotary}"], "before place_cache"),
        ([KV, "evict_tokens{tokens=48,window=8}"], "before place_cache"),
        ([KV, "sparsify_attention{keep=0.25}"], "chosen pages"),
        ([KV, "share_prefix"], "prefix that its rows share"),
        ([KV, "sparsify_prefill"], "what a mask says"),
    ],
)
def test_caches_of_another_form_are_refused(captured, passes: list[str], reason: str) -> None:
    _, records = rewrite(captured("llama"), *passes, "slide_attention{window=8}")
    assert {r.status for r in sliding(records)} == {"illegal"}
    assert all(reason in r.reason for r in sliding(records)), sliding(records)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ("evict_tokens{tokens=48,window=8}", "forgets by itself"),
        ("sparsify_attention{keep=0.25}", "reads little already"),
        ("share_prefix", "ring in each row"),
    ],
)
def test_others_leave_windows_alone(captured, other: str, reason: str) -> None:
    """And rewrite the layers that have none."""
    _, records = rewrite(captured("llama"), "slide_attention{window=8,layers=0}", KV, other)
    own = [r for r in records if r.pass_string == other]
    assert [r.status for r in own] == ["illegal", "applied"] and reason in own[0].reason


def test_rings_can_be_packed(captured) -> None:
    found, slide = captured("llama"), "slide_attention{window=100}"
    plain, _ = rewrite(found, slide, KV)
    packed, records = rewrite(found, slide, KV, "quantize_cache{codec=float(bits=32),page=16}")
    assert [r.status for r in records if r.pass_string.startswith("quantize")] == ["applied"] * 2
    ids, outs = torch.randint(3, 90, (1, 180)), []
    for graph in (plain, packed):
        runs = program(found.model, graph)
        state = runs.allocate(1, 200)
        first = runs.prefill(state, ids, torch.tensor([180]))
        outs.append(torch.cat([first, runs.step(state, ids[:, :1].contiguous(), torch.tensor([1]))[0]]))
    torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tokens", ["0", "-3", "2000000"])
def test_windows_that_make_no_sense(tokens: str) -> None:
    with pytest.raises(PassError, match="not a number of tokens") as caught:
        parse_pass(f"slide_attention{{window={tokens}}}")
    assert "give 1 to" in (caught.value.hint or "")


def test_it_prints_and_parses_back() -> None:
    text = "slide_attention{window=1024,layers=0-3}"
    assert str(parse_pass(text)) == text
    assert [str(p) for p in SlideAttention.variants()] == ["slide_attention"]


@pytest.mark.parametrize("passes", [(), (KV,)])
def test_what_it_saves(captured, passes: tuple[str, ...]) -> None:
    """Memory as the stores have it, with a cache and before there is one; nothing where all tokens fit."""
    workload = Workload(batch=4, prompt=4000, generate=96)
    graph, _ = rewrite(captured("llama"), *passes)
    before = cache_bytes(default_stores(graph), 4, workload.capacity)
    records = parse_pass("slide_attention{window=256}")(graph, workload, TARGET)
    saved = [r.predicted for r in records if r.predicted is not None]
    assert [r.status for r in records] == ["applied"] * 2
    assert all(p["seconds_per_token"] < 0 for p in saved)
    assert (
        sum(p["memory_bytes"] for p in saved)
        == cache_bytes(default_stores(graph), 4, workload.capacity) - before
    )
    plain, _ = rewrite(captured("llama"), *passes)
    records = parse_pass("slide_attention")(plain, Workload(batch=1, prompt=300, generate=20), TARGET)
    assert {r.status for r in records} == {"unprofitable"}
    assert all("nothing is saved, and nothing is lost" in r.reason for r in records)
