"""Programs that keep a batch's common prefix once: the same tokens, the bytes, the refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graphwright as gw
from graphwright.cost_model.stores import cache_bytes, default_stores
from graphwright.ir.errors import CapacityError, InputError
from graphwright.optimizer.check import measure_decode
from graphwright.optimizer.report import Status
from graphwright.runtime.model import OptimizedModel
from graphwright.runtime.shared_prefix import LEAST_TOKENS, prefix_for, tokens_to_share
from tests.e2e.packed_programs import PackedModel, drafting, full_model, random_text, windowed_model

KV, SHARE = "place_cache{cut=kv}", "share_prefix"
SHARED, NEW = 120, 12
OPTIONS = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def full() -> PackedModel:
    return PackedModel(full_model())


@pytest.fixture(scope="module")
def windowed() -> PackedModel:
    """A layer with a ring of 160 slots, which every row keeps for itself, and one that shares."""
    return PackedModel(windowed_model())


def prompts(shared: int, own: tuple[int, ...] = (30, 1, 12)) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded prompts with a common beginning, repetitive so that drafts hit, and their mask."""
    width = shared + max(own)
    ids, mask = torch.zeros((len(own), width), dtype=torch.int64), torch.zeros((len(own), width))
    pattern = random_text(1, 9, seed=5)[0]
    for row, length in enumerate(own):
        tail = torch.cat((torch.tensor([10 + row]), pattern.roll(row).repeat(length // 9 + 1)))[:length]
        text = torch.cat((pattern.repeat(shared // 9 + 1)[:shared], tail))
        ids[row, -len(text) :], mask[row, -len(text) :] = text, 1
    return ids, mask.long()


def generate(
    fast: OptimizedModel, ids: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens ``[B, N]``, and the logits ``[N, B, V]`` that they were chosen by."""
    out = fast.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **OPTIONS)
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits)


@pytest.mark.parametrize("kind", ["full", "windowed"])
def test_the_same_tokens_and_logits(kind: str, request: pytest.FixtureRequest) -> None:
    lab: PackedModel = request.getfixturevalue(kind)
    ids, mask = prompts(SHARED)
    plain, sharing = lab.program([KV]), lab.program([KV, SHARE])
    tokens, logits = generate(plain, ids, mask)
    mine, own = generate(sharing, ids, mask)
    assert torch.equal(mine, tokens)
    torch.testing.assert_close(own, logits, atol=2e-5, rtol=1e-5)
    assert sharing.stats()["shared_prefix_tokens"] == SHARED and plain.stats()["shared_prefix_tokens"] == 0

    drafts = lab.program([KV, SHARE])
    drafts.speculation = drafting()
    found, seen = generate(drafts, ids, mask)
    assert torch.equal(found, mine) and torch.equal(seen, own), "drafts change no bit"
    assert drafts.stats()["accepted"] > 0 and drafts.stats()["last"]["shared_prefix_tokens"] == SHARED


def test_a_compiled_program_and_one_with_packed_layers(full: PackedModel, windowed: PackedModel) -> None:
    """Where the ring's layer is packed and the other one shares, one row's pages are copied to all."""
    ids, mask = prompts(SHARED, (9, 20))
    packed = "quantize_cache{codec=float(bits=16),page=16,layers=0}"
    expected, found = (windowed.program([KV, packed, *more]) for more in ((), (SHARE,)))
    for mine, own in zip(generate(expected, ids, mask), generate(found, ids, mask), strict=True):
        torch.testing.assert_close(own, mine, atol=2e-3, rtol=0)  # pages hold bfloat16
    assert found.stats()["shared_prefix_tokens"] == SHARED
    # Compiled for all prefixes, none included.
    fast, plain = full.program([KV, SHARE], compiled=True), full.program([KV])
    for shared in (SHARED, 0):
        ids, mask = prompts(shared, (9, 20))
        assert torch.equal(generate(fast, ids, mask)[0], generate(plain, ids, mask)[0])
        assert fast.stats()["last"]["shared_prefix_tokens"] == shared


def test_a_row_has_the_same_bits_whoever_shares_with_it(full: PackedModel) -> None:
    fast = full.program([KV, "share_prefix{tokens=120}"])
    ids, mask = prompts(SHARED, (20, 1, 12))
    _, together = generate(fast, ids, mask)
    for rows in ([0, 2], [2, 1], [1, 1, 0]):
        _, own = generate(fast, ids[rows], mask[rows])
        assert torch.equal(own, together[:, rows])


def test_what_is_shared_and_when(full: PackedModel) -> None:
    fast = full.program([KV, SHARE])
    for shared, own, expected in (
        (LEAST_TOKENS, (4, 2), LEAST_TOKENS),
        (LEAST_TOKENS - 1, (4, 2), 0),
        (40, (5,), 0),  # one row has nobody to share with
    ):
        generate(fast, *prompts(shared, own))
        assert fast.stats()["last"]["shared_prefix_tokens"] == expected
    same = prompts(40, (6,))[0].expand(3, -1)
    generate(fast, same, torch.ones_like(same))
    assert fast.stats()["last"]["shared_prefix_tokens"] == 45  # each keeps its last token
    assert fast.stats()["shared_prefix_tokens"] == LEAST_TOKENS + 45


def test_a_promise_is_kept_to_the_token(full: PackedModel) -> None:
    fast = full.program([KV, "share_prefix{tokens=50}"])
    generate(fast, *prompts(60))
    assert fast.stats()["last"]["shared_prefix_tokens"] == 50


def test_rows_that_break_a_promise_are_refused_before_anything_runs(full: PackedModel) -> None:
    fast = full.program([KV, "share_prefix{tokens=50}"])
    ids, mask = prompts(40)
    with pytest.raises(InputError) as caught:
        fast.generate(ids, attention_mask=mask, **OPTIONS)
    text = str(caught.value)
    assert "promised to share their first 50 tokens, and share 40" in text
    assert "row 1 has token 11 there (position 40), row 0 has 10" in text
    assert "drop shared_prefix" in text and "fix the prompts" in text
    assert fast.stats()["calls"] == 0 and fast.program.cache_bytes() == 0
    with pytest.raises(InputError, match=r"share 3: row 1 ends there \(position 3\), row 0 has 4"):
        tokens_to_share(4, [[1, 2, 3, 4], [1, 2, 3]])
    with pytest.raises(InputError, match=r"row 0 ends there \(position 2\)"):
        tokens_to_share(4, [[1, 2], [1, 2, 3, 4]])


def test_forward_and_score_share_nothing_and_give_the_same(full: PackedModel) -> None:
    plain, sharing = full.program([KV]), full.program([KV, "share_prefix{tokens=50}"])
    ids = random_text(2, 30)  # nothing in common: nobody asks here
    torch.testing.assert_close(sharing.score(ids), plain.score(ids), atol=2e-5, rtol=1e-5)
    assert torch.equal(sharing(ids).logits, sharing.score(ids, step=30))


def test_going_back_ends_at_the_prefix(windowed: PackedModel) -> None:
    program = windowed.program([KV, SHARE]).program
    ids, _ = prompts(SHARED, (12, 12))
    state = program.allocate(2, 160, SHARED)
    counts = torch.tensor([132, 132])
    first = program.prefill(state, ids, counts)
    one = torch.ones(2, dtype=torch.int64)
    again = program.step(state, torch.full((2, 1), 5), one)
    state.commit(one)
    state.truncate(torch.tensor([132, 125]))
    assert state.known == [132, 125]
    state.truncate(torch.tensor([132, 124]))
    assert torch.equal(program.step(state, torch.full((2, 1), 5), one)[0], again[0])
    with pytest.raises(CapacityError) as caught:
        state.truncate(torch.tensor([132, 119]))
    assert "cannot go back to 119 tokens: the rows share their first 120" in str(caught.value)
    assert "start a new cache" in str(caught.value) and state.known == [132, 124]
    state.reset()
    torch.testing.assert_close(program.prefill(state, ids, counts), first)


def test_memory_measured_and_predicted(full: PackedModel) -> None:
    """The prefix once, each row's own tokens besides: to the byte, in the state, the program and the plan."""
    workload = gw.Workload(batch=5, prompt=130, generate=30, shared_prefix=SHARED)
    fast = gw.optimize(full.model, "cpu", workload=workload, passes=[KV, SHARE])
    assert fast.plan.passes == (KV, f"share_prefix{{tokens={SHARED}}}")
    state = fast.program.allocate(5, workload.capacity, SHARED)
    token = 2 * 2 * 128 * 4  # two layers, keys and values, 2 heads of 64, float32
    assert state.nbytes() == token * (SHARED + 5 * (160 - SHARED))
    assert fast.program.cache_bytes() == state.nbytes() == fast.report.predicted["memory"]["cache_bytes"]
    assert measure_decode(fast.program, workload)["cache_bytes"] == state.nbytes()
    assert cache_bytes(default_stores(fast.graph), 5, workload.capacity) == state.nbytes()
    mine = [d for d in fast.report.decisions if d.pass_name == f"share_prefix{{tokens={SHARED}}}"]
    assert [d.status for d in mine] == [Status.APPLIED] * 2
    assert all(d.predicted and d.predicted["memory_bytes"] == -4 * SHARED * token // 2 for d in mine)


def test_a_saved_program_shares_again(full: PackedModel, tmp_path: Path) -> None:
    workload = gw.Workload(batch=3, prompt=130, generate=30, shared_prefix=SHARED)
    fast = gw.optimize(full.model, "cpu", workload=workload, passes=[KV, SHARE])
    fast.save(tmp_path / "plan")
    again = gw.load(tmp_path / "plan", full.model)
    ids, mask = prompts(SHARED)
    for mine, own in zip(generate(fast, ids, mask), generate(again, ids, mask), strict=True):
        assert torch.equal(mine, own)
    assert again.stats()["shared_prefix_tokens"] == SHARED == again.program.shared_prefix


def plan(model: Any, **workload: int) -> gw.Report:
    """What the planner chooses on a GPU that is not here."""
    return gw.plan(model, target="h100", workload=gw.Workload(**workload))


def test_the_planner_weighs_it_where_the_workload_promises_it(full: PackedModel) -> None:
    chosen = plan(full.model, batch=512, prompt=400, generate=50, shared_prefix=380)
    assert "share_prefix{tokens=380}" in chosen.plans[0]["passes"]
    whole = plan(full.model, batch=512, prompt=400, generate=50)
    assert not any("share_prefix" in d.pass_name for d in whole.decisions)
    saved = whole.predicted["memory"]["cache_bytes"] - chosen.predicted["memory"]["cache_bytes"]
    assert saved == 511 * 380 * 2 * 2 * 128 * 4
    assert chosen.predicted["decode"]["seconds_per_token"] < whole.predicted["decode"]["seconds_per_token"]
    assert chosen.predicted["prefill"]["seconds"] < whole.predicted["prefill"]["seconds"] / 4
    single = plan(full.model, batch=1, prompt=400, generate=50, shared_prefix=380)
    assert not any("share_prefix" in d.pass_name for d in single.decisions)


def test_timing_takes_the_prefix_that_was_promised() -> None:
    assert prefix_for(None, 8, 100) == prefix_for(0, 8, 100) == prefix_for(30, 1, 100) == 0
    assert prefix_for(30, 8, 100) == 30 and prefix_for(30, 8, 20) == 19
