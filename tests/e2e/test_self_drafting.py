"""Drafting with the program itself, layers left out: the text stays the same, and so does the cache."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from graphwright.ir.errors import InputError
from graphwright.runtime.lowering.blocks import lowered_blocks
from graphwright.runtime.lowering.split import split_layers
from graphwright.runtime.residual import ResidualStream
from graphwright.runtime.speculation import Draft, Generation, Outcome, make_drafter
from graphwright.runtime.speculation.growing import Ask, Growing
from graphwright.runtime.speculation.program_drafter import ProgramDrafter
from graphwright.runtime.speculation.skipping import tried
from graphwright.runtime.speculation.successors import Ranked
from graphwright.runtime.storage import State
from tests.architectures import VOCAB
from tests.e2e.graph_stand_in import PLAIN, as_model, with_graphs
from tests.e2e.packed_programs import random_text
from tests.e2e.self_drafting import (
    DRAFTERS,
    KINDS,
    LAYERS,
    RAGGED,
    TREES,
    Make,
    domains_file,
    generate,
    lab_of,
    program_maker,
    program_of,
    speculate,
)


@pytest.fixture(scope="module")
def make() -> Make:
    """``make(model, cache)``: a tiny model with that cache, op by op."""
    return program_maker()


# --- the text -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "cache"), KINDS)
@pytest.mark.parametrize(("lengths", "tree"), [([20], "chain"), (RAGGED, "fixed(widths=2+2+1)")])
def test_drafts_change_no_token(
    name: str, cache: str, lengths: list[int], tree: str, make: Make, tmp_path: Path
) -> None:
    model = make(name, cache)
    wanted = generate(model, lengths)
    path = domains_file(program_of(model), tmp_path)
    for drafter in DRAFTERS:
        model.speculation = speculate(drafter.replace("knn_ssd", f"knn_ssd(path={path})"), tree)
        assert torch.equal(generate(model, lengths), wanted), drafter
        # Random layers are no exits: that one may find that no draft pays.
        assert model.stats()["last"]["draft_tokens"] or drafter == "del", drafter


@pytest.mark.parametrize("drafter", ["skip(count=1)", "clasp(every=2)"])
def test_chains_of_ragged_rows_change_no_token(drafter: str, make: Make) -> None:
    model = make("llama", "dense")
    wanted = generate(model, RAGGED)
    model.speculation = speculate(drafter)
    assert torch.equal(generate(model, RAGGED), wanted)
    assert model.stats()["last"]["accepted"] > 0


@pytest.mark.parametrize("cache", ["dense", "packed", "evicted"])
def test_nothing_left_out_is_always_right(cache: str, make: Make) -> None:
    model = make("llama", cache)
    model.speculation = speculate("skip(count=0)")
    generate(model, [20, 9])
    last = model.stats()["last"]
    assert last["draft_tokens"] > 10
    assert last["accepted"] == last["draft_tokens"]


def test_sampling_keeps_the_distribution(make: Make) -> None:
    model, rows = make("llama"), 1200
    prompt = random_text(1, 6, seed=9)
    program = program_of(model)
    state = program.allocate(1, 16)
    first = torch.softmax(program.prefill(state, prompt, torch.tensor([6])).float() / 1.5, -1)[0]
    followed = torch.cat((prompt.expand(VOCAB, -1), torch.arange(VOCAB)[:, None]), 1)
    state = program.allocate(VOCAB, 16)
    second = torch.softmax(program.prefill(state, followed, torch.full((VOCAB,), 7)).float() / 1.5, -1)
    expected = rows * (first @ second)

    model.speculation = speculate("skip(layers=2)", "fixed(widths=2+1)")
    torch.manual_seed(0)
    out = model.generate(
        prompt.expand(rows, -1), max_new_tokens=4, do_sample=True, temperature=1.5, top_k=0,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert model.stats()["last"]["accepted"] > 0
    counts = torch.bincount(out[:, 7], minlength=VOCAB).float()
    common = expected >= 5
    # The rare ones are one class, which is not empty: expected is 1 more there on both sides.
    binned = [torch.cat((x[common], x[~common].sum()[None] + 1)) for x in (counts, expected)]
    chi2 = float(((binned[0] - binned[1]) ** 2 / binned[1]).sum())
    freedom = len(binned[0]) - 1
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5


# --- the cache ------------------------------------------------------------------------------------


def committed(state: State) -> dict[str, torch.Tensor]:
    """Everything that belongs to committed tokens."""
    found = {"lengths": state.lengths.clone()}
    tails = {layout.roles["tail"]: layout for layout in state.packed}
    held: dict[str, list[int]] = {}
    windows = dict(state.windows)
    for layout in () if state.eviction is None else state.eviction.layouts:
        held |= dict.fromkeys((layout.keys, layout.values), state.stores[layout.held].tolist())
        windows[str(layout.ring)] = layout.kept.window
    for name, store in state.stores.items():
        if name not in {*windows, *held}:
            found[name] = store.clone()
            continue
        for row, length in enumerate(state.known):
            window = windows.get(name, 0)
            start = max(0, length - window) if window else 0
            if name in tails:
                start = int(state.stores[tails[name].roles["packed"]][row])
            if name in held:
                start, length = 0, held[name][row]
            found[f"{name}, row {row}"] = store[row][:, torch.arange(start, length) % store.shape[2]].clone()
    return found


@pytest.mark.parametrize("cache", ["dense", "packed", "evicted"])
@pytest.mark.parametrize("drafter", ["skip(layers=1+3)", "clasp"])
@pytest.mark.parametrize("tree", TREES)
def test_a_draft_leaves_the_cache_as_it_was(drafter: str, tree: str, cache: str, make: Make) -> None:
    program = program_of(make("gemma2" if cache != "evicted" else "llama", cache))
    prompts = random_text(2, 21).tolist()
    prompts[1] = prompts[1][:17]
    state = program.allocate(2, 64)
    tokens = torch.tensor([row + [0] * (21 - len(row)) for row in prompts])
    program.prefill(state, tokens, torch.tensor([21, 17]))
    before, known, room = committed(state), list(state.known), state.room()

    speculation = speculate(drafter, tree)
    speculation.drafter.begin(Generation(prompts, program, state, capacity=64))
    speculation.rule.begin(2)
    for row in range(2):
        speculation.drafter.observe(row, Outcome([5 + row]))
    drafts = speculation.propose([0, 1], [4, 5])

    assert [len(draft.tokens) > 1 for draft in drafts] == [True, True]
    assert (state.known, state.room()) == (known, room)
    after = committed(state)
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize(("name", "cache"), [kind for kind in KINDS if kind[1] not in ("shared", "selected")])
def test_tokens_ahead_are_read_as_if_committed(name: str, cache: str, make: Make) -> None:
    program = program_of(make(name, cache))
    ids = random_text(2, 30)
    prompt, more = ids[:, :20], ids[:, 20:26]
    state = program.allocate(2, 64)
    program.prefill(state, prompt, torch.tensor([20, 20]))
    wanted = program.step(state, more, torch.tensor([6, 4]))
    found = []
    for column in range(6):
        counts = [1, int(column < 4)]
        found.append(program.step(state, more[:, column : column + 1], torch.tensor(counts)))
        state.advance(counts)
    assert state.known == [26, 24]
    state.retreat()
    assert (state.known, state.lengths.tolist()) == ([20, 20], [20, 20])
    got, tolerance = torch.cat(found, 1), 1e-4 if wanted.dtype == torch.float32 else 0.1
    assert torch.allclose(got[0], wanted[0], atol=tolerance)
    assert torch.allclose(got[1, :4], wanted[1, :4], atol=tolerance)


# --- layers of a step -----------------------------------------------------------------------------


def test_a_step_without_layers_is_the_model_without_them(make: Make) -> None:
    model = make("llama")
    program, ids = program_of(model), random_text(2, 12)
    shorter = copy.deepcopy(lab_of(model).model)
    shorter.model.layers = torch.nn.ModuleList(
        layer for index, layer in enumerate(shorter.model.layers) if index not in (1, 3)
    )
    counts = torch.tensor([12, 12])
    got = program.step(program.allocate(2, 16), ids, counts, skip=frozenset({1, 3}))
    with torch.no_grad():
        wanted = shorter(input_ids=ids, use_cache=False).logits
    assert torch.allclose(got, wanted, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_residual_stream_is_that_of_the_model(name: str, make: Make) -> None:
    model = make(name)
    program, ids = program_of(model), random_text(2, 12)
    stream = ResidualStream()
    logits = program.step(program.allocate(2, 16), ids, torch.tensor([12, 12]), visit=stream)
    with torch.no_grad():
        stock = lab_of(model).model(input_ids=ids, output_hidden_states=True)
    assert len(stream.kept) == LAYERS + 1
    for mine, theirs in zip(stream.kept[:-1], stock.hidden_states[:-1], strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4)
    assert torch.allclose(program.read_out(stream.kept[-1]), logits, atol=1e-5)


def test_layers_that_predict_the_next_ones_cache_stay(make: Make) -> None:
    passes = [*PLAIN, "predict_cache{map=linear}", "quantize_cache{codec=int,bits=8,page=16}"]
    program = program_of(lab_of(make("llama")).program(passes))
    tokens, counts = torch.tensor([[5]]), torch.tensor([1])
    assert 0 in program.lowered.blocks.obstacles
    with pytest.raises(InputError, match="layer 0 cannot be left out: "):
        program.step(program.allocate(1, 16), tokens, counts, skip=frozenset({0}))


def test_layers_that_are_read_by_others_stay(make: Make) -> None:
    graph, _ = lab_of(make("llama")).rewrite(PLAIN)
    pieces = split_layers(graph)
    slots = {node: place for place, node in enumerate(graph.nodes)}
    assert list(lowered_blocks(graph, pieces, slots).found) == [0, 1, 2, 3]
    inside = next(node for node in reversed(pieces[2].inputs) if node.meta.get("kind") == "state")
    pieces[5] = replace(pieces[5], inputs=[*pieces[5].inputs, inside])
    pieces[3] = replace(pieces[3], outputs=[*pieces[3].outputs, pieces[0].outputs[0]])
    blocks = lowered_blocks(graph, pieces, slots)
    assert list(blocks.found) == [0, 3]
    assert "read what it stores" in blocks.obstacles[1]
    assert "read what it computes besides" in blocks.obstacles[2]


def test_drafts_run_beside_recorded_steps(make: Make) -> None:
    model = make("llama")
    wanted = generate(model, [20, 9])
    program, backend = with_graphs(program_of(model))
    recorded = as_model(program, lab_of(model).model, speculate("skip(layers=2)"))
    for _ in range(2):
        assert torch.equal(generate(recorded, [20, 9]), wanted)
    assert backend.replays > 0
    replays, state = backend.replays, program.allocate(1, 16)
    for _ in range(3):
        program.step(state, torch.tensor([[5]]), torch.tensor([1]), skip=frozenset({2}))
        program.step(state, torch.tensor([[5]]), torch.tensor([1]), visit=ResidualStream())
    assert backend.replays == replays


# --- looking --------------------------------------------------------------------------------------


class Listed(Ranked):
    """One token, for growing a tree by hand."""

    def __init__(self, token: int) -> None:
        super().__init__([token], [1.0])


def test_answers_do_not_depend_on_the_order_in_which_a_tree_asks(make: Make) -> None:
    program, skip = program_of(make("llama")), frozenset({2})
    prompts = random_text(2, 9).tolist()
    state = program.allocate(2, 40)
    program.prefill(state, torch.tensor(prompts), torch.tensor([9, 9]))
    drafter = make_drafter("skip", layers="2")
    assert isinstance(drafter, ProgramDrafter)
    drafter.begin(Generation(prompts, program, state, capacity=40, sample=True))
    for row in range(2):
        drafter.observe(row, Outcome([11 + row]))

    def answer(grown: list[Growing], asked: list[tuple[int, int]]) -> None:
        laws = [one.law for one in drafter.look([Ask(row, grown[row], node) for row, node in asked])]
        for law, (row, node) in zip(laws, asked, strict=True):
            tokens = [[11 + row, *grown[row].path(node)]]
            alone = program.allocate(1, 40)
            program.prefill(alone, torch.tensor([prompts[row]]), torch.tensor([9]))
            logits = program.step(alone, torch.tensor(tokens), torch.tensor([len(tokens[0])]), skip=skip)
            assert law is not None
            assert torch.allclose(law, torch.softmax(logits[0, -1].float(), -1), atol=1e-5), (row, node)

    grown = [Growing(), Growing()]
    answer(grown, [(0, 0), (1, 0)])
    for row in range(2):
        grown[row].add(0, Listed(3))
    answer(grown, [(0, 1), (1, 1)])  # a chain goes on
    grown[0].add(1, Listed(4))
    grown[1].add(0, Listed(5))  # a branch beside what was read already
    answer(grown, [(0, 2), (1, 2)])
    grown[1].add(2, Listed(6))
    answer(grown, [(1, 3), (1, 1)])
    answer(grown, [(0, 0)])  # asked about again
    drafter.settle()
    assert state.known == [9, 9]


def test_what_was_tried_ends_with_the_first_rejected_token() -> None:
    chain = Draft([1, 2, 3])
    assert tried(Outcome([9], chain, [])) == (0, 1)
    assert tried(Outcome([1, 9], chain, [0])) == (1, 2)
    assert tried(Outcome([1, 2, 3, 9], chain, [0, 1, 2])) == (3, 3)
    assert tried(Outcome([9])) == (0, 0)
