from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.cost_model import (
    Cost,
    Workload,
    best_length,
    drafting_seconds,
    expected_tokens,
    expected_tree_tokens,
    goodput,
    predict,
    predict_speculation,
    resolve_target,
    speculation_range,
    speculation_speedup,
)
from graphwright.cost_model.cost import B, C, T
from graphwright.cost_model.speculation import best_drafts
from graphwright.ir.errors import InputError
from graphwright.passes.base import parse_pass

#: A step that reads 100 MB whatever it does, and computes for each of its tokens.
STEP = Cost({"bfloat16": 10**8 * B * T}, {"weights": 10**8}, {}, 10)
CHAIN = [-1, 0, 1, 2]
# Two children of the root; the first has two children, and the first of those one.
TREE = [-1, -1, 0, 0, 2]


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("drafts", [0, 1, 4, 9])
def test_the_closed_form(acceptance, drafts):
    closed = (1 - acceptance ** (drafts + 1)) / (1 - acceptance)
    assert expected_tokens(acceptance, drafts) == pytest.approx(closed)


def test_the_ends():
    assert expected_tokens(1.0, 5) == 6
    assert expected_tokens(0.0, 5) == 1
    assert expected_tokens([0.9, 0.5], 2) == pytest.approx(1 + 0.9 + 0.45)
    assert expected_tokens([0.9, 0.5], 1) == pytest.approx(1.9)


def test_against_drawing():
    chances, draw = [0.9, 0.6, 0.7], random.Random(0)
    total, cycles = 0, 20_000
    for _ in range(cycles):
        accepted = next((i for i, chance in enumerate(chances) if draw.random() >= chance), len(chances))
        total += accepted + 1
    assert total / cycles == pytest.approx(expected_tokens(chances, 3), abs=0.05)


@pytest.mark.parametrize(("acceptance", "drafts"), [(1.5, 1), (-0.1, 1), ([0.5], 2), (0.5, -1)])
def test_what_is_no_acceptance_is_refused(acceptance, drafts):
    with pytest.raises(InputError, match="acceptance"):
        expected_tokens(acceptance, drafts)


def test_no_acceptance_is_a_loss(machine):
    lost = predict_speculation(STEP, machine, 0.0, 4, draft_seconds=1e-5)
    assert lost["tokens_per_cycle"] == 1
    assert lost["speedup"] < 1
    gained = predict_speculation(STEP, machine, 0.8, 4)
    assert gained["speedup"] > 2
    assert gained["seconds_per_token"] == pytest.approx(gained["decode_seconds"] / gained["speedup"])


def test_a_large_batch_stops_paying(machine):
    """Verification is free only while the step is bound by memory."""
    cost = Cost({"bfloat16": 10**8 * B * T}, {"weights": 10**8})
    small = predict_speculation(cost, machine, 0.6, 4, batch=1)["speedup"]
    large = predict_speculation(cost, machine, 0.6, 4, batch=1000)["speedup"]
    assert small > 1 > large


def test_the_best_number_of_drafts():
    def speedup(drafts: int) -> float:
        return speculation_speedup(0.7, drafts, decode_seconds=1.0, verify_seconds=1.0 + 0.1 * drafts)

    best = best_drafts(speedup)
    assert 0 < best < 16
    assert speedup(best) == max(speedup(n) for n in range(1, 17))
    assert best_drafts(lambda drafts: 0.9) == 0


# --- trees ---------------------------------------------------------------------------------------


def test_a_chain_is_a_tree_of_one_child_each():
    for chances in ([0.9, 0.6, 0.7, 0.2], [0.0] * 4, [1.0] * 4):
        rows = [[chance] for chance in chances]
        for replacement in (False, True):
            found = expected_tree_tokens(rows, CHAIN, replacement=replacement)
            assert found == pytest.approx(expected_tokens(chances, 4))
    assert expected_tree_tokens([[0.7]], CHAIN) == pytest.approx(expected_tokens(0.7, 4))
    assert expected_tree_tokens([], []) == 1


def test_a_tree_by_hand():
    rows = [[0.6, 0.2], [0.5, 0.3], [0.9]]
    assert expected_tree_tokens(rows, TREE) == pytest.approx(1 + 0.6 + 0.2 + 0.6 * (0.5 + 0.3 + 0.5 * 0.9))
    second = {"first": 0.4 * 0.2, "below": 0.5 * 0.3}  # tried after the first was refused
    found = expected_tree_tokens(rows, TREE, replacement=True)
    assert found == pytest.approx(1 + 0.6 + second["first"] + 0.6 * (0.5 + second["below"] + 0.5 * 0.9))


