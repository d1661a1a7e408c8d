"""Memory per device under tensor parallelism, against the shapes divided by hand."""

from __future__ import annotations

import itertools

import pytest

from graphwright.cost_model import (
    StoreSpec,
    Workload,
    per_device,
    plan_memory,
    resolve_target,
    sharding,
    tensor_parallel,
    weights_bytes,
)
from graphwright.ir.canonicalize import canonicalize
from graphwright.ir.errors import InputError
from graphwright.ir.graph import Graph
from graphwright.passes.base import parse_pass
from tests.architectures import tiny_config

PLACE = {"batch": 3, "capacity": 100, "limit": 10**9, "step_tokens": 16}
H100, WORKLOAD = resolve_target("h100"), Workload(batch=2, prompt=90, generate=10)
# Of the tiny models: hidden size, feed-forward width, vocabulary; heads and their width.
H, F, V = 64, 96, 96
HEADS, GROUPS, D = 4, 2, 16
BF16, ROTARY = 2, D // 2 * 4


CONFIGS = {name: tiny_config(name, 1) for name in ("llama", "gpt2", "mixtral", "deepseek_v3", "phi3")}


@pytest.fixture
def canonical(captured):
    def get(name: str, *passes: str) -> Graph:
        graph = captured(CONFIGS[name]).copy()
        canonicalize(graph)
        for chosen in passes:
            parse_pass(chosen)(graph, WORKLOAD, H100, force=True)
        return graph

    return get


@pytest.mark.parametrize("name", ["llama", "phi3"])
@pytest.mark.parametrize("degree", [1, 2, 4, 8])
def test_a_llama_divides_by_heads_width_and_vocabulary(canonical, name, degree):
    """Phi-3 holds the same projections, joined into one matrix each."""

    def own(parts: int) -> int:
        return -(-parts // degree)

    attention = (2 * own(HEADS) * D + 2 * own(GROUPS) * D) * H
    by_hand = attention + 3 * own(F) * H + 2 * own(V) * H + 3 * H  # three norms
    memory = per_device(canonical(name), degree, **PLACE)
    assert memory.weights_bytes == BF16 * by_hand + ROTARY
    assert memory.cache_bytes == 3 * 100 * 2 * own(GROUPS) * D * BF16


def test_one_device_holds_what_the_plan_says(canonical):
    graph = canonical("llama", "place_cache{cut=kv}")
    assert per_device(graph, 1, **PLACE) == plan_memory(graph, **PLACE)


def test_joined_projections_biases_and_position_tables(canonical):
    """GPT-2: what comes back is added once, so its bias is whole; positions are looked up everywhere."""
    wide = 4 * H
    divided = 3 * H * H + 3 * H + H * H + 2 * H * wide + wide + V * H
    whole = 256 * H + 2 * H + 6 * H  # positions, two biases, three norms with bias
    graph = canonical("gpt2")
    assert weights_bytes(graph) == BF16 * (divided + whole)
    assert per_device(graph, 2, **PLACE).weights_bytes == BF16 * (divided // 2 + whole)


def test_experts_divide_by_width_and_the_router_is_whole(canonical):
    attention, experts = (2 * HEADS + 2 * GROUPS) * D * H, 4 * 3 * F * H
    router, norms = 4 * H, 3 * H
    by_hand = (attention + experts + 2 * V * H) // 2 + router + norms
    assert per_device(canonical("mixtral"), 2, **PLACE).weights_bytes == BF16 * by_hand + ROTARY


@pytest.mark.parametrize("absorbed", [False, True])
def test_a_latent_is_held_by_every_device(canonical, absorbed):
    rank, rotary, nope, q_rank = 16, 8, 16, 24
    down = q_rank * H + (rank + rotary) * H
    by_head = HEADS * ((nope + rotary) * q_rank + (nope + D) * rank + D * H)
    norms = 3 * H + q_rank + rank
    passes = ["place_cache{cut=minimum}", "absorb_projections"][: 2 if absorbed else 1]
    graph = canonical("deepseek_v3", *passes)
    for degree in (2, 4):
        memory = per_device(graph, degree, **PLACE)
        by_hand = (by_head + 3 * F * H + 2 * V * H) // degree + down + norms
        assert memory.weights_bytes == BF16 * by_hand + rotary // 2 * 4
        assert memory.cache_bytes == 3 * 100 * (rank + rotary) * BF16


def test_a_stored_layer_input_is_whole_too(canonical):
    one, four = (per_device(canonical("gpt2", "place_cache{cut=minimum}"), n, **PLACE) for n in (1, 4))
    assert four.cache_bytes == one.cache_bytes == 3 * 100 * H * BF16


def test_heads_round_up():
    store = StoreSpec("keys", 3 * 64, 2, heads=3)
    assert [store.on_device(n).elements_per_token for n in (1, 2, 3, 8)] == [192, 128, 64, 64]
    assert StoreSpec("latent", 576, 2).on_device(8).elements_per_token == 576
    with pytest.raises(InputError, match="heads"):
        StoreSpec("keys", 64, 2, heads=0)


def test_the_workspace_divides_where_values_do(canonical):
    graph = canonical("llama")
    one, two, many = (per_device(graph, n, **PLACE).workspace_bytes for n in (1, 2, 1000))
    # At least the residual stream, its norm and the result of the feed-forward stay whole.
    assert one > two > many > 3 * 16 * 3 * H * BF16
    # Gate and up of the feed-forward, halved.
    assert one - two >= 3 * 16 * F * BF16


def test_every_parameter_of_a_decoder_is_accounted_for(canonical):
    graph = canonical("mixtral")
    rules = sharding(graph)
    whole = {name for name in graph.parameters if name not in rules.parameters}
    assert {name.split(".")[-2] for name in whole} == {
        "rotary_emb", "input_layernorm", "post_attention_layernorm", "gate", "norm",
    }  # fmt: skip


def test_the_table_for_the_report(canonical):
    graph = canonical("llama", "place_cache{cut=kv}")
    limit = tensor_parallel(graph, H100, WORKLOAD, degrees=(1,))[0]["total_bytes"] - 1
    table = tensor_parallel(graph, H100, WORKLOAD, degrees=(1, 2, 4), limit_bytes=limit, max_positions=256)
    assert [row["devices"] for row in table] == [1, 2, 4]
    for before, after in itertools.pairwise(table):
        assert after["weights_bytes"] < before["weights_bytes"]
        assert after["total_bytes"] < before["total_bytes"]
        assert after["largest_batch"] >= before["largest_batch"]
    for row in table:
        kinds = ("weights_bytes", "cache_bytes", "workspace_bytes")
        assert row["total_bytes"] == sum(row[kind] for kind in kinds)
        assert row["fits"] == (row["total_bytes"] <= limit)
        assert row["largest_context"] <= 256
    assert not table[0]["fits"]
    assert table[2]["fits"]


@pytest.mark.parametrize("degree", [0, -1, 1.5, True])
def test_what_is_no_number_of_devices_is_refused(canonical, degree):
    with pytest.raises(InputError, match="devices"):
        per_device(canonical("llama"), degree, **PLACE)
