"""Trees: the same greedy output with each of them, and the shapes that they promise."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaConfig

from graphwright.cost_model.speculation import expected_tree_tokens
from graphwright.cost_model.tree_choice import best_tree_size, best_trees
from graphwright.ir.errors import InputError
from graphwright.runtime.model import OptimizedModel
from graphwright.runtime.speculation import FixedLength, Generation, describe_trees
from graphwright.runtime.speculation.growing import Growing, grow
from graphwright.runtime.speculation.tree import check_tree
from graphwright.runtime.speculation.trees.tree import TREES
from tests.e2e.fake_program import VOCAB, ReferenceProgram, TableProgram, tiny_model
from tests.e2e.table_drafter import TableDrafter, speculation
from tests.e2e.test_generate import RAGGED, Recorder, StopAt, padded, repetitive
from tests.e2e.test_speculation_exact import chi_square_p

ALL = sorted(TREES.classes())
ROWS = RAGGED + [repetitive(n, seed) for n, seed in ((5, 5), (9, 6), (2, 7), (14, 8))]


def tables(seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """A target's logits ``[V, V]``, and a drafter's law that often agrees with it."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(VOCAB, VOCAB, generator=generator)
    noise = 2 * torch.randn(VOCAB, VOCAB, generator=generator)
    return logits, torch.softmax(logits + noise, -1)


LOGITS, LAW = tables()
CONFIG = LlamaConfig(vocab_size=VOCAB, bos_token_id=1, eos_token_id=None, pad_token_id=0)


def model(tree: str | None, **options: Any) -> OptimizedModel:
    """The Markov chain, with a drafter and a tree or without."""
    chosen = None
    if tree is not None:
        chosen = speculation(TableDrafter(LAW), tree, rule=FixedLength(7))
    return OptimizedModel(
        TableProgram(LOGITS),
        config=CONFIG,
        generation_config=GenerationConfig(),
        speculation=chosen,
        **options,
    )


def continued(row: list[int], new: int) -> list[int]:
    """What the chain follows ``row`` with."""
    text = list(row)
    for _ in range(new):
        text.append(int(LOGITS[text[-1]].argmax()))
    return text[len(row) :]


@pytest.mark.parametrize("tree", ALL)
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS], ids=["one", "ragged"])
def test_greedy_output_is_the_same(tree: str, rows: list[list[int]]) -> None:
    inputs = padded(rows, "left")
    fast = model(tree)
    out = fast.generate(**inputs, max_new_tokens=40)[:, inputs["input_ids"].shape[1] :]
    assert out.tolist() == [continued(row, 40) for row in rows]
    stats = fast.stats()["last"]
    assert stats["accepted"] > 0 and stats["cycles"] < 39
    assert stats["draft_tokens"] > stats["accepted"], "every guess was right: nothing was refused"


@pytest.mark.parametrize("tree", ALL)
def test_masks_and_caches_are_those_of_the_tree(tree: str) -> None:
    llama = tiny_model("llama")
    inputs = padded(ROWS[:3], "left")
    want = llama.generate(**inputs, max_new_tokens=12)
    law = torch.full((VOCAB, VOCAB), 0.01)
    for row in want.tolist():  # what follows what in the text itself, beside other candidates
        for token, following in itertools.pairwise(row):
            law[token, following] += 1
    chosen = speculation(TableDrafter(law / law.sum(-1, keepdim=True)), tree, rule=FixedLength(6))
    fast = OptimizedModel(
        ReferenceProgram(llama), config=llama.config, generation_config=llama.generation_config,
        speculation=chosen,
    )  # fmt: skip
    assert torch.equal(fast.generate(**inputs, max_new_tokens=12), want)
    assert fast.stats()["last"]["accepted"] > 5


@pytest.mark.parametrize("tree", ALL)
def test_rows_end_inside_an_accepted_run(tree: str) -> None:
    inputs = padded(ROWS, "left")
    answers = [continued(row, 30) for row in ROWS]
    plain = model(None)
    for place in range(4, 8):
        options: dict[str, Any] = {"eos_token_id": [row[place] for row in answers[:3]], "pad_token_id": 0}
        theirs, mine, stream = StopAt({answers[4][place]}), StopAt({answers[4][place]}), Recorder()
        want = plain.generate(**inputs, max_new_tokens=25, stopping_criteria=[theirs], **options)
        got = model(tree).generate(
            **inputs, max_new_tokens=25, stopping_criteria=[mine], streamer=stream, **options
        )
        assert torch.equal(got, want)
        assert len(mine.seen) == len(theirs.seen) == len(stream.put_values) - 1


