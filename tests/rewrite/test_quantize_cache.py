"""Packed caches: the graph that the pass leaves, the same numbers from it, and everything it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from graphwright.ir.codecs import PageShape, parse_codec
from graphwright.ir.codecs.methods import methods
from graphwright.ir.graph import Graph, argument, op_name, value
from graphwright.ir.serialize import dumps, graph_from_json, graph_to_json
from graphwright.optimizer.quality.samples import StoreSamples
from graphwright.passes.base import SiteRecord, parse_pass
from graphwright.passes.quantize_cache import QuantizeCache
from tests.architectures import VOCAB
from tests.rewrite.cached_programs import TARGET, WORKLOAD, largest_difference, program, rewrite

KV = "place_cache{cut=kv}"
#: Changes no number of a float32 model, so that its logits stay stock's.
EXACT = "quantize_cache{codec=float(bits=32),page=16}"
#: Longer than the tail at 16 tokens a page.
LONG_WINDOW = {"sliding_window": 96}


def sizes(graph: Graph, role: str) -> dict[str, Any]:
    """The placeholders of one role by name."""
    states = graph.placeholders("state")
    return {n.meta["name"]: value(n) for n in states if n.meta.get("store", {}).get("role") == role}


def packed(records: list[SiteRecord]) -> list[SiteRecord]:
    """What ``quantize_cache`` said."""
    return [r for r in records if r.pass_string.startswith("quantize_cache")]


# --- the graph -----------------------------------------------------------------------------------


def test_op_counts(captured) -> None:
    before, _ = rewrite(captured("llama"), KV)
    graph, records = rewrite(captured("llama"), KV, "quantize_cache{codec=int,bits=4,page=32}")
    assert graph.counts() == before.counts() | {"cache_read": 4}
    assert [r.status for r in packed(records)] == ["applied", "applied"]
    for attention in graph.calls("cache_attention"):
        for name in ("keys", "values"):
            read = argument(attention, name)
            assert op_name(read) == "cache_read"
            assert (argument(read, "codec"), argument(read, "page")) == ("token_scale >> uniform(bits=4)", 32)


def test_the_parts_of_a_store(captured) -> None:
    """Only tails are appended to; all stores share the symbols of their sizes."""
    graph, _ = rewrite(captured("llama"), KV, "quantize_cache{codec=int,bits=4,page=32,first=3,recent=5}")
    names = [f"model.layers.{i}.self_attn.{role}" for i in (0, 1) for role in ("keys", "values")]
    assert set(sizes(graph, "tail")) == {f"{name}.tail" for name in names}
    tails, buffers = sizes(graph, "tail").values(), sizes(graph, "buffer")
    assert {(t.shape[1], t.shape[3], t.dtype) for t in tails} == {(2, 16, torch.float32)}
    assert len({str(t.shape[2]) for t in tails}) == 1
    assert {tuple(t.shape[1:]) for t in sizes(graph, "first").values()} == {(2, 3, 16)}
    assert {(t.dim(), t.dtype) for t in sizes(graph, "packed").values()} == {(1, torch.int64)}
    found = {(name.rsplit(".", 1)[-1], tuple(b.shape[2:]), b.dtype) for name, b in buffers.items()}
    assert found == {("codes", (2, 32, 8), torch.uint8), ("scale", (2, 32), torch.bfloat16)}
    assert len({str(b.shape[1]) for b in buffers.values()}) == 1
    assert list(sizes(graph, "slots")) == ["slots.0"]
    for node in graph.placeholders("state"):
        about = node.meta["store"]
        appended = "cache_append" in {op_name(user) for user in node.users}
        assert appended == (about["role"] == "tail")
        assert about["role"] == "slots" or (about["first"], about["recent"], about["page"]) == (3, 5, 32)


def test_tables_are_parameters(captured) -> None:
    graph, _ = rewrite(captured("llama"), KV, "quantize_cache{codec=turboquant,bits=3,page=16}")
    tables = {n for n in graph.parameters if n.endswith((".matrix", ".levels"))}
    assert len(tables) == 4 * 2
    shape = PageShape(2, 16, 16)
    for read in graph.calls("cache_read"):
        codec = parse_codec(argument(read, "codec"))
        given = [
            n.meta["name"].split(".keys.")[-1].split(".values.")[-1] for n in argument(read, "constants")
        ]
        assert given == list(codec.constant_names(shape))


def test_windows_have_rings_of_their_own(captured) -> None:
    graph, records = rewrite(captured("gemma2", **LONG_WINDOW), KV, EXACT)
    assert {r.status for r in packed(records)} == {"applied"}
    assert set(sizes(graph, "slots")) == {"slots.0", "slots.96"}
    assert len({str(b.shape[1]) for b in sizes(graph, "buffer").values()}) == 2
    state = program(captured("gemma2", **LONG_WINDOW).model, graph).allocate(1, 250)
    pages = {name: state.stores[name].shape[1] for name in sizes(graph, "buffer")}
    assert set(pages.values()) == {16, (96 + 96) // 16 + 1}


def test_the_way_through_json(captured) -> None:
    found = captured("llama")
    graph, _ = rewrite(found, KV, "quantize_cache{codec=turboquant,page=16,first=2}")
    text = dumps(graph_to_json(graph))
    again, third = (graph_from_json(json.loads(text), graph.parameters, torch.device("cpu")) for _ in "12")
    assert dumps(graph_to_json(again)) == dumps(graph_to_json(third))
    assert again.counts() == graph.counts()
    stores = [n.meta["store"] for n in graph.placeholders("state")]
    assert [n.meta["store"] for n in again.placeholders("state")] == stores
    ids = torch.randint(3, VOCAB, (2, 50))
    results = []
    for one in (graph, again):
        runs = program(found.model, one)
        state = runs.allocate(2, 60)
        results.append(runs.prefill(state, ids, torch.tensor([50, 30])))
        results.append(runs.step(state, ids[:, :2], torch.tensor([2, 1])))
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


# --- the same numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("gpt2", ("place_cache{cut=minimum}",)),  # the layer input
        ("deepseek_v3", ("place_cache{cut=minimum}",)),  # the latent, and keys and values computed from it
        ("deepseek_v3", ("place_cache{cut=minimum}", "absorb_projections")),
        ("llama", ("place_cache{cut=pre_rotary}",)),
    ],
)
@pytest.mark.parametrize("what", ["", ",first=2,recent=3", ",layers=1"])
def test_whatever_is_stored_is_packed(captured, name: str, before: tuple[str, ...], what: str) -> None:
    found = captured(name)
    graph, records = rewrite(found, *before, EXACT.replace("}", f"{what}}}"))
    assert {r.status for r in packed(records)} == {"applied"}
    plain = [n for n in graph.placeholders("state") if "store" not in n.meta]
    assert bool(plain) == ("layers" in what)
    assert largest_difference(found.model, program(found.model, graph)) < 1e-5


@pytest.mark.parametrize("cut", ["kv", "minimum", "pre_rotary"])
def test_a_ring_that_has_come_round(captured, cut: str) -> None:
    """Of pages: recomputed keys are rotated by the position of the token that a slot stands for."""
    found = captured("gemma2", num_key_value_heads=4, **LONG_WINDOW)
    graph, _ = rewrite(found, f"place_cache{{cut={cut}}}", EXACT)
    ring = 96 + 96
    assert largest_difference(found.model, program(found.model, graph), (ring + 30, 40), (8, 3, 9)) < 1e-5


def test_each_method_runs_where_it_can(captured) -> None:
    """On heads of 16 features some cannot; whatever runs gives finite logits near stock's."""
    found = captured("llama")
    ids = torch.randint(3, VOCAB, (1, 60))
    with torch.no_grad():
        stock = found.model(ids).logits
    for name, method in methods().items():
        bits = max(method.bits)
        graph = found.canonical.copy()
        graph.samples = StoreSamples(lambda g: program(found.model, g), lambda: ids.tolist() * 2)
        for text in (KV, f"quantize_cache{{codec={name},bits={bits},page=16,recent=0,first=0}}"):
            records = parse_pass(text)(graph, WORKLOAD, TARGET, force=True)
        if records[0].status != "applied":
            assert "stays as it is" in records[0].reason, name
            continue
        runs = program(found.model, graph)
        state = runs.allocate(1, 60)
        runs.prefill(state, ids[:, :40], torch.tensor([40]))
        logits = runs.step(state, ids[:, 40:], torch.tensor([20]))
        assert state.stores["model.layers.0.self_attn.keys.packed"].tolist() == [32], name
        assert (logits - stock[:, 40:]).abs().max() < 0.5 * stock.abs().max(), name


