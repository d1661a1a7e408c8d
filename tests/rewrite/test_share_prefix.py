"""A shared prefix in the graph: which stores are split, what stays, what it costs and keeps."""

from __future__ import annotations

import pytest
import torch

from graphwright.cost_model.cost import B, C, T
from graphwright.cost_model.graph_cost import graph_cost
from graphwright.cost_model.op_costs import attend
from graphwright.cost_model.prefix_costs import attend_shared, shared_tokens
from graphwright.cost_model.shapes import Call, Shapes
from graphwright.cost_model.stores import S, cache_bytes, cache_expression, default_stores
from graphwright.cost_model.workload import Workload
from graphwright.ir.errors import InputError, PassError
from graphwright.ir.graph import Graph, argument, value
from graphwright.ir.serialize import graph_from_json, graph_to_json
from graphwright.passes.base import parse_pass
from graphwright.passes.share_prefix import SharePrefix
from tests.rewrite.cached_programs import TARGET, largest_difference, program, rewrite

KV, SHARE = "place_cache{cut=kv}", "share_prefix{tokens=24}"
#: Bytes of a token's keys and values in one layer: 2 heads of 16 features each, in float32.
TOKEN = 2 * 2 * 16 * 4


def prefixes(graph: Graph) -> dict[str, dict[str, object]]:
    """What the graph says of the states that hold prefixes, by name."""
    states = {n.meta["name"]: n.meta.get("store", {}) for n in graph.placeholders("state")}
    return {name: about for name, about in states.items() if about.get("role") == "prefix"}


def test_every_layer_that_reads_keys_and_values_is_split(captured) -> None:
    graph, records = rewrite(captured("llama"), KV, SHARE)
    assert [r.status for r in records] == ["applied"] * 4
    assert "the first 24 tokens stored once" in records[-1].reason
    counts = graph.counts()
    assert counts["prefix_attention"] == 2 and counts["cache_append"] == 4 and "cache_attention" not in counts
    assert len(prefixes(graph)) == 4 and shared_tokens(graph) == 24
    own = graph.placeholder("own_lengths")
    for attention in graph.calls("prefix_attention"):
        assert argument(attention, "lengths") is own
        keys, prefix = argument(attention, "keys"), argument(attention, "prefix_keys")
        assert prefixes(graph)[prefix.meta["name"]]["of"] == keys.meta["name"]
        assert value(prefix).shape[0] == 1 and value(prefix).shape[2] != value(keys).shape[2]
    assert {argument(append, "lengths") for append in graph.calls("cache_append")} == {own}


def test_windows_stay_as_they_are(captured) -> None:
    graph, records = rewrite(captured("gemma2"), KV, SHARE)
    mine = {r.site: r for r in records if r.pass_string == SHARE}
    assert {r.status for r in mine.values()} == {"applied", "illegal"}
    refused = next(r for r in mine.values() if r.status == "illegal")
    assert "its sliding window is a ring in each row" in refused.reason
    assert graph.counts()["cache_attention"] == graph.counts()["prefix_attention"] == 1
    (ring,) = graph.calls("cache_attention")
    assert argument(ring, "lengths").meta["name"] == "lengths"
    for attention in graph.calls("prefix_attention"):
        assert argument(attention, "softcap") == 50.0


@pytest.mark.parametrize(
    ("name", "passes", "reason"),
    [
        ("gpt2", ("place_cache{cut=minimum}",), "computed from what is stored"),
        ("llama", (KV, "quantize_cache{codec=int,bits=8}"), "packed"),
        ("mistral", (KV,), "sliding window"),
        ("llama", (), None),
    ],
)
def test_where_it_is_refused(captured, name: str, passes: tuple[str, ...], reason: str | None) -> None:
    before, _ = rewrite(captured(name), *passes)
    graph, records = rewrite(captured(name), *passes, SHARE)
    mine = [r for r in records if r.pass_string == SHARE]
    assert graph.counts() == before.counts()
    if reason is None:
        assert [(r.status, r.reason) for r in mine] == [("not found", "no site matches")]
    else:
        assert {r.status for r in mine} == {"illegal"} and all(reason in r.reason for r in mine)


def test_a_store_that_others_read_is_left_alone(captured) -> None:
    graph, _ = rewrite(captured("llama"), KV)
    attention = graph.calls("cache_attention")[0]
    graph.emit(torch.ops.aten.clone.default, argument(attention, "keys"), before=attention)
    first, second = SharePrefix().find(graph)
    assert "also read by" in SharePrefix().legal(first).reason
    assert SharePrefix().legal(second).ok