@pytest.mark.parametrize("tree", ALL)
@pytest.mark.parametrize("new", [1, 2, 3, 7])
def test_the_cache_may_fill_up(tree: str, new: int) -> None:
    row = ROWS[0]
    out = model(tree, capacity=len(row) + new).generate(torch.tensor([row]), max_new_tokens=new)
    assert out[0, len(row) :].tolist() == continued(row, new)


# --- what trees take ------------------------------------------------------------------------------


def grown(
    tree: str, law: torch.Tensor, budget: int, *, floor: float = 0.0, sample: bool = False, most: int = 4
) -> tuple[Growing, TableDrafter]:
    """One draft below token 0, and who answered."""
    drafter = TableDrafter(law, most)
    drafter.begin(Generation([[0]], sample=sample))
    return grow(TREES.parse(tree), drafter, [0], [budget], [floor])[0], drafter


def small_law(seed: int, size: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(2 * torch.randn(size, size, generator=generator), -1)


@pytest.mark.parametrize("tree", ALL)
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.integers(1, 20), st.sampled_from([0.0, 0.05, 0.4]), st.booleans())
def test_trees_keep_to_budget_and_floor(
    tree: str, seed: int, budget: int, floor: float, sample: bool
) -> None:
    growing, _ = grown(tree, small_law(seed), budget, floor=floor, sample=sample)
    assert len(growing) <= budget
    check_tree(growing.tokens, growing.parents)
    draft = growing.draft()
    for node, below in enumerate(draft.successors):
        assert (draft.law(node) is not None) is bool(sample and below)
        if below and node:  # nothing is asked below a token that is not worth it
            assert growing.chance(node) >= floor
    if not sample:
        assert all(chance >= floor for chance in growing.chances)


@pytest.mark.parametrize("tree", ALL)
def test_without_candidates_there_is_no_draft(tree: str) -> None:
    growing, _ = grown(tree, small_law(1), 8, most=0)
    assert len(growing) == 0 and growing.draft().tokens == ()


def test_fixed_has_its_widths() -> None:
    growing, drafter = grown("fixed(widths=3+2+1)", small_law(2), 62)
    assert [growing.depths.count(depth) for depth in (1, 2, 3)] == [3, 6, 6]
    assert drafter.rounds == 3
    assert len(grown("fixed(widths=3+2+1)", small_law(2), 8)[0]) == 8
    assert (
        grown("fixed(widths=1+1+1)", small_law(2), 62)[0].tokens == grown("chain", small_law(2), 3)[0].tokens
    )


def likeliest_tokens(law: torch.Tensor, count: int, most: int = 4) -> list[float]:
    """The largest chances of all tokens of all trees, by looking at every path of up to 6 tokens."""
    chances, paths = [], [(1.0, 0)]
    for _ in range(6):
        paths = [
            (chance * float(law[token, child]), child)
            for chance, token in paths
            for child in law[token].topk(most).indices.tolist()
        ]
        chances += [chance for chance, _ in paths]
    return sorted(chances, reverse=True)[:count]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99), st.integers(1, 6))
def test_greedy_takes_the_likeliest_tokens(seed: int, budget: int) -> None:
    law = small_law(seed)
    growing, _ = grown("greedy(hope=1)", law, budget)
    assert sorted(growing.chances, reverse=True) == pytest.approx(likeliest_tokens(law, budget))


def test_less_hope_takes_fewer_rounds_and_little_less() -> None:
    _, law = tables()
    sure, rounds = grown("greedy(hope=1)", law, 24)
    soon, fewer = grown("greedy", law, 24)
    once, one = grown("greedy(hope=0)", law, 4)
    assert fewer.rounds < rounds.rounds and one.rounds == 1 and set(once.depths) == {1}
    assert 0.95 * sum(sure.chances) < sum(soon.chances) <= sum(sure.chances) + 1e-9


def test_beam_keeps_the_best_paths_of_a_level() -> None:
    law = small_law(3)
    growing, drafter = grown("beam(width=2, depth=3)", law, 62)
    assert [growing.depths.count(depth) for depth in (1, 2, 3, 4)] == [2, 2, 2, 0] and drafter.rounds == 3
    first = law[0].topk(2)
    second = (first.values[:, None] * law[first.indices]).flatten().topk(2).values
    assert growing.chances[:4] == pytest.approx([*first.values.tolist(), *second.tolist()])