def draw_walks(target, draft, replacement, cycles=40_000):
    """Tokens of cycles that draw both the model's tokens and the drafts, and follow them down the tree."""
    random_ = random.Random(0)
    tokens, total = range(len(target)), 0
    best = sorted(tokens, key=lambda token: -draft[token])
    for _ in range(cycles):
        node, accepted = -1, 0
        while True:
            siblings = [child for child, parent in enumerate(TREE) if parent == node]
            wanted = random_.choices(tokens, target)[0]
            drawn = random_.choices(tokens, draft, k=len(siblings)) if replacement else best
            hit = next((c for c, token in zip(siblings, drawn, strict=False) if token == wanted), None)
            if hit is None:
                break
            node, accepted = hit, accepted + 1
        total += accepted + 1
    return total / cycles


@pytest.mark.parametrize("replacement", [False, True])
def test_trees_against_drawing(replacement):
    target, draft = [0.5, 0.3, 0.15, 0.05], [0.4, 0.3, 0.2, 0.1]
    if replacement:  # a try hits by chance; the second one counts where the first missed
        first = sum(p * q for p, q in zip(target, draft, strict=True))
        second = sum(p * q * (1 - q) for p, q in zip(target, draft, strict=True)) / (1 - first)
        ranks = [first, second]
    else:  # the drafter's two most likely tokens
        ranks = [0.5, 0.3]
    expected = expected_tree_tokens([ranks], TREE, replacement=replacement)
    assert draw_walks(target, draft, replacement) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(
    ("acceptance", "parents", "replacement"),
    [
        ([[0.7, 0.6]], [-1], False),  # siblings exclude each other
        ([[1.2]], [-1], True),
        ([[-0.1]], [-1], False),
        ([[0.5]], [-1, -1], False),  # no number for the second child
        ([], [-1], False),
        ([[0.5]], [0], False),  # its own parent
        ([[0.5]], [-2], False),
    ],
)
def test_what_is_no_tree_is_refused(acceptance, parents, replacement):
    with pytest.raises(InputError, match=r"acceptance|parent"):
        expected_tree_tokens(acceptance, parents, replacement=replacement)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=4), st.data())
def test_more_drafts_never_yield_fewer_tokens(ranks, data):
    size = data.draw(st.integers(0, 12))
    parents = [data.draw(st.integers(-1, index - 1)) for index in range(size)]
    widest = max([parents.count(p) for p in parents], default=0)
    row = (ranks * widest)[:widest] or [0.5]
    yields = [
        expected_tree_tokens([row], parents[:n], replacement=True) for n in range(size + 1)
    ]  # any prefix of a tree is a tree
    assert yields == sorted(yields)
    assert yields[-1] <= size + 1 + 1e-9


# --- price ---------------------------------------------------------------------------------------


def test_a_tree_is_verified_in_one_step_of_all_its_tokens(machine):
    price = predict_speculation(STEP, machine, [[0.6, 0.2], [0.5, 0.3], [0.9]], TREE)
    assert price["verify_seconds"] == predict(STEP, machine, tokens=len(TREE) + 1).seconds
    assert price["tokens_per_cycle"] == pytest.approx(1 + 0.8 + 0.6 * 1.25)


def test_a_draft_program_takes_a_step_for_each_token(machine):
    draft = Cost(read={"weights": 10**7, "cache": 1000 * B * (C + T)}, launches=2)
    moved = 3 * 10**7 + 2 * 1000 * (101 + 102 + 103)
    found = drafting_seconds(draft, machine, 3, batch=2, context=100)
    assert found == pytest.approx(moved / 1e11 + 3 * 2e-6)
    assert drafting_seconds(draft, machine, 0) == 0
    slower = predict_speculation(STEP, machine, 0.8, 3, draft_seconds=found)
    assert slower["cycle_seconds"] == pytest.approx(slower["verify_seconds"] + found)


def test_where_nothing_is_found_the_step_is_a_plain_one(machine):
    never = predict_speculation(STEP, machine, 0.8, 4, hit_rate=0.0)
    assert never["speedup"] == pytest.approx(1)
    assert never["tokens_per_cycle"] == 1
    half = predict_speculation(STEP, machine, 0.8, 4, hit_rate=0.5)
    gained = 0.5 * (expected_tokens(0.8, 4) - 1)
    assert half["tokens_per_cycle"] == pytest.approx(1 + gained)
    assert half["cycle_seconds"] == pytest.approx((half["decode_seconds"] + half["verify_seconds"]) / 2)


def test_a_batch_verifies_the_padded_step_of_its_longest_draft(machine):
    """Three of four steps hold a draft if each of two rows drafts half the time."""
    two = predict_speculation(STEP, machine, 0.8, 4, batch=2, hit_rate=0.5)
    mixed = 0.25 * two["decode_seconds"] + 0.75 * two["verify_seconds"]
    assert two["cycle_seconds"] == pytest.approx(mixed)
    # Each row accepts its own number: the mean is that of a single row.
    assert (
        two["tokens_per_cycle"]
        == predict_speculation(STEP, machine, 0.8, 4, hit_rate=0.5)["tokens_per_cycle"]
    )
    assert two["tokens_per_second"] == pytest.approx(2 / two["seconds_per_token"])