# --- what is packed ------------------------------------------------------------------------------


@pytest.mark.parametrize(("only", "kept"), [("keys", "values"), ("values", "keys")])
def test_only_one_of_keys_and_values(captured, only: str, kept: str) -> None:
    found = captured("llama")
    graph, records = rewrite(found, KV, EXACT.replace("}", f",only={only}}}"))
    plain = {n.meta["name"] for n in graph.placeholders("state") if "store" not in n.meta}
    assert plain == {f"model.layers.{i}.self_attn.{kept}" for i in (0, 1)}
    assert all(f"{only} in 32 bits" in r.reason and kept not in r.reason for r in packed(records))
    assert largest_difference(found.model, program(found.model, graph)) < 1e-5


def test_a_second_pass_packs_what_the_first_left(captured) -> None:
    """Another codec for values; a third time finds nothing."""
    one, two = (
        f"quantize_cache{{codec=int,bits={b},page=16,only={o}}}" for b, o in ((8, "keys"), (4, "values"))
    )
    graph, records = rewrite(captured("llama"), KV, one, two, EXACT)
    assert [r.status for r in packed(records)] == ["applied"] * 4 + ["not found"]
    codecs = {argument(n, "codec") for n in graph.calls("cache_read")}
    assert codecs == {"token_scale >> uniform(bits=8)", "token_scale >> uniform(bits=4)"}


