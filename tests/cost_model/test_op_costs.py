"""Each op's rule against arithmetic done by hand."""

from __future__ import annotations

import pytest
import torch

from graphwright.cost_model import B, C, Cost, T, default_stores, graph_cost, subgraph_cost
from graphwright.cost_model.op_costs import RULES, expected_experts
from graphwright.ir.errors import InputError
from graphwright.ir.graph import op_name
from graphwright.ir.ops import SEMANTIC_OPS


def cost_of_last(graph) -> Cost:
    cost = graph_cost(graph)
    return next(c for node, c in reversed(cost.by_node.items()) if op_name(node) in RULES)


def same(left, right):
    return left.equals(right) or (left - right).expand() == 0


def test_every_semantic_op_has_a_rule():
    assert set(SEMANTIC_OPS) - set(RULES) == set()


@pytest.mark.parametrize("target", ["linear", torch.ops.aten.linear.default])
def test_linear(sketch, target):
    x, w, b = sketch.input("x", "B", "T", 64), sketch.weight("w", 96, 64), sketch.weight("b", 96)
    cost = cost_of_last(sketch.done(sketch.emit(target, x, w, b)))
    assert same(cost.flops["bfloat16"], 2 * B * T * 64 * 96)
    assert cost.read["weights"] == 2 * (64 * 96 + 96)
    assert same(cost.activation_bytes, 2 * B * T * (64 + 96))
    assert cost.launches == 1
    assert cost.bytes_written == 0


def test_addmm_with_a_stored_matrix(sketch):
    """GPT-2 writes its linears as addmm with the matrix the other way round."""
    x = sketch.input("x", sketch.rows(), 64)
    w, b = sketch.weight("w", 64, 96), sketch.weight("b", 96)
    cost = cost_of_last(sketch.done(sketch.emit(torch.ops.aten.addmm.default, b, x, w)))
    assert same(cost.flops["bfloat16"], 2 * B * T * 64 * 96)
    assert cost.read["weights"] == 2 * (64 * 96 + 96)


def test_linear_group_reads_its_input_once(sketch):
    x = sketch.input("x", "B", "T", 64)
    weights = [sketch.weight(name, n, 64) for name, n in (("q", 64), ("k", 32), ("v", 32))]
    cost = cost_of_last(sketch.done(sketch.emit("linear_group", x, weights, [None, None, None])))
    assert same(cost.flops["bfloat16"], 2 * B * T * 64 * 128)
    assert cost.read["weights"] == 2 * 64 * 128
    assert same(cost.activation_bytes, 2 * B * T * (64 + 128))
    assert cost.launches == 1


def test_linears_of_one_input_are_one_launch(sketch):
    x = sketch.input("x", "B", "T", 64)
    results = [sketch.emit("linear", x, sketch.weight(name, n, 64)) for name, n in (("q", 64), ("k", 32))]
    cost = graph_cost(sketch.done(*results)).total
    assert cost.launches == 1
    assert same(cost.flops["bfloat16"], 2 * B * T * 64 * 96)


def test_gated_mlp(sketch):
    x = sketch.input("x", "B", "T", 64)
    gate, up, down = sketch.weight("g", 96, 64), sketch.weight("u", 96, 64), sketch.weight("d", 64, 96)
    cost = cost_of_last(sketch.done(sketch.emit("gated_mlp", x, gate, up, down)))
    assert same(cost.flops["bfloat16"], 2 * B * T * 3 * 64 * 96)
    assert cost.read["weights"] == 2 * 3 * 64 * 96


def test_mlp_with_biases(sketch):
    x = sketch.input("x", "B", "T", 64)
    up, down = sketch.weight("u", 96, 64), sketch.weight("d", 64, 96)
    biases = sketch.weight("ub", 96), sketch.weight("db", 64)
    cost = cost_of_last(sketch.done(sketch.emit("mlp", x, up, down, *biases)))
    assert same(cost.flops["bfloat16"], 2 * B * T * 2 * 64 * 96)
    assert cost.read["weights"] == 2 * (2 * 64 * 96 + 96 + 64)


def routed(sketch, experts=8, choices=2):
    x = sketch.input("x", sketch.rows(), 1, 64)
    index = sketch.input("index", sketch.rows(), choices, dtype=torch.int64)
    return sketch.done(sketch.emit("routed_linear", x, index, sketch.weight("w", experts, 96, 64)))


def test_routed_linear_reads_the_experts_that_are_chosen(sketch):
    cost = cost_of_last(routed(sketch))
    assert same(cost.flops["bfloat16"], 2 * B * T * 2 * 64 * 96)
    expert = 2 * 64 * 96
    assert cost.at(batch=1).read["weights"] == pytest.approx(2 * expert)  # one token: its two experts
    two = 8 * (1 - (6 / 8) ** 2)
    assert cost.at(batch=2).read["weights"] == pytest.approx(two * expert)
    assert cost.at(batch=1, tokens=2).read["weights"] == pytest.approx(two * expert)
    assert cost.at(batch=10_000).read["weights"] == pytest.approx(8 * expert)