def test_options() -> None:
    assert str(parse_pass(SHARE)) == SHARE and str(SharePrefix()) == "share_prefix"
    with pytest.raises(PassError, match="tokens=-1 is not a number of tokens"):
        parse_pass("share_prefix{tokens=-1}")
    with pytest.raises(PassError, match="no option 'layers'"):
        parse_pass("share_prefix{layers=0}")


@pytest.mark.parametrize("workload", [Workload(batch=1, shared_prefix=90), Workload(batch=8)])
def test_nothing_is_proposed_where_nothing_is_shared(workload: Workload) -> None:
    assert SharePrefix.proposed(workload) == []


def test_the_workload_fills_in_the_tokens(captured) -> None:
    workload = Workload(batch=4, prompt=100, shared_prefix=90)
    graph, _ = rewrite(captured("llama"), KV)
    assert SharePrefix.proposed(workload) == [SharePrefix(tokens=90)]
    assert SharePrefix().resolve(graph, workload, TARGET, None) == SharePrefix(tokens=90)
    assert SharePrefix(tokens=3).resolve(graph, workload, TARGET, None) == SharePrefix(tokens=3)
    whole = Workload(batch=4, prompt=100, shared_prefix=100)  # a row keeps its last token for itself
    assert SharePrefix.proposed(whole) == [SharePrefix(tokens=99)]


def test_the_prefix_is_read_once_and_the_arithmetic_stays(captured) -> None:
    graph, _ = rewrite(captured("llama"), KV)
    before = Call(graph.calls("cache_attention")[0], Shapes(graph))
    whole, shared = attend(before, "keys", "values"), attend_shared(before, 24)
    assert shared.total_flops.equals(whole.total_flops)
    for batch, context in ((1, 100), (8, 100), (8, 10)):
        place = {B: batch, C: context, T: 3}
        common = min(24, context)
        assert shared.bytes_read.subs(place) == TOKEN * (common + batch * (context + 3 - common))
    assert shared.bytes_read.subs({B: 1}).equals(whole.bytes_read.subs({B: 1}))
    rewritten, _ = rewrite(captured("llama"), KV, SHARE)
    assert graph_cost(rewritten).by_op["prefix_attention"].bytes_read.equals(2 * shared.bytes_read)


def test_the_gain_is_what_the_other_rows_would_have_read_and_kept(captured) -> None:
    graph, _ = rewrite(captured("llama"), KV)
    site = SharePrefix(tokens=24).find(graph)[0]
    for batch in (1, 5):
        delta = SharePrefix(tokens=24).gain(site, Workload(batch=batch, prompt=100), TARGET)
        assert delta.memory_bytes == -(batch - 1) * 24 * TOKEN
        assert (delta.seconds_per_token < 0) == (batch > 1)


@pytest.mark.parametrize(("batch", "capacity"), [(1, 50), (6, 50), (6, 25)])
def test_memory_is_what_is_allocated(captured, batch: int, capacity: int) -> None:
    """Gemma2 has a ring besides, which every row keeps for itself."""
    for name in ("llama", "gemma2"):
        graph, _ = rewrite(captured(name), KV, SHARE)
        stores = default_stores(graph)
        held = program(captured(name).model, graph).allocate(batch, capacity, 24 if batch > 1 else 0)
        assert cache_bytes(stores, batch, capacity) == held.nbytes()
        assert cache_expression(stores).subs({B: batch, S: capacity}) == held.nbytes()
        assert sum(store.shared for store in stores) == 24 * len(prefixes(graph))


def test_without_a_prefix_it_is_the_program_that_does_not_share(captured) -> None:
    model = captured("gemma2").model
    graph, _ = rewrite(captured("gemma2"), KV, SHARE)
    assert largest_difference(model, program(model, graph)) < 1e-4


def test_a_saved_graph_comes_back(captured) -> None:
    graph, _ = rewrite(captured("llama"), KV, SHARE)
    again = graph_from_json(graph_to_json(graph), graph.parameters, torch.device("cpu"))
    assert prefixes(again) == prefixes(graph) and again.counts() == graph.counts()
    assert default_stores(again) == default_stores(graph)


def test_a_prefix_needs_a_program_that_keeps_one_and_room_behind_it(captured) -> None:
    model = captured("llama").model
    plain, sharing = (program(model, rewrite(captured("llama"), *p)[0]) for p in ((KV,), (KV, SHARE)))
    assert plain.shared_prefix is None and sharing.shared_prefix == 24
    with pytest.raises(InputError, match="keeps no shared prefix") as caught:
        plain.allocate(2, 50, 24)
    assert "share_prefix" in str(caught.value)
    with pytest.raises(InputError, match="leaves no room"):
        sharing.allocate(2, 24, 24)
