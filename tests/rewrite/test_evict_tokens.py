"""The pass ``evict_tokens``: the graph that it leaves, what it says, what it refuses, what it costs."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from graphwright.cost_model import Workload
from graphwright.cost_model.cost import B, C, T
from graphwright.cost_model.graph_cost import graph_cost
from graphwright.cost_model.memory import step_workspace
from graphwright.cost_model.stores import (
    S,
    cache_bytes,
    cache_bytes_per_token,
    cache_expression,
    default_stores,
)
from graphwright.ir.errors import PassError
from graphwright.ir.eviction_ops import ring_slots
from graphwright.ir.graph import Graph, argument, value
from graphwright.ir.serialize import dumps, graph_from_json, graph_to_json
from graphwright.optimizer.quality.samples import StoreSamples
from graphwright.passes.base import SiteRecord, parse_pass
from graphwright.passes.evict_tokens import EvictTokens
from tests.architectures import POSITIONS, VOCAB
from tests.rewrite.cached_programs import TARGET, WORKLOAD, largest_difference, program, rewrite

KV = "place_cache{cut=kv}"
EVICT = "evict_tokens{tokens=48,window=8,slack=80}"
ATTENTION = [f"model.layers.{layer}.self_attn" for layer in (0, 1)]


def evicted(records: list[SiteRecord]) -> list[SiteRecord]:
    """What ``evict_tokens`` said."""
    return [r for r in records if r.pass_string.startswith("evict_tokens")]


def states(graph: Graph, role: str) -> dict[str, Any]:
    """The placeholders of one role by name."""
    found = graph.placeholders("state")
    return {n.meta["name"]: value(n) for n in found if n.meta.get("store", {}).get("role") == role}


# --- the graph -----------------------------------------------------------------------------------


def test_the_states_of_a_layer(captured) -> None:
    before, _ = rewrite(captured("llama"), KV)
    graph, records = rewrite(captured("llama"), KV, EVICT)
    assert [r.status for r in evicted(records)] == ["applied"] * 2
    assert graph.counts() == before.counts() | {"observe_queries": 2}
    assert set(states(graph, "kept")) == {
        f"{name}.{part}" for name in ATTENTION for part in ("keys", "values")
    }
    assert set(states(graph, "held")) == {f"{name}.held" for name in ATTENTION}
    rings = states(graph, "ring")
    assert set(rings) == {f"{name}.queries" for name in ATTENTION}
    assert {tuple(ring.shape[1:]) for ring in rings.values()} == {(4, ring_slots(8), 16)}
    assert len({str(store.shape[2]) for store in states(graph, "kept").values()}) == 1


def test_the_layer_reads_its_own_length(captured) -> None:
    """Appends and attention do; positions and the observed queries follow the rows' lengths."""
    graph, _ = rewrite(captured("llama"), KV, EVICT)
    own = [argument(n, "lengths").meta["name"] for n in graph.calls("cache_append", "cache_attention")]
    assert sorted(set(own)) == [f"{name}.held" for name in ATTENTION]
    assert {argument(n, "lengths").meta["name"] for n in graph.calls("observe_queries")} == {"lengths"}
    assert {argument(n, "positions").meta["name"] for n in graph.calls("cache_attention")} == {"positions"}


@pytest.mark.parametrize("method", ["recent", "chelsea", "random"])
def test_methods_that_observe_nothing_keep_no_queries(captured, method: str) -> None:
    graph, _ = rewrite(captured("llama"), KV, f"evict_tokens{{method={method}}}")
    assert not states(graph, "ring") and not graph.calls("observe_queries")


def test_the_way_through_json(captured) -> None:
    graph, _ = rewrite(captured("llama"), KV, EVICT)
    text = dumps(graph_to_json(graph))
    again = graph_from_json(json.loads(text), graph.parameters, torch.device("cpu"))
    assert dumps(graph_to_json(again)) == text
    assert default_stores(again) == default_stores(graph)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_nothing_changes_while_nothing_is_evicted(captured, name: str) -> None:
    """Rows of 65 tokens never fill the slots: softcaps, learned sinks, windows beside, all heads alike."""
    found = captured(name)
    graph, records = rewrite(found, KV, "evict_tokens{tokens=100,window=8}")
    assert "applied" in {r.status for r in evicted(records)}
    assert largest_difference(found.model, program(found.model, graph)) < 1e-5


# --- what is refused -------------------------------------------------------------------------------


def test_windows_are_left_alone(captured) -> None:
    _, records = rewrite(captured("gemma2"), KV, EVICT)
    assert [r.status for r in evicted(records)] == ["illegal", "applied"]
    assert "a window of 16 tokens forgets by itself" in evicted(records)[0].reason


