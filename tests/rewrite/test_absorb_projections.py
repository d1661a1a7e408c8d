"""Latent attention with the expansion absorbed: the graph, the numbers, the bytes, the refusals."""

from __future__ import annotations

import pytest
import torch

from graphwright.cost_model.workload import Workload
from graphwright.ir.graph import argument, op_name, value
from graphwright.passes.absorb_projections import AbsorbProjections
from graphwright.passes.expansion import find_expansion
from tests.rewrite.cached_programs import TARGET, WORKLOAD, largest_difference, program, rewrite

PASSES = ("place_cache{cut=minimum}", "absorb_projections")
RANK, ROTARY, HEADS, NOPE, VALUE = 16, 8, 4, 16, 16
# Llama without rotary embeddings in one layer: nothing lies between projection and attention there.
PARTLY_NOPE = {"num_key_value_heads": 4, "no_rope_layers": [0, 1]}


def test_the_expansion_is_read_off_its_data_movements(captured) -> None:
    graph, _ = rewrite(captured("deepseek_v3"), PASSES[0])
    found = find_expansion(graph, graph.calls("cache_attention")[0])
    per_head = NOPE + VALUE
    assert found.keys.first == tuple(per_head * head for head in range(HEADS))
    assert found.values.first == tuple(per_head * head + NOPE for head in range(HEADS))
    assert (found.keys.start, found.keys.stop) == (0, NOPE)
    assert found.direct is not None and (found.direct.start, found.direct.stop) == (NOPE, NOPE + ROTARY)
    assert found.direct.first == (0,) * HEADS
    assert value(found.latent).shape[3] == RANK


def test_op_counts(captured) -> None:
    before, _ = rewrite(captured("deepseek_v3"), PASSES[0])
    graph, records = rewrite(captured("deepseek_v3"), *PASSES)
    assert [r.status for r in records if r.pass_string == "absorb_projections"] == ["applied"] * 2
    expected = before.counts()
    expected["linear"] -= 2  # the expansion of each layer
    expected["cache_append"] -= 2  # one store a layer
    expected["routed_linear"] += 4  # queries and outputs by head
    assert graph.counts() == expected


def test_nothing_runs_over_slots_but_the_attention(captured) -> None:
    graph, _ = rewrite(captured("deepseek_v3"), *PASSES)
    for state in graph.placeholders("state"):
        assert {op_name(user) for user in state.users} == {
            "cache_append",
            "cache_attention",
            "aten.slice.Tensor",
        }
    for attention in graph.calls("cache_attention"):
        keys, values = argument(attention, "keys"), argument(attention, "values")
        assert keys.op == "placeholder" and argument(values, "self") is keys
        assert value(keys).shape[1] == 1 and value(keys).shape[3] == RANK + ROTARY
        assert value(values).shape[3] == RANK
        assert argument(attention, "scale") == pytest.approx((NOPE + ROTARY) ** -0.5)


def test_logits_and_bytes(captured) -> None:
    model = captured("deepseek_v3").model
    runs = program(model, rewrite(captured("deepseek_v3"), *PASSES)[0])
    assert largest_difference(model, runs) < 1e-5
    layers, itemsize = 2, 4
    assert runs.allocate(3, 50).nbytes() == layers * 3 * 50 * (RANK + ROTARY) * itemsize


def test_going_back_and_on_with_another_text(captured) -> None:
    model = captured("deepseek_v3").model
    runs = program(model, rewrite(captured("deepseek_v3"), *PASSES)[0])
    ids = torch.randint(3, 90, (2, 40))
    other = ids.clone()
    other[:, 12:] = torch.randint(3, 90, (2, 28))
    state = runs.allocate(2, 40)
    runs.prefill(state, ids[:, :30], torch.tensor([30, 25]))
    state.truncate(torch.tensor([12, 12]))
    logits = runs.prefill(state, other[:, 12:], torch.tensor([28, 28]))
    with torch.no_grad():
        stock = model(other).logits[:, -1]
    assert float((logits - stock).abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_full_heads_with_biases(captured, name: str) -> None:
    """A bias on keys cancels in the softmax, one on values is added after it."""
    graph, records = rewrite(captured(name), *PASSES)
    assert [r.status for r in records[2:]] == ["applied"] * 2
    assert largest_difference(captured(name).model, program(captured(name).model, graph)) < 1e-5


def test_layers_with_a_rotary_embedding_are_left_alone(captured) -> None:
    graph, records = rewrite(captured("smollm3", **PARTLY_NOPE), *PASSES)
    outcome = {r.site: (r.status, r.reason) for r in records if r.pass_string == "absorb_projections"}
    assert outcome["model.layers.0.self_attn"][0] == "applied"
    assert outcome["model.layers.1.self_attn"] == (
        "illegal",
        "the rotary embedding lies between the projection and the attention",
    )
    model = captured("smollm3", **PARTLY_NOPE).model
    assert largest_difference(model, program(model, graph)) < 1e-5


def test_stored_keys_and_values_are_no_site(captured) -> None:
    _, records = rewrite(captured("deepseek_v3"), "place_cache{cut=kv}", "absorb_projections")
    assert records[-1].status == "not found"


def test_a_second_time_finds_nothing(captured) -> None:
    _, records = rewrite(captured("deepseek_v3"), *PASSES, "absorb_projections")
    assert records[-1].status == "not found"


def test_an_expansion_that_something_else_reads_stays(captured) -> None:
    graph, _ = rewrite(captured("deepseek_v3"), PASSES[0])
    attention = graph.calls("cache_attention")[0]
    keys = argument(attention, "keys")
    graph.emit(torch.ops.aten.neg.default, keys, before=attention)
    site = AbsorbProjections().find(graph)[0]
    verdict = AbsorbProjections().legal(site)
    assert not verdict.ok and "is also read by neg" in verdict.reason


def test_biases_do_not_cancel_beside_sinks(captured) -> None:
    graph, _ = rewrite(captured("gpt2"), PASSES[0])
    attention = graph.calls("cache_attention")[0]
    with graph.fake_mode:
        fake = torch.empty(HEADS)
    sinks = graph.add_placeholder("parameter", "sinks", fake)
    attention.args = (*attention.args[:-1], sinks)
    verdict = AbsorbProjections().legal(AbsorbProjections().find(graph)[0])
    assert not verdict.ok and "sinks" in verdict.reason


def test_the_longer_the_context_the_larger_the_gain(captured) -> None:
    graph, _ = rewrite(captured("deepseek_v3"), PASSES[0])
    absorb = AbsorbProjections()
    site = absorb.find(graph)[0]
    assert absorb.legal(site).ok
    short, long = (absorb.gain(site, Workload(prompt=n), TARGET) for n in (1_000, 1_000_000))
    assert long.seconds_per_token < short.seconds_per_token
    assert long.profitable and "without" in long.note
    assert long.memory_bytes == 0.0
    before = graph.counts()
    absorb.gain(site, WORKLOAD, TARGET)
    assert graph.counts() == before