def test_expected_experts_by_counting():
    """Two tokens choose two of four experts each: over the 36 pairs of choices, 3 different on average."""
    from itertools import combinations

    choices = list(combinations(range(4), 2))
    counted = sum(len({*a, *b}) for a in choices for b in choices) / len(choices) ** 2
    assert float(expected_experts(4, 2, 2)) == pytest.approx(counted)


def attention(sketch, window=0):
    q = sketch.input("q", "B", 8, "T", 16)
    k, v = sketch.input("k", "B", 2, "T", 16), sketch.input("v", "B", 2, "T", 32)
    return cost_of_last(sketch.done(sketch.emit("attention", q, k, v, 0.25, window)))


def test_attention_is_priced_as_a_step_over_a_cache(sketch):
    cost = attention(sketch)
    slot = 2 * 2 * (16 + 32)
    assert same(cost.read["cache"], B * (C + T) * slot)
    assert same(cost.written["cache"], B * T * slot)
    # Token t sees C + t + 1 tokens, counted one by one.
    values = cost.at(batch=3, context=100, tokens=7)
    assert values.total_flops == 3 * 2 * 8 * (16 + 32) * sum(100 + t + 1 for t in range(7))
    assert cost.launches == 1


def test_a_window_bounds_what_attention_reads(sketch):
    cost = attention(sketch, window=64)
    slot = 2 * 2 * (16 + 32)
    short, long = cost.at(context=10), cost.at(context=10_000)
    assert short.read["cache"] == 11 * slot
    assert long.read["cache"] == 64 * slot
    assert long.total_flops == 2 * 8 * (16 + 32) * 64
    assert cost.at(context=10**6) == long


def cached(sketch):
    keys, values = sketch.state("keys", 2, 48, 16), sketch.state("values", 2, 48, 32)
    q, k, v = (sketch.input(n, "B", h, "T", d) for n, h, d in (("q", 8, 16), ("k", 2, 16), ("v", 2, 32)))
    lengths, counts = (sketch.input(n, "B", dtype=torch.int64) for n in ("lengths", "counts"))
    positions = sketch.input("positions", "B", "T", dtype=torch.int64)
    tree = sketch.input("tree", "B", 0, dtype=torch.int64)
    return q, k, v, keys, values, positions, lengths, counts, tree


def test_the_cached_ops_cost_what_attention_predicted(sketch):
    q, k, v, keys, values, positions, lengths, counts, tree = cached(sketch)
    sketch.emit("cache_append", keys, k, lengths, counts)
    sketch.emit("cache_append", values, v, lengths, counts)
    out = sketch.emit("cache_attention", q, keys, values, positions, lengths, counts, tree, 0.25)
    split = graph_cost(sketch.done(out)).total
    whole = attention(type(sketch)())
    assert same(split.read["cache"], whole.read["cache"])
    assert same(split.written["cache"], whole.written["cache"])
    assert same(split.total_flops, whole.total_flops)
    assert split.launches == whole.launches == 1  # lowering joins the three


def test_append_attention_is_one_launch(sketch):
    q, k, v, keys, values, *rest = cached(sketch)
    fused = graph_cost(sketch.done(sketch.emit("append_attention", q, k, v, keys, values, *rest, 0.25))).total
    whole = attention(type(sketch)())
    assert same(fused.read["cache"], whole.read["cache"])
    assert same(fused.written["cache"], whole.written["cache"])
    assert same(fused.total_flops, whole.total_flops)
    assert fused.launches == 1


def test_rotary_append_is_one_launch(sketch):
    """It costs the rotations and the appends, and moves no rotated keys."""
    q, k, v, keys, values, _, lengths, counts, _ = cached(sketch)
    cos, sin = (sketch.input(name, "B", 1, "T", 16) for name in ("cos", "sin"))
    new = sketch.emit("rotary_append", q, k, v, cos, sin, keys, values, lengths, counts)
    cost = graph_cost(sketch.done(new)).total
    assert same(cost.written["cache"], 2 * B * T * 2 * (16 + 32))
    assert same(cost.total_flops, 3 * B * T * (8 + 2) * 16)
    assert same(cost.activation_bytes, 2 * B * T * (2 * 8 * 16 + 2 * (16 + 32) + 2 * 16))
    assert cost.launches == 1 and cost.bytes_read == 0