def test_a_stochastic_beam_samples_paths_without_replacement() -> None:
    law = torch.tensor([[0.7, 0.3], [0.4, 0.6]])
    paths = list(itertools.product((0, 1), repeat=2))
    chance = {path: float(law[0, path[0]] * law[path[0], path[1]]) for path in paths}
    pairs = list(itertools.permutations(paths, 2))
    want = torch.tensor([chance[a] * chance[b] / (1 - chance[a]) for a, b in pairs])
    torch.manual_seed(2)
    counts = torch.zeros(len(pairs))
    for _ in range(1500):
        growing, _ = grown("beam(width=2, depth=2)", law, 62, sample=True)
        last = [tuple(growing.path(node + 1)) for node, depth in enumerate(growing.depths) if depth == 2]
        counts[pairs.index((last[0], last[1]))] += 1
    assert chi_square_p(counts, want) > 1e-3
    # Drawing below each token by itself gives another law: the second path would often have its own parent.
    apart = torch.tensor([float(a[0] != b[0]) for a, b in pairs]) * want
    assert 0.1 < float(apart.sum()) < 0.9


# --- the best shape -------------------------------------------------------------------------------


def shapes(tokens: int, width: int, depth: int) -> Iterator[tuple[int, ...]]:
    """Every tree of so many tokens, of bounded width and depth, by adding tokens one by one."""

    def more(parents: tuple[int, ...], levels: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if len(parents) == tokens:
            yield parents
            return
        for parent in range(parents[-1] if parents else -1, len(parents)):  # breadth first: parents rise
            level = levels[parent + 1] + 1
            if level <= depth and parents.count(parent) < width:
                yield from more((*parents, parent), (*levels, level))

    yield from more((), (0,))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(1, 4), st.integers(0, 4))
def test_the_best_shape_is_the_best_of_all(weights: list[int], depth: int, rest: int) -> None:
    total = sum(weights) + rest or 1
    acceptance = tuple(weight / total for weight in weights)
    table = best_trees(acceptance, 5, depth)
    for tokens in range(1, 6):
        values = [expected_tree_tokens([acceptance], shape) for shape in shapes(tokens, len(weights), depth)]
        assert bool(values) is (tokens < len(table.value))
        if values:
            assert table.value[tokens] == pytest.approx(max(values))
            parents = table.parents[tokens]
            assert expected_tree_tokens([acceptance], parents) == pytest.approx(max(values))
            assert list(parents) == sorted(parents)


def test_the_best_size_weighs_yield_against_cost() -> None:
    table = best_trees((0.6, 0.2), 30, 8)
    assert best_tree_size(table, lambda tokens: 1.0, 30) == 30
    assert best_tree_size(table, lambda tokens: float(tokens), 30) == 0

    def cost(tokens: int) -> float:
        return 1 + 0.15 * (tokens - 1)

    best = best_tree_size(table, cost, 30)
    assert 0 < best < 30
    assert table.value[best] / cost(1 + best) == max(table.value[n] / cost(1 + n) for n in range(31))


def test_sequoia_draws_its_shape() -> None:
    growing, drafter = grown("sequoia(acceptance=0.6+0.3, depth=4)", small_law(4), 7)
    assert growing.parents == list(best_trees((0.6, 0.3), 62, 4).parents[7])
    assert drafter.rounds == max(growing.depths)
    assert len(grown("sequoia(tokens=3)", small_law(4), 7)[0]) == 3
    assert len(grown("sequoia(costs=1:1+8:8)", small_law(4), 7)[0]) == 0
    assert len(grown("sequoia(costs=1:1+8:1)", small_law(4), 62)[0]) == 7


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("fixed(widths=3+0)", "list of counts"),
        ("fixed(widths=a)", "list of counts"),
        ("sequoia(acceptance=0.9+0.2)", "at most 1"),
        ("sequoia(acceptance=x)", "probabilities"),
        ("sequoia(depth=0)", "do not fit"),
        ("sequoia(costs=2:1+4:2)", "what steps cost"),
        ("greedy(hope=1.5)", "share"),
        ("beam(width=0)", "do not fit"),
    ],
)
def test_bad_options_are_refused(text: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        TREES.parse(text)


def test_shapes_that_are_none_are_refused() -> None:
    for acceptance, most, depth in (((), 3, 3), ((0.7, 0.7), 3, 3), ((0.5,), 0, 3), ((0.5,), 3, 0)):
        with pytest.raises(InputError):
            best_trees(acceptance, most, depth)


def test_every_tree_says_what_it_is() -> None:
    assert set(ALL) == set(describe_trees()) >= {"chain", "fixed", "sequoia", "greedy", "beam"}
    assert all(describe_trees().values())