@pytest.mark.parametrize(
    ("name", "passes", "reason"),
    [
        ("llama", ["place_cache{cut=pre_rotary}"], "computed from what is stored"),
        ("llama", [KV, "quantize_cache{codec=int,bits=8,page=16}"], "is packed"),
        ("llama", [KV, EVICT], "evicted already"),
    ],
)
def test_sites_that_it_refuses(captured, name: str, passes: list[str], reason: str) -> None:
    _, records = rewrite(captured(name), *passes, EVICT.replace("48", "49"))
    last = [r for r in evicted(records) if "49" in r.pass_string]
    assert {r.status for r in last} == {"illegal"}
    assert all(reason in r.reason for r in last), last


def test_packing_leaves_evicted_layers_alone(captured) -> None:
    """The other layers may still be packed."""
    one = EVICT.replace("}", ",layers=0}")
    found = captured("llama")
    graph, records = rewrite(found, KV, one, "quantize_cache{codec=float(bits=32),page=16}")
    assert [r.site for r in records if r.pass_string.startswith("quantize")] == [ATTENTION[1]]
    runs = program(found.model, graph)
    assert largest_difference(found.model, runs, prompts=(30, 17), steps=(1, 8)) < 1e-5
    parts = runs.cache_parts()
    assert sum(parts.values()) == runs.cache_bytes()


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ("keep=0", "not a fraction", "keep=0.25"),
        ("keep=1.5", "not a fraction", "at most 1"),
        ("keep=-0.5", "not a fraction", "above 0"),
        ("tokens=36", "leaves nothing to choose", "at least 37"),
        ("tokens=-1", "leaves nothing to choose", "at least 37"),
        ("slack=64", "slack=64 is out of range", "65"),
        ("window=0", "window=0 is out of range", "1 to"),
        ("when=sometimes", "no time", "always, prompt"),
        ("method=snapvk", "no evictor named", "snapkv"),
        ("method=snapkv(pool=2)", "no middle", "odd"),
    ],
)
def test_options_that_make_no_sense(options: str, message: str, hint: str) -> None:
    with pytest.raises(PassError, match=message) as caught:
        parse_pass(f"evict_tokens{{{options}}}")
    assert hint in (caught.value.hint or "")


def test_it_prints_and_parses_back() -> None:
    text = "evict_tokens{method=ems(threshold=0.7),keep=0.25,when=prompt,layers=0-3}"
    assert str(parse_pass(text)) == text
    assert [str(p) for p in EvictTokens.variants()] == ["evict_tokens", "evict_tokens{keep=0.25}"]


# --- what it says ----------------------------------------------------------------------------------


def test_the_reason_says_what_stays(captured) -> None:
    chosen = parse_pass("evict_tokens{keep=0.25,when=prompt}")
    graph, _ = rewrite(captured("llama"), KV)
    reason = chosen(graph, Workload(batch=1, prompt=900, generate=100), TARGET, force=True)[0].reason
    assert "snapkv keeps 0.25 of the cache, the first 4 and the newest 32 among them" in reason
    assert "250 of 1,000 tokens stay" in reason and "a prompt stays whole" in reason


def test_a_workload_that_fits_is_told_so(captured) -> None:
    graph, _ = rewrite(captured("llama"), KV)
    records = parse_pass("evict_tokens{tokens=200}")(
        graph, Workload(batch=1, prompt=300, generate=20), TARGET
    )
    assert {r.status for r in records} == {"unprofitable"}
    assert all("nothing is evicted, and nothing is lost" in r.reason for r in records)


def test_fewer_tokens_gain_more(captured) -> None:
    graph, _ = rewrite(captured("llama"), KV)
    site = EvictTokens().find(graph)[0]
    workload = Workload(batch=4, prompt=4000, generate=96)
    small, large = (
        EvictTokens(keep=keep).gain(EvictTokens().find(graph)[0], workload, TARGET) for keep in (0.25, 0.5)
    )
    assert small.memory_bytes < large.memory_bytes < 0
    assert small.seconds_per_token < large.seconds_per_token < 0
    specs = {"before": default_stores(graph)}
    EvictTokens(keep=0.25).apply(site, graph)
    specs["after"] = default_stores(graph)
    held = {key: cache_bytes(found, 4, 4096) for key, found in specs.items()}
    assert small.memory_bytes == held["after"] - held["before"]


# --- budgets by layer --------------------------------------------------------------------------------


