"""Which layers a self-drafter leaves out, and what it refuses."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from graphwright.ir.errors import InputError
from graphwright.runtime.residual import ResidualStream
from graphwright.runtime.speculation import Draft, Generation, Outcome, make_drafter
from graphwright.runtime.speculation.drafters.clasp import SkipTable
from graphwright.runtime.speculation.drafters.dynamic_exit import tokens_per_layer
from graphwright.runtime.speculation.skip_calibration import calibrate_skips, load_domains
from graphwright.runtime.speculation.skip_search import SkipSearch
from tests.e2e.fake_program import ReferenceProgram
from tests.e2e.packed_programs import random_text
from tests.e2e.self_drafting import (
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


# --- choosing layers ------------------------------------------------------------------------------


def test_the_table_leaves_out_layers_that_do_nothing() -> None:
    torch.manual_seed(0)
    idle, states = {1, 2, 5}, torch.randn(2, 1, 8).expand(2, 4, 8)
    table = SkipTable(torch.tensor([0, 1]), 3)
    for layer in range(7):
        turned = states @ torch.linalg.qr(torch.randn(8, 8)).Q
        states = table(layer, states, states if layer in idle else turned)
    assert table.sets[3] == idle
    assert torch.allclose(states[:, 3], states[:, 0], atol=1e-5)
    assert [len(chosen) for chosen in table.sets] == [0, 1, 2, 3]


def test_the_table_can_leave_out_the_first_layers() -> None:
    states = torch.eye(4)[None, :1].expand(1, 3, 4)
    table = SkipTable(torch.tensor([0]), 2)
    for layer in range(2):
        states = table(layer, states, -states)
    assert table.sets[2] == {0, 1}


def test_the_search_finds_better_sets_and_ends() -> None:
    target, first = frozenset({2, 5, 7}), frozenset({3, 4, 6})
    search = SkipSearch(range(1, 10), first, random.Random(0), patience=40, enough=1.0)
    for _ in range(300):
        if search.is_over:
            break
        assert len(search.current) == 3
        search.judge(len(search.current & target) / 3)
    assert search.is_over
    assert search.current == search.best == target
    search.watch(0.9, drop=0.2)
    assert search.is_over
    search.watch(0.5, drop=0.2)  # the text has changed
    assert not search.is_over
    assert search.current == target


def test_sets_change_when_their_drafts_are_rejected(make: Make) -> None:
    program = program_of(make("llama"))
    state = program.allocate(1, 40)
    program.prefill(state, torch.tensor([[3, 4]]), torch.tensor([2]))
    drafter: Any = make_drafter("swift", share=0.25, trial=3, patience=2)
    drafter.begin(Generation([[3, 4]], program, state, capacity=40))
    drafter.observe(0, Outcome([5]))

    def run(accepted: int) -> frozenset[int]:
        """Two verified drafts of two tokens, then the set of the next one."""
        for _ in range(2):
            drafter.observe(0, Outcome([1, 2, 5][-accepted - 1 :], Draft([1, 2]), range(accepted)))
        assert len(drafter.propose([0], [2])[0].tokens) == 2
        return frozenset(drafter.skip)

    first = frozenset(drafter.skip)
    assert first <= {1, 2}  # the outer layers stay
    assert run(accepted=2) == first  # all were accepted: the search is over
    assert run(accepted=1) == first  # too few now: it begins again, with the best
    assert run(accepted=1) != first


def test_most_tokens_for_each_layer() -> None:
    assert tokens_per_layer(1.0, 4, 2, 10) == pytest.approx(5 / 18)
    assert tokens_per_layer(0.0, 4, 2, 10) == pytest.approx(1 / 18)
    assert tokens_per_layer(0.5, 0, 2, 10) == pytest.approx(1 / 10)


def test_the_exit_follows_what_it_would_have_drafted(make: Make) -> None:
    program = program_of(make("llama"))
    state = program.allocate(1, 40)
    prompt = random_text(1, 9)
    program.prefill(state, prompt, torch.tensor([9]))
    drafter: Any = make_drafter("del")
    drafter.begin(Generation(prompt.tolist(), program, state, capacity=40))
    stream = ResidualStream()
    tokens = random_text(1, 6, seed=4)
    program.step(state, tokens, torch.tensor([6]), visit=stream)
    hidden = [kept[0] for kept in stream.kept]
    early = program.read_out(stream.kept[2])[0].argmax(-1).tolist()  # right after two layers
    outcome = Outcome(early, Draft(early[:5]), range(5), hidden=hidden)
    drafter.observe(0, Outcome([3]))
    assert drafter.propose([0], [8])[0].tokens == ()  # nothing is known of any exit
    drafter.observe(0, outcome)
    drafter.propose([0], [8])
    assert drafter.skip == {2, 3}


def test_the_nearest_kind_of_text_says_what_to_leave_out(make: Make, tmp_path: Path) -> None:
    program = program_of(make("llama"))
    path = domains_file(program, tmp_path)
    first, second = load_domains(path)
    assert len(first.skip) == len(second.skip) == 2
    assert 0 < first.match <= 1
    content = json.loads(path.read_text())
    content[1]["skip"] = [3]
    path.write_text(json.dumps(content))
    drafter: Any = make_drafter("knn_ssd", path=str(path))
    state = program.allocate(1, 40)
    program.prefill(state, torch.tensor([[3, 4]]), torch.tensor([2]))
    drafter.begin(Generation([[3, 4]], program, state, capacity=40))
    drafter.observe(0, Outcome([3]))
    assert drafter.propose([0], [4])[0].tokens == ()
    for domain, wanted in ((second, {3}), (first, set(first.skip))):
        drafter.begin(Generation([[3, 4]], program, state, capacity=40))
        drafter.observe(0, Outcome([3], hidden=[torch.tensor([domain.anchor]) * 2]))
        assert drafter.propose([0], [4])[0].tokens
        assert drafter.skip == wanted


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("drafter", "message"),
    [
        ("skip(layers=2-7)", "there is no layer 4.*layers are 0 to 3"),
        ("skip(layers=0-3)", "nothing is left without all 4 layers.*at most 3"),
        ("skip(count=4)", "count=4 leaves nothing of 4 layers.*at most 3"),
    ],
)
def test_sets_that_cannot_be_left_out_are_refused(drafter: str, message: str, make: Make) -> None:
    model = make("llama")
    model.speculation = speculate(drafter)
    with pytest.raises(InputError, match=f"(?s){message}"):
        generate(model, [5])


@pytest.mark.parametrize(
    "text",
    ["skip", "skip(layers=1, count=2)", "skip(layers=1--2)", "skip(layers=a)", "swift(share=1.5)",
     "swift(trial=0)", "clasp(share=0)", "clasp(every=0)", "del(exits=0)", "del(decay=0)"],
)  # fmt: skip
def test_options_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=text.split("(")[0]):
        speculate(text)


@pytest.mark.parametrize("content", [None, "{", "[]", '[{"name": 1}]', '[{"a": [1]}]'])
def test_files_that_hold_no_domains_are_refused(content: str | None, tmp_path: Path, make: Make) -> None:
    path = tmp_path / "domains.json"
    if content is not None:
        path.write_text(content)
    model = make("llama")
    model.speculation = speculate(f"knn_ssd(path={path})")
    with pytest.raises(InputError, match=r"domains\.json"):
        generate(model, [5])


def test_calibration_needs_texts_and_layers(make: Make) -> None:
    program = program_of(make("llama"))
    with pytest.raises(InputError, match="has no text"):
        calibrate_skips(program, {"none": []}, 1)
    with pytest.raises(InputError, match="count=4 of 4"):
        calibrate_skips(program, {"a": [[1, 2]]}, 4)


def test_anchors_of_another_model_are_refused(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "domains.json"
    path.write_text('[{"name": "a", "anchor": [1.0, 2.0], "skip": [1], "match": 1.0}]')
    model = make("llama")
    model.speculation = speculate(f"knn_ssd(path={path})")
    with pytest.raises(InputError, match="made for hidden states of 2 numbers"):
        generate(model, [5])


def test_programs_without_layers_or_without_a_cache_are_refused(make: Make) -> None:
    lab = lab_of(make("llama"))
    with pytest.raises(InputError, match="no layer of this program can be left out"):
        make_drafter("skip", count=1).begin(Generation([[1]], ReferenceProgram(lab.model), None))
    program = program_of(lab.program([]))
    with pytest.raises(InputError, match="keeps no cache"):
        make_drafter("skip", count=1).begin(Generation([[1]], program, program.allocate(1, 8)))