def test_values_may_have_a_chain_of_their_own(captured) -> None:
    chosen = "quantize_cache{codec=float(bits=32),values=channel_scale >> uniform(bits=4),page=16}"
    _, records = rewrite(captured("llama"), KV, chosen)
    assert "values in 5 bits by channel_scale >> uniform(bits=4)" in packed(records)[0].reason
    assert "keys in 32 bits by float(bits=32)" in packed(records)[0].reason


def test_only_the_named_layers(captured) -> None:
    found = captured("llama")
    graph, _ = rewrite(found, KV, EXACT.replace("}", ",layers=1}"))
    assert {name.split(".")[2] for name in sizes(graph, "tail")} == {"1"}
    assert largest_difference(found.model, program(found.model, graph)) < 1e-5


def test_the_reason_says_bits_and_what_stays(captured) -> None:
    _, records = rewrite(captured("llama"), KV, "quantize_cache{codec=int,bits=4,page=32,first=2,recent=8}")
    reason = packed(records)[0].reason
    # A scale of 16 bits for each token's 16 features of a head.
    assert "keys in 5 bits by token_scale >> uniform(bits=4)" in reason
    assert "the first 2 and the newest 8 to 39 tokens as they are" in reason
    assert "MiB of cache" in reason


def test_calibration_sees_the_store(captured) -> None:
    """Levels are fitted on the text; without text the layer keeps its precision."""
    found, chosen = captured("llama"), "quantize_cache{codec=channel_range >> nonuniform(bits=2),page=16}"
    _, records = rewrite(found, KV, chosen)
    assert {r.status for r in packed(records)} == {"illegal"}
    assert "is calibrated, and there is no text to calibrate on" in packed(records)[0].reason
    rows = torch.randint(3, VOCAB, (2, 70)).tolist()
    graph = found.canonical.copy()
    graph.samples = StoreSamples(lambda g: program(found.model, g), lambda: rows)
    for text in (KV, chosen):
        parse_pass(text)(graph, WORKLOAD, TARGET, force=True)
    name = "model.layers.1.self_attn.keys.1.levels"
    codec, shape = parse_codec("channel_range >> nonuniform(bits=2)"), PageShape(2, 16, 16)
    assert not torch.equal(graph.parameters[name], codec.constants(shape)["1.levels"])


def test_calibration_text_shorter_than_a_page(captured) -> None:
    """Leaves no whole page: the stand-ins of the codec, not a crash."""
    found = captured("llama")
    graph = found.canonical.copy()
    graph.samples = StoreSamples(lambda g: program(found.model, g), lambda: [[3, 4, 5]])
    parse_pass(KV)(graph, WORKLOAD, TARGET, force=True)
    chosen = parse_pass("quantize_cache{codec=channel_range >> nonuniform(bits=2),page=16}")
    records = chosen(graph, WORKLOAD, TARGET, force=True)
    assert {r.status for r in records} == {"applied"}
    assert graph.parameters["model.layers.1.self_attn.keys.1.levels"].isfinite().all()


def test_smaller_caches_gain_memory(captured) -> None:
    graph, _ = rewrite(captured("llama"), KV)
    site = QuantizeCache("int", 4).find(graph)[0]
    small, large = (QuantizeCache("int", bits).gain(site, WORKLOAD, TARGET) for bits in (2, 8))
    assert small.memory_bytes < large.memory_bytes < 0
    assert small.seconds_per_token < large.seconds_per_token < 0


# --- what is refused -----------------------------------------------------------------------------


def test_pages_that_a_codec_cannot_serve_stay_as_they_are(captured) -> None:
    """Heads of 16 features cannot have groups of 64; of a site with one such store, none is packed."""
    found = captured("llama")
    chosen = "quantize_cache{codec=float(bits=32),values=token_scale(group=64) >> uniform(bits=4),page=16}"
    graph, records = rewrite(found, KV, chosen)
    assert {r.status for r in packed(records)} == {"illegal"}
    assert all("values stays as it is: token_scale(group=64)" in r.reason for r in packed(records))
    assert graph.counts()["cache_append"] == 4 and not graph.calls("cache_read")


def test_it_needs_a_cache(captured) -> None:
    _, records = rewrite(captured("llama"), EXACT)
    assert [r.status for r in records] == ["not found"]