def test_prefixkv_divides_the_budget_by_calibration(captured) -> None:
    found = captured("llama")
    rows = torch.randint(3, VOCAB, (2, 120)).tolist()
    graph = found.canonical.copy()
    samples = StoreSamples(lambda g: program(found.model, g), lambda: rows)
    sharper = {f"{ATTENTION[0]}.probes": 50.0}  # what the first layer attends to, it attends to fully
    graph.samples = lambda g: {name: x * sharper.get(name, 1.0) for name, x in samples(g).items()}
    for text in (KV, "evict_tokens{method=prefixkv,tokens=60,window=8,sinks=2}"):
        records = parse_pass(text)(graph, WORKLOAD, TARGET, force=True)
    assert {r.status for r in records} == {"applied"}
    assert not any("every layer the same" in r.reason for r in records)
    tokens = [
        n.meta["store"]["tokens"] for n in graph.placeholders("state") if n.meta["name"].endswith(".held")
    ]
    assert sum(tokens) == 120 and tokens[0] < tokens[1] and min(tokens) >= 11
    state = program(found.model, graph).allocate(1, POSITIONS)
    assert {state.stores[f"{a}.keys"].shape[2] for a in ATTENTION} == {n + 128 for n in tokens}
    assert state.nbytes() == cache_bytes(default_stores(graph), 1, POSITIONS)


def test_prefixkv_beside_layers_that_are_evicted_already(captured) -> None:
    found = captured("llama")
    graph = found.canonical.copy()
    rows = torch.randint(3, VOCAB, (1, 80)).tolist()
    graph.samples = StoreSamples(lambda g: program(found.model, g), lambda: rows)
    for text in (KV, EVICT.replace("}", ",layers=0}"), "evict_tokens{method=prefixkv,tokens=60,layers=1}"):
        records = parse_pass(text)(graph, WORKLOAD, TARGET, force=True)
    assert [(r.site, r.status) for r in records] == [(ATTENTION[1], "applied")]
    tokens = {n.meta["name"]: n.meta["store"]["tokens"] for n in graph.placeholders("state")}
    assert [tokens[f"{name}.held"] for name in ATTENTION] == [48, 60]


def test_prefixkv_without_text_treats_layers_alike(captured) -> None:
    graph, records = rewrite(captured("llama"), KV, "evict_tokens{method=prefixkv,keep=0.3}")
    assert all("every layer the same, as there is no text" in r.reason for r in evicted(records))
    assert {n.meta["store"]["keep"] for n in graph.placeholders("state")} == {0.3}


# --- what it costs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["recent", "snapkv", "ems"])
def test_memory_as_numbers_and_as_an_expression(captured, method: str) -> None:
    graph, _ = rewrite(captured("llama"), KV, f"evict_tokens{{method={method},keep=0.3,window=20}}")
    specs = default_stores(graph)
    for capacity in (1, 60, 100, 183, 184, 500, 4096):
        assert cache_bytes(specs, 3, capacity) == cache_expression(specs).subs({B: 3, S: capacity})
    plain = default_stores(rewrite(captured("llama"), KV)[0])
    assert cache_bytes(specs, 1, 4096) < 0.45 * cache_bytes(plain, 1, 4096)
    noted = 2 * 2 * 4 if method == "ems" else 0
    assert cache_bytes_per_token(graph) == sum(s.bytes_per_token for s in plain) + noted


def test_attention_reads_what_is_held(captured) -> None:
    plain, _ = rewrite(captured("llama"), KV)
    graph, _ = rewrite(captured("llama"), KV, "evict_tokens{tokens=128,slack=128}")
    reads = [
        graph_cost(g).phase("decode")["cache_attention"].at(batch=1, context=c, tokens=1).read["cache"]
        for g in (plain, graph)
        for c in (100, 10_000)
    ]
    token = 2 * 2 * 2 * 16 * 4  # of both layers, keys and values, two heads of 16 features in float32
    assert reads[:3] == [101 * token, 10_001 * token, 101 * token]
    assert reads[3] == (128 + 64 / 2 + 1) * token
    half, _ = rewrite(captured("llama"), KV, "evict_tokens{keep=0.5,slack=128}")
    read = (
        graph_cost(half)
        .phase("decode")["cache_attention"]
        .at(batch=1, context=10_000, tokens=1)
        .read["cache"]
    )
    assert read == (5_000 + 32 + 1) * token


def test_evictions_cost_more_where_they_come_often(captured) -> None:
    costs = []
    for slack in (72, 128, 256):
        graph, _ = rewrite(captured("llama"), KV, f"evict_tokens{{tokens=512,slack={slack}}}")
        values = graph_cost(graph).total.substitute({T: 1, B: 1, C: 8192})
        costs.append(float(values.written["cache"]))
    assert costs[0] > costs[1] > costs[2]


def test_a_whole_prompt_is_part_of_the_workspace(captured) -> None:
    always, _ = rewrite(captured("llama"), KV, "evict_tokens{keep=0.25}")
    whole, _ = rewrite(captured("llama"), KV, "evict_tokens{keep=0.25,when=prompt}")
    plain, _ = rewrite(captured("llama"), KV)
    most = [
        cache_bytes(default_stores(g), 2, 8192) + step_workspace(g, default_stores(g), 64).bytes(2, 8192)
        for g in (always, whole, plain)
    ]
    assert most[0] < most[1]
    rings = 2 * 2 * (ring_slots(32) * 4 * 16 * 4 + 8)
    assert most[1] - most[2] <= rings
