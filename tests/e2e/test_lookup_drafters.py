"""Drafters that learn or mix, and what all drafters without a model draft against plain decoding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaConfig

from graphwright.ir.errors import InputError
from graphwright.runtime.model import OptimizedModel
from graphwright.runtime.speculation import (
    Chain,
    Draft,
    Drafter,
    FixedLength,
    Generation,
    Outcome,
    PathDrafter,
    Speculation,
    Tree,
    make_drafter,
)
from graphwright.runtime.speculation.calibration import MOST_TRIALS, Tally
from graphwright.runtime.speculation.drafters.lookahead import LookaheadDrafter
from graphwright.runtime.speculation.drafters.mix import MixDrafter, taken
from graphwright.runtime.speculation.drafters.recycling import RecyclingDrafter
from graphwright.runtime.speculation.drafters.suffix import SuffixDrafter
from graphwright.runtime.speculation.drafters.trigrams import TrigramDrafter
from graphwright.runtime.speculation.growing import Ask, Growing
from graphwright.runtime.speculation.successors import Ranked, Successors
from graphwright.runtime.speculation.trees.fixed import Fixed
from tests.e2e.fake_program import VOCAB, ReferenceProgram, TableProgram
from tests.e2e.lookups import FEW, answers

# --- recycling and trigrams ----------------------------------------------------------------------


@FEW
@given(st.integers(0, 999), st.integers(1, 2), st.integers(1, 3))
def test_the_matrix_holds_what_was_last_likely(seed: int, order: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    guesser = RecyclingDrafter(k=k, order=order)
    text = [0, 1]
    want: dict[tuple[int, ...], torch.Tensor] = {}  # by the last tokens, the logits seen there last
    guesser.begin(Generation([text]))
    for _ in range(6):
        logits = torch.randn(3, 5, generator=generator)
        first, second = torch.randint(5, (2,), generator=generator).tolist()
        other = (first + 1) % 5
        guesser.observe(0, Outcome([first, second], Draft([first, other], [-1, -1]), [0], logits))
        seen = [(text[-2:], logits[0]), ([text[-1], first], logits[1])]
        if all(key != (other,) for key in want) and other not in (text[-1], first):
            seen.append(([text[-1], other], logits[2]))  # rejected, and nothing was known about it
        for last, row in seen:
            want |= {tuple(last[-length:]): row for length in range(1, order + 1)}
        text += [first, second]
    for pair in torch.cartesian_prod(torch.arange(5), torch.arange(5)).tolist():
        keys = [tuple(pair[-length:]) for length in range(order, 0, -1)]
        rows = [want[key] for key in keys if key in want]  # of the longest context that is known
        best = rows[0].topk(k).indices.tolist() if rows else []
        found = taken(guesser.candidates(0, tuple(pair[-order:])), 9)
        assert sorted(token for token, _ in found) == sorted(best)


def test_rejected_tokens_fill_rows_that_are_empty() -> None:
    guesser = RecyclingDrafter(k=1, order=1)
    guesser.begin(Generation([[0]]))
    best = torch.eye(5)[[1, 2, 3, 4]] * 9
    guesser.observe(0, Outcome([1, 2], Draft([1, 4, 0], [-1, -1, 0]), [0], best))
    follows = {token: taken(guesser.candidates(0, (token,)), 9) for token in range(5)}
    # The root (0) and the accepted 1, then the rejected 4; the rejected 0 below 1 has a row by then.
    assert {token: [one for one, _ in row] for token, row in follows.items() if row} == {
        0: [1],
        1: [2],
        4: [3],
    }
    guesser.begin(Generation([[4]]))
    assert answers(guesser)[0][0] == 3  # the matrix outlives a generation
    forgetful = RecyclingDrafter(k=1, forget=True)
    for _ in range(2):
        forgetful.begin(Generation([[0]]))
        assert answers(forgetful) == []
        forgetful.observe(0, Outcome([1], logits=best[:1]))


def test_trigrams_start_from_counts_and_approach_the_target(tmp_path: Path) -> None:
    (tmp_path / "ids.jsonl").write_text("[1, 2, 3, 1, 2, 3, 1, 2, 4]\n[1, 2]\n", "utf-8")
    guesser = TrigramDrafter(rate=0.25, explore=0.0, corpus=str(tmp_path / "ids.jsonl"))
    guesser.begin(Generation([[1, 2]]))
    assert dict(answers(guesser)) == pytest.approx({3: 2 / 3, 4: 1 / 3})
    assert dict(answers(guesser, [3])) == pytest.approx({1: 1.0})
    target = torch.tensor([0.1, 0.2, 0.3, 0.0, 0.4])
    guesser.observe(0, Outcome([4], logits=target.log()[None]))
    laws = {token: arm.law for token, arm in guesser._arms[1, 2].items()}
    old = torch.tensor([0, 0, 0, 2 / 3, 1 / 3])
    assert laws == pytest.approx(dict(enumerate((0.75 * old + 0.25 * target).tolist())))
    assert guesser.root(0) == (2, 4)
    guesser.observe(0, Outcome([0]))  # a text without logits: its token is certain
    assert [token for token, _ in taken(guesser.candidates(0, (2, 4)), 9)] == [0]


def test_trigrams_explore_what_was_tried_little() -> None:
    guesser = TrigramDrafter(explore=5.0, rate=0.5)
    guesser.begin(Generation([[1, 2]]))
    law = torch.tensor([0.6, 0.4]).log()[None]
    order = []
    for _ in range(6):
        guesser.observe(0, Outcome([0], logits=law))
        guesser.begin(Generation([[1, 2]]))
        order.append(answers(guesser))
    assert all(first >= second for (_, first), (_, second) in order)
    arms = guesser._arms[1, 2]
    assert arms[0].won == arms[0].tried == 5 and arms[1].won == 0
    assert arms[0].chance > 0.6 > arms[1].chance


# --- lookahead -----------------------------------------------------------------------------------


def test_the_window_iterates_and_its_ngrams_come_true() -> None:
    guesser = LookaheadDrafter(window=2, ngram=3, branches=1)
    follows = torch.eye(8).roll(1, dims=1) * 9  # token t is followed by t + 1
    guesser.begin(Generation([[5]]))
    guesser.observe(0, Outcome([6], logits=follows[[5]]))
    (draft,) = guesser.propose([0], [20])
    assert draft == Draft([5, 5])  # the first guesses are the prompt's
    guesser.observe(0, Outcome([7], draft, [], follows[[6, *draft.tokens]]))
    (draft,) = guesser.propose([0], [20])
    assert draft == Draft([5, 6, 5, 6], [-1, 0, 0, 2])  # below each guess its next iteration
    guesser.observe(0, Outcome([0], draft, [], follows[[7, *draft.tokens]]))
    assert guesser._pools[0].after(5) == [(6, 7)]  # an n-gram that the text has as well
    (draft,) = guesser.propose([0], [3])  # not the second place's next iteration
    assert draft == Draft([6, 7, 6], [-1, 0, 0]) and guesser._windows[0].ends() == [2]
    guesser.observe(0, Outcome([1], draft, [], follows[[0, *draft.tokens]]))
    assert guesser._windows[0]._levels == [[7, 7], [0, 7]]  # what was not asked stays


def test_lookahead_saves_steps_where_ngrams_come_back() -> None:
    table = torch.eye(12).roll(1, dims=1) * 9
    plain, fast = run(TableProgram(table), None), run(TableProgram(table), LookaheadDrafter(window=3))
    assert fast[0] == plain[0] and fast[1]["cycles"] < 0.7 * plain[1]["cycles"]


# --- mixing --------------------------------------------------------------------------------------


class Listed(PathDrafter):
    """Lists the same below every token."""

    name = "listed"

    def __init__(self, tokens: Sequence[int], chances: Sequence[float]) -> None:
        self.tokens, self.chances = tokens, chances

    def begin(self, generation: Generation) -> None:
        assert not generation.sample

    def look(self, asked: Sequence[Ask]) -> list[Successors]:
        return [Ranked(self.tokens, self.chances) for _ in asked]

    def observe(self, row: int, outcome: Outcome) -> None:
        pass


def test_mixed_chances_become_what_happens() -> None:
    guesser = MixDrafter(sources="copy+suffix")
    guesser._sources = [Listed([1, 2], [0.6, 0.1]), Listed([3, 1], [0.4, 0.2])]
    guesser.begin(Generation([[0]], sample=True))
    tree = Speculation(guesser, FixedLength(3), tree=Fixed(widths="3"))
    (draft,) = tree.propose([0], [3])
    assert draft.tokens == [1, 3, 2]
    for place in range(60):  # 3 follows four times of five, 2 never, 1 sometimes
        (draft,) = tree.propose([0], [3])
        guesser.observe(0, Outcome([3 if place % 5 else 1], draft))
    growing = Growing()
    found = dict(taken(guesser.look([Ask(0, growing, 0)])[0], 9))
    assert list(found) == [3, 1, 2]
    assert found == pytest.approx({3: 0.8, 1: 0.2, 2: 0.0}, abs=0.05)


def test_an_interrupted_draft_leaves_nothing_behind() -> None:
    guesser = SuffixDrafter()
    guesser.begin(Generation([[1, 2, 3, 1, 2, 4, 1]]))
    growing = Growing()
    growing.add(0, Ranked([2], [1.0]))
    guesser.look([Ask(0, growing, 1)])  # and no settle()
    guesser.begin(Generation([[5, 2, 6, 5]]))
    (found,) = guesser.look([Ask(0, growing, 1)])
    assert taken(found, 9)[0][0] == 6


def test_a_path_that_was_not_drafted_teaches_nothing() -> None:
    guesser = MixDrafter(sources="copy")
    guesser._sources = [Listed([1], [0.5])]
    guesser.begin(Generation([[0]]))
    Speculation(guesser, FixedLength(2)).propose([0], [2])
    guesser.observe(0, Outcome([1, 7, 1, 1]))  # 1 was right, then 1 was wrong, then nothing was asked
    assert list(guesser._tally._cells.values()) == [(1.0, 2.0)]


def test_tallies_move_from_the_prior_to_the_rate_and_forget() -> None:
    tally = Tally()
    assert tally.chance("kind", 0.3) == 0.3
    for place in range(3000):
        tally.record("kind", place % 4 == 0)
    assert tally.chance("kind", 0.9) == pytest.approx(0.25, abs=0.03)
    assert tally.chance("other", 0.9) == 0.9
    for _ in range(int(2 * MOST_TRIALS)):
        tally.record("kind", True)
    assert tally.chance("kind", 0.0) > 0.8


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("copy", {"gamma": 0}, "nothing to copy"),
        ("suffix", {"memory": -1}, "memory=-1"),
        ("suffix", {"corpus": "nowhere.txt"}, "no corpus 'nowhere.txt'"),
        ("recycling", {"k": 17}, "k=17"),
        ("trigrams", {"rate": 0.0}, "rate=0.0"),
        ("lookahead", {"window": 20, "ngram": 5}, "take 88 tokens"),
        ("lookahead", {"ngram": 1}, "too small"),
        ("datastore", {}, "nothing to retrieve from"),
        ("datastore", {"path": "nowhere.npy"}, "no corpus"),
        ("datastore", {"path": "x", "shortest": 9, "longest": 3}, "retrieve nothing"),
        ("mix", {"sources": "suffix+ngram"}, "'ngram' cannot be mixed"),
        ("mix", {"sources": "suffix+sufix"}, "did you mean suffix"),
        ("mix", {"breadth": 0}, "merges nothing"),
    ],
)
def test_bad_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_drafter(name, **options)


# --- what they draft -----------------------------------------------------------------------------

LOOKUPS = ["copy", "suffix", "recycling", "trigrams", "lookahead", "datastore", "mix", "ngram"]
RAGGED = [[3, 9, 4, 3, 9], [7], [5, 6, 5, 6, 5, 6, 5]]


def run(program: Any, guesser: Drafter | None, tree: Tree | None = None) -> tuple[Any, dict[str, Any]]:
    """What is generated greedily after ragged prompts, and the statistics."""
    config = LlamaConfig(vocab_size=VOCAB, bos_token_id=1, eos_token_id=None, pad_token_id=0)
    speculation = None if guesser is None else Speculation(guesser, FixedLength(12), tree=tree)
    fast = OptimizedModel(
        program, config=config, generation_config=GenerationConfig(), speculation=speculation
    )
    width = max(map(len, RAGGED))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in RAGGED])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in RAGGED])
    out = fast.generate(ids, attention_mask=mask, max_new_tokens=24, pad_token_id=0)
    return out.tolist(), fast.stats()["last"]


@pytest.mark.parametrize(
    ("name", "tree"),
    [(name, Chain()) for name in LOOKUPS]
    + [(name, Fixed(widths="3+2+1")) for name in LOOKUPS if name not in ("ngram", "lookahead")],
    ids=str,
)
def test_greedy_decoding_is_the_same(tmp_path: Path, name: str, tree: Tree) -> None:
    tables = torch.randn(2, VOCAB, VOCAB, generator=torch.Generator().manual_seed(3))
    want = [run(TableProgram(table), None)[0] for table in tables]
    (tmp_path / "ids.jsonl").write_text("\n".join(map(str, want[0])), "utf-8")
    options = {"path": str(tmp_path / "ids.jsonl")} if name == "datastore" else {}
    guesser = make_drafter(name, **options)
    accepted = []
    for table, plain in zip(tables, want, strict=True):  # what the first one taught is wrong in the second
        fast, stats = run(TableProgram(table), guesser, tree)
        assert fast == plain
        accepted.append(stats["accepted"])
        assert stats["draft_tokens"] >= stats["accepted"]
    assert accepted[0] > 20


def test_greedy_decoding_is_the_same_with_a_model(llama: Any) -> None:
    program = ReferenceProgram(llama)
    fast, stats = run(program, MixDrafter(), Fixed(widths="2+1"))
    assert fast == run(program, None)[0]
    assert stats["accepted"] > 0