@pytest.mark.parametrize("hit_rate", [-0.1, 1.1])
def test_a_hit_rate_is_a_share(machine, hit_rate):
    with pytest.raises(InputError, match="hit_rate"):
        predict_speculation(STEP, machine, 0.8, 4, hit_rate=hit_rate)


# --- load ----------------------------------------------------------------------------------------


def test_goodput_is_the_accepted_tokens_of_the_batch(machine):
    rates = goodput(STEP, machine, 0.7, range(5), batch=3)
    assert rates[0] == pytest.approx(3 / predict(STEP, machine, batch=3).seconds)
    step = predict(STEP, machine, batch=3, tokens=3).seconds
    assert rates[2] == pytest.approx(3 * (1 + 0.7 + 0.49) / step)


def test_a_higher_load_wants_shorter_drafts(machine):
    lengths = [best_length(STEP, machine, 0.7, batch=batch) for batch in (1, 20, 60, 200)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1] == 0
    rates = goodput(STEP, machine, 0.7, range(17), batch=20)
    assert rates[lengths[1]] == max(rates.values())


def test_what_drafting_costs_shortens_the_drafts(machine):
    free = best_length(STEP, machine, 0.7)
    paid = best_length(STEP, machine, 0.7, draft_seconds=lambda drafts: drafts * 1e-4)
    assert paid < free
    assert best_length(STEP, machine, [0.9, 0.9]) == 2  # as far as there are probabilities
    assert best_length(STEP, machine, 0.0) == 0


def test_speculation_stops_paying_at_a_batch(machine):
    """Reading takes 1 ms, launches 10 us, and a token's arithmetic 10 us."""
    edge = speculation_range(STEP, machine, 0.5, 3, "batch")
    assert edge.starts == 1
    for batch, pays in ((edge.stops - 1, True), (edge.stops, False), (1000, False)):
        assert (predict_speculation(STEP, machine, 0.5, 3, batch=batch)["speedup"] > 1) is pays
    # 1.875 tokens in 4 * 10 us * B + 10 us take as long as plain ones in 1.01 ms each at B = 47.1.
    assert edge.stops == 48


def test_speculation_may_always_or_never_pay(machine):
    reads_only = Cost(read={"weights": 10**8})
    assert speculation_range(reads_only, machine, 0.5, 3, "batch").always
    assert speculation_range(reads_only, machine, 0.0, 3, "batch").never
    assert speculation_range(STEP, machine, 0.0, 3, "context", limit=100).never


def test_speculation_may_start_paying_at_a_context(machine):
    """A large batch is bound by arithmetic until it reads a long cache."""
    cost = Cost({"bfloat16": 10**8 * B * T}, {"weights": 10**8, "cache": 10**4 * B * C})
    edge = speculation_range(cost, machine, 0.5, 3, "context", batch=100)
    assert edge.starts > 1
    assert edge.stops is None
    assert predict_speculation(cost, machine, 0.5, 3, batch=100, context=edge.starts)["speedup"] > 1
    assert predict_speculation(cost, machine, 0.5, 3, batch=100, context=edge.starts - 1)["speedup"] <= 1


def test_the_pass_refuses_what_is_never_accepted(sketch):
    cached_step(sketch)
    workload, target = Workload(prompt=100), resolve_target("h100")
    for acceptance, status in ((0.0, "unprofitable"), (0.9, "applied")):
        graph = sketch.graph.copy()
        chosen = parse_pass(f"speculate{{drafter=ngram,acceptance={acceptance}}}")
        (record,) = chosen(graph, workload, target)
        assert record.status == status
        assert ("speculation" in graph.annotations) is (status == "applied")


def cached_step(sketch):
    """A projection into keys that a store keeps, attention over it, and a projection to the vocabulary."""
    lengths, counts = (sketch.input(n, "B", dtype=torch.int64) for n in ("lengths", "counts"))
    positions = sketch.input("positions", "B", "T", dtype=torch.int64)
    tree = sketch.input("tree", "B", 0, dtype=torch.int64)
    weights = [sketch.weight(name, rows, 64) for name, rows in (("k", 64), ("head", 1000))]
    table, keys = sketch.weight("table", 1000, 64), sketch.state("keys", 1, 48, 64)
    rows = sketch.emit(torch.ops.aten.embedding.default, table, sketch.ids)
    new = sketch.emit(torch.ops.aten.unsqueeze.default, sketch.emit("linear", rows, weights[0]), 1)
    sketch.emit("cache_append", keys, new, lengths, counts)
    seen = sketch.emit("cache_attention", new, keys, keys, positions, lengths, counts, tree, 0.25)
    flat = sketch.emit(torch.ops.aten.squeeze.dim, seen, 2)
    sketch.done(sketch.emit("linear", flat, weights[1]))
