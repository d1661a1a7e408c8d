"""Programs whose layers hold fewer tokens: memory, drafts, ragged rows, going back, and the way to disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import graphwright as gw
from graphwright.cost_model.stores import cache_bytes, default_stores
from graphwright.ir.errors import CapacityError
from graphwright.ir.evictors import registered_evictors
from graphwright.runtime.model import OptimizedModel
from graphwright.runtime.program import Program
from graphwright.runtime.speculation import Draft, Drafter, Generation, Outcome, Speculation
from graphwright.runtime.storage import State
from tests.architectures import VOCAB, tiny_model
from tests.e2e.packed_programs import PackedModel, drafting, random_text, repetitive_prompts

KV = "place_cache{cut=kv}"
BUDGET, WINDOW, SLACK = 40, 8, 80
LIMIT = BUDGET + SLACK - 64
KEYS, HELD = "model.layers.0.self_attn.keys", "model.layers.0.self_attn.held"
OPTIONS = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
METHODS = sorted(registered_evictors())


def evict(method: str = "snapkv", **options: Any) -> str:
    """The pass, with few tokens."""
    settings = {"method": method, "tokens": BUDGET, "window": WINDOW, "sinks": 2, "slack": SLACK} | options
    return f"evict_tokens{{{','.join(f'{k}={v}' for k, v in settings.items())}}}"


@pytest.fixture(scope="module")
def llama() -> PackedModel:
    return PackedModel(tiny_model("llama", max_position_embeddings=1024))


@pytest.fixture(scope="module")
def gemma() -> PackedModel:
    """A layer with a window, which keeps its ring, and one without; both with a softcap."""
    return PackedModel(tiny_model("gemma2", max_position_embeddings=1024))


class Branches(Drafter):
    """Knows the answers and drafts trees: beside every right token a wrong one, which comes first."""

    name = "branches"

    def __init__(self, answers: list[list[int]]) -> None:
        self.answers = answers

    def begin(self, generation: Generation) -> None:
        self.at = [0] * len(generation.prompts)

    def propose(self, rows: Sequence[int], budget: Sequence[int]) -> list[Draft]:
        return [self._draft(row, limit) for row, limit in zip(rows, budget, strict=True)]

    def _draft(self, row: int, limit: int) -> Draft:
        tokens: list[int] = []
        parents: list[int] = []
        for token in self.answers[row][self.at[row] : self.at[row] + limit // 2][:3]:
            parent = len(tokens) - 1
            tokens += [(token + 1) % VOCAB, token]
            parents += [parent, parent]
        return Draft(tokens, parents)

    def observe(self, row: int, outcome: Outcome) -> None:
        self.at[row] += len(outcome.tokens)


def held(state: State) -> list[int]:
    """Tokens that each row of the first layer holds."""
    return state.stores[HELD].tolist()


def feed(program: Program, state: State, ids: torch.Tensor, step: int = 1) -> torch.Tensor:
    """Run whole rows, so many tokens at a time; logits ``[B, T, V]``."""
    found = []
    for start in range(0, ids.shape[1], step):
        part = ids[:, start : start + step].contiguous()
        counts = torch.full((ids.shape[0],), part.shape[1])
        found.append(program.step(state, part, counts))
        state.commit(counts)
    return torch.cat(found, dim=1)


# --- drafts and rows -------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["always", "prompt"])
@pytest.mark.parametrize("method", METHODS)
def test_neither_drafts_nor_other_rows_change_a_token(llama: PackedModel, method: str, when: str) -> None:
    fast = llama.program([KV, evict(method, when=when)])
    ids, mask = repetitive_prompts((150, 70, 20))
    plain = fast.generate(ids, attention_mask=mask, **OPTIONS)
    answers = plain[:, 150:].tolist()
    for speculation in (drafting(), Speculation(Branches(answers))):
        fast.speculation = speculation
        assert torch.equal(fast.generate(ids, attention_mask=mask, **OPTIONS), plain)
        drafts = fast.stats()["last"]
        assert 0 < drafts["accepted"] < drafts["draft_tokens"]
    fast.speculation = None
    alone = fast.generate(ids[1:2], attention_mask=mask[1:2], **OPTIONS)
    # A row by itself has the same capacity, as the prompts are padded alike.
    assert torch.equal(alone[0], plain[1])


def test_beside_a_window_and_with_softcaps(gemma: PackedModel) -> None:
    fast = gemma.program([KV, evict()])
    ids, mask = repetitive_prompts((150, 70))
    plain = fast.generate(ids, attention_mask=mask, **OPTIONS)
    fast.speculation = drafting()
    assert torch.equal(fast.generate(ids, attention_mask=mask, **OPTIONS), plain)
    exact = gemma.program([KV]).generate(ids, attention_mask=mask, **OPTIONS)
    assert not torch.equal(exact, plain)


def test_tokens_do_leave(llama: PackedModel) -> None:
    """What the test before would not tell: logits differ from those of the whole cache."""
    exact, fast = llama.program([KV]).program, llama.program([KV, evict()]).program
    ids = random_text(2, 100)
    states = [p.allocate(2, 300) for p in (exact, fast)]
    found, expected = (feed(p, s, ids) for p, s in zip((fast, exact), states[::-1], strict=True))
    difference = (found - expected).abs().amax((0, 2))
    assert difference[:LIMIT].max() < 1e-5 < 1e-3 < difference[LIMIT:].max()


def test_fewer_tokens_lose_more(llama: PackedModel) -> None:
    """Logits against those of the whole cache."""
    exact = llama.program([KV])
    ids = random_text(2, 400)
    stock = exact.score(ids)
    found = [llama.program([KV, evict(tokens=tokens)]).score(ids) for tokens in (16, 120)]
    few, many = (float((logits - stock).square().mean()) for logits in found)
    assert 0 < many < few


# --- when tokens leave -----------------------------------------------------------------------------


def test_evictions_come_at_fixed_numbers(llama: PackedModel) -> None:
    program = llama.program([KV, evict()]).program
    state, seen = program.allocate(1, 300), []
    for token in random_text(1, 100).T:
        feed(program, state, token[None])
        seen.append(held(state)[0])
    assert seen[: LIMIT - 1] == list(range(1, LIMIT))
    assert seen[LIMIT - 1 :] == [BUDGET + n % (LIMIT - BUDGET) for n in range(100 - LIMIT + 1)]
    assert state.room() == [LIMIT - seen[-1]]


@pytest.mark.parametrize("method", ["snapkv", "chelsea"])
def test_steps_that_stop_at_the_room_see_what_single_tokens_see(llama: PackedModel, method: str) -> None:
    program = llama.program([KV, evict(method)]).program
    ids = random_text(1, 130)  # kernels run at most 64 rows of a step, the library more
    one, several = (program.allocate(1, 300) for _ in range(2))
    expected, found = feed(program, one, ids), []
    while (at := int(several.lengths[0])) < 130:
        step = min(several.room()[0], 130 - at)
        found.append(feed(program, several, ids[:, at : at + step], step))
    assert torch.equal(torch.cat(found, dim=1), expected)


def test_what_is_rolled_back_leaves_no_trace(llama: PackedModel) -> None:
    program = llama.program([KV, evict("ems")]).program
    ids, wrong = random_text(2, 120), random_text(2, 120, seed=9)
    clean, dirty = (program.allocate(2, 300) for _ in range(2))
    found = []
    for at in range(0, 120, 3):
        program.step(dirty, wrong[:, at : at + 40].contiguous(), torch.tensor([min(40, 120 - at)] * 2))
        found.append(feed(program, dirty, ids[:, at : at + 3], 1))
    assert torch.equal(torch.cat(found, dim=1), feed(program, clean, ids))


def test_a_row_evicts_by_itself(llama: PackedModel) -> None:
    program = llama.program([KV, evict()]).program
    state = program.allocate(3, 300)
    program.prefill(state, random_text(3, 130), torch.tensor([130, LIMIT - 1, 7]))
    assert held(state) == [BUDGET, LIMIT - 1, 7]
    assert state.lengths.tolist() == [130, LIMIT - 1, 7]


# --- prompts ---------------------------------------------------------------------------------------


def test_a_prompt_stays_whole_until_it_has_run(llama: PackedModel) -> None:
    """Its last logits are those of the whole cache, and then it is cut; after that the question comes."""
    exact = llama.program([KV]).program
    whole = llama.program([KV, evict(when="prompt")]).program
    context, question = random_text(2, 700), random_text(2, 30, seed=5)
    counts = torch.tensor([700, 560])
    expected = exact.prefill(exact.allocate(2, 900), context, counts)
    state = whole.allocate(2, 900)
    before = state.nbytes()
    most = []
    run = whole._run_step
    whole._run_step = lambda *given: (most.append(state.nbytes()), run(*given))[1]  # type: ignore[method-assign]
    assert (whole.prefill(state, context, counts) - expected).abs().max() < 1e-5
    whole._run_step = run  # type: ignore[method-assign]
    assert held(state) == [BUDGET, BUDGET]
    assert max(most) > 4 * before and state.nbytes() == before
    logits = whole.prefill(state, question, torch.tensor([30, 4]))
    assert logits.isfinite().all() and state.lengths.tolist() == [730, 564]
    assert held(state) == [BUDGET, BUDGET + 4]  # the first row's question filled the slots


def test_memory_is_bounded_while_a_prompt_runs(llama: PackedModel) -> None:
    program = llama.program([KV, evict()]).program
    state = program.allocate(1, 1000)
    before, most = state.nbytes(), []
    run = program._run_step
    program._run_step = lambda *given: (most.append(state.nbytes()), run(*given))[1]  # type: ignore[method-assign]
    program.prefill(state, random_text(1, 990), torch.tensor([990]))
    token = 2 * 2 * 2 * 16 * 4
    assert max(most) == before + (512 - 64) * token and state.nbytes() == before
    assert held(state) == [BUDGET]


@pytest.mark.parametrize("when", ["always", "prompt"])
def test_decode_steps_find_stores_where_they_were(llama: PackedModel, when: str) -> None:
    """Where steps are recorded, a long prompt gets other stores, and hands its tokens back to these."""
    program = llama.program([KV, evict("ems", when=when)]).program
    ids, counts = random_text(2, 300), torch.tensor([300, 50])
    plain = program.allocate(2, 500)
    program._graphs = object()  # type: ignore[assignment]
    state = program.allocate(2, 500)
    program._graphs = None
    parts = [name for name in state.stores if not name.endswith("noted")]
    before = {name: state.stores[name].data_ptr() for name in parts}
    for one in (plain, state):
        program.prefill(one, ids, counts)
    assert {name: state.stores[name].data_ptr() for name in parts} == before
    assert state.takes_short_steps and held(state) == held(plain)
    follow = random_text(2, 40, seed=6)
    assert torch.equal(feed(program, state, follow, 4), feed(program, plain, follow, 4))


def test_scope_keeps_the_prompt(llama: PackedModel) -> None:
    """Its share of the budget never changes once it has run; the rest is for what follows."""
    program = llama.program([KV, evict("scope(decode=0.5)", when="prompt")]).program
    state = program.allocate(1, 500)
    program.prefill(state, random_text(1, 200), torch.tensor([200]))
    assert held(state) == [BUDGET // 2]
    prompt = state.stores[KEYS][:, :, : BUDGET // 2].clone()
    feed(program, state, random_text(1, 150, seed=4))
    assert torch.equal(state.stores[KEYS][:, :, : BUDGET // 2], prompt)


# --- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["recent", "snapkv", "ems"])
@pytest.mark.parametrize("model", ["llama", "gemma"])
def test_bytes_are_those_of_the_cost_model(request: pytest.FixtureRequest, model: str, method: str) -> None:
    """And a fraction of those of the whole cache, for long rows; windows keep what they have."""
    found = request.getfixturevalue(model)
    graph, _ = found.rewrite([KV, f"evict_tokens{{method={method},keep=0.25}}"])
    plain, _ = found.rewrite([KV])
    program = found.run(graph).program
    for batch, capacity in ((1, 1), (2, 100), (3, 171), (1, 172), (2, 900)):
        state = program.allocate(batch, capacity)
        assert state.nbytes() == cache_bytes(default_stores(graph), batch, capacity)
    if model == "llama":
        share = 0.9 if method == "recent" else 1.2  # queries of 4 heads, beside keys and values of 2
        assert state.nbytes() < share * 0.5 * cache_bytes(default_stores(plain), 2, 900)
    assert program.cache_bytes() == state.nbytes()


def test_rows_that_fit_are_exact(llama: PackedModel) -> None:
    """A budget that is not used up changes nothing, and neither does a capacity below the slots."""
    ids, mask = repetitive_prompts((50, 20))
    expected = llama.program([KV]).generate(ids, attention_mask=mask, **OPTIONS)
    for options in ({"tokens": 200}, {"keep": 1.0, "tokens": 0}):
        fast = llama.program([KV, evict(**options)])
        assert torch.equal(fast.generate(ids, attention_mask=mask, **OPTIONS), expected)
    state = fast.program.allocate(1, 100)
    assert state.stores[KEYS].shape[2] == 100 and state.room() == [100]


# --- going back ------------------------------------------------------------------------------------


def test_going_back_and_on(llama: PackedModel) -> None:
    """Down to the last eviction, as if the rest had never been; further, an error that says so."""
    program = llama.program([KV, evict()]).program
    ids, other = random_text(2, 66), random_text(2, 30, seed=8)
    state, fresh = (program.allocate(2, 300) for _ in range(2))
    feed(program, state, ids)
    assert held(state) == [BUDGET + 66 - LIMIT] * 2
    with pytest.raises(CapacityError, match="tokens were evicted") as caught:
        state.truncate(torch.tensor([66, LIMIT - 1]))
    assert "start a new cache" in (caught.value.hint or "") and state.lengths.tolist() == [66, 66]
    state.truncate(torch.tensor([LIMIT + 2, 66]))
    assert held(state) == [BUDGET + 2, BUDGET + 10]
    feed(program, fresh, ids[:, : LIMIT + 2])
    found, expected = (feed(program, s, other[:, :10]) for s in (state, fresh))
    assert torch.equal(found[0], expected[0])
    state.truncate(torch.tensor([0, 0]))
    assert held(state) == [0, 0]
    empty = program.allocate(2, 300)
    assert torch.equal(feed(program, state, ids), feed(program, empty, ids))


def test_a_cache_that_is_cropped_starts_again(llama: PackedModel) -> None:
    """The handle that forward() gives replays what it cannot bring back."""
    fast = llama.program([KV, evict()])
    ids = random_text(1, 120)
    cache = fast(ids).past_key_values
    cache.crop(40)
    again = fast(ids[:, 40:50], past_key_values=cache).logits
    assert (again - llama.model(ids[:, :50]).logits[:, 40:]).abs().max() < 1e-4


def test_a_state_that_is_used_again_is_as_new(llama: PackedModel) -> None:
    program = llama.program([KV, evict("ems", when="prompt")]).program
    ids = random_text(2, 130)
    state, fresh = (program.allocate(2, 300) for _ in range(2))
    program.prefill(state, random_text(2, 200, seed=3), torch.tensor([200, 90]))
    state.begin_prompt(250)  # of a call that was interrupted
    state.reset()
    assert state.nbytes() == fresh.nbytes() and held(state) == [0, 0]
    assert torch.equal(feed(program, state, ids), feed(program, fresh, ids))


def test_a_cache_may_be_pretended(llama: PackedModel) -> None:
    program = llama.program([KV, evict()]).program
    state = program.allocate(2, 300)
    state.pretend(250)
    assert held(state) == [LIMIT - 1] * 2
    assert program.step(state, random_text(2, 4), torch.tensor([4, 2])).shape == (2, 4, VOCAB)


# --- the whole way ---------------------------------------------------------------------------------


def test_compiled_and_saved(llama: PackedModel, tmp_path: Path) -> None:
    """Layers compile once; drafts change nothing; tokens and bytes survive the disk."""
    passes = [KV, evict(), "speculate{drafter=ngram}", "compile_layers"]
    fast: OptimizedModel = gw.optimize(llama.model, "cpu", passes=passes)
    assert fast.program.lowered.compiled and fast.program.lowered.structures[0] <= 3
    assert {d.status.value for d in fast.report.decisions if d.pass_name.startswith("evict")} == {"applied"}
    ids, mask = repetitive_prompts((90, 20))
    plain = llama.program([KV, evict()]).generate(ids, attention_mask=mask, **OPTIONS)
    assert torch.equal(fast.generate(ids, attention_mask=mask, **OPTIONS), plain)
    fast.save(tmp_path / "plan")
    again = gw.load(tmp_path / "plan", llama.model)
    assert torch.equal(again.generate(ids, attention_mask=mask, **OPTIONS), plain)
    sizes = [p.program.allocate(2, 500).nbytes() for p in (fast, again)]
    assert sizes[0] == sizes[1]