def test_what_a_store_is_expanded_into_is_not_cache(sketch):
    """A latent of 8 per token is stored and expanded into keys and values of 16 before attention."""
    latent = sketch.state("latent", 1, 48, 8)
    keys = sketch.emit("linear", latent, sketch.weight("up", 16, 8))
    q = sketch.input("q", "B", 8, "T", 16)
    lengths, counts = (sketch.input(n, "B", dtype=torch.int64) for n in ("lengths", "counts"))
    positions = sketch.input("positions", "B", "T", dtype=torch.int64)
    tree = sketch.input("tree", "B", 0, dtype=torch.int64)
    out = sketch.emit("cache_attention", q, keys, keys, positions, lengths, counts, tree, 0.25, 32)
    graph = sketch.done(out)
    cost = graph_cost(graph).total
    assert same(cost.read["cache"], 2 * 8 * B * C)
    assert same(graph_cost(graph).by_op["linear"].total_flops, 2 * B * C * 8 * 16)
    assert [(s.name, s.bytes_per_token, s.window) for s in default_stores(graph)] == [("latent", 16, 32)]


def test_embedding_reads_rows(sketch):
    table = sketch.weight("table", 1000, 64)
    cost = cost_of_last(sketch.done(sketch.emit(torch.ops.aten.embedding.default, table, sketch.ids)))
    assert same(cost.read["weights"], 2 * 64 * B * T)


def test_norms_read_their_weight(sketch):
    x, w = sketch.input("x", "B", "T", 64), sketch.weight("w", 64)
    first = sketch.emit("rms_norm", x, w, 1e-6)
    second = sketch.emit("layer_norm", first, w, None, 1e-6)
    cost = graph_cost(sketch.done(second))
    assert cost.total.read["weights"] == 2 * 2 * 64
    assert cost.total.launches == 1  # one fused region
    assert set(cost.by_op) == {"rms_norm", "layer_norm"}


def test_rotary_moves_no_weights(sketch):
    x = sketch.input("x", "B", 4, "T", 16)
    cos, sin = (sketch.input(name, "B", 1, "T", 16) for name in ("cos", "sin"))
    cost = graph_cost(sketch.done(sketch.emit("rotary", x, cos, sin))).total
    assert cost.bytes_read == 0
    assert same(cost.total_flops, 3 * B * T * 64)


def test_slot_positions_are_free_of_flops(sketch):
    lengths, counts = (sketch.input(n, "B", dtype=torch.int64) for n in ("lengths", "counts"))
    cost = graph_cost(sketch.done(sketch.emit("slot_positions", lengths, counts, 48))).total
    assert cost.total_flops == 0


def test_views_are_free_and_neighbours_share_a_kernel(sketch):
    aten = torch.ops.aten
    x, w = sketch.input("x", "B", "T", 64), sketch.weight("w", 64, 64)
    wide = sketch.emit("linear", x, w)
    turned = sketch.emit(aten.transpose.int, wide, 1, 2)
    first = sketch.emit(aten.silu.default, turned)
    second = sketch.emit(aten.mul.Tensor, first, first)
    back = sketch.emit(aten.transpose.int, second, 1, 2)
    third = sketch.emit("linear", back, w)
    cost = graph_cost(sketch.done(third))
    assert turned not in cost.by_node
    assert cost.by_op["elementwise"].launches == 1
    # Only what enters and leaves the fused region moves.
    assert same(cost.by_op["elementwise"].activation_bytes, 2 * 2 * B * T * 64)
    assert cost.total.launches == 3


def test_ops_with_a_kernel_between_them_do_not_share_one(sketch):
    """A residual stream joins every layer; it is still one kernel per layer."""
    aten = torch.ops.aten
    x, w = sketch.input("x", "B", "T", 64), sketch.weight("w", 64, 64)
    for _ in range(3):
        x = sketch.emit(aten.add.Tensor, x, sketch.emit("linear", sketch.emit(aten.silu.default, x), w))
    cost = graph_cost(sketch.done(x))
    # silu, then (add, silu) twice, then add.
    assert cost.by_op["elementwise"].launches == 4


def test_recomputing_a_subgraph_grows_with_the_context(sketch):
    x, w = sketch.input("x", "B", "T", 64), sketch.weight("w", 96, 64)
    norm = sketch.emit("rms_norm", x, sketch.weight("n", 64), 1e-6)
    keys = sketch.emit("linear", norm, w)
    graph = sketch.done(keys)
    cost = subgraph_cost(graph, [norm, keys])
    assert same(cost.flops["bfloat16"], 2 * B * C * 64 * 96)
    assert cost.read["weights"] == 2 * (64 * 96 + 64)
    step = subgraph_cost(graph, [norm, keys], tokens=T)
    assert same(step.total_flops, graph_cost(graph).total.total_flops)


def test_attention_is_not_recomputed(sketch):
    q = sketch.input("q", "B", 8, "T", 16)
    k = sketch.input("k", "B", 2, "T", 16)
    node = sketch.emit("attention", q, k, k, 0.25)
    with pytest.raises(InputError, match="attention"):
        subgraph_cost(sketch.done(node), [node])
