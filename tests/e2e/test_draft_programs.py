"""Draft programs: the target's graph after more passes, over the same cache and the same weights."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import graphwright as gw
from graphwright.cost_model.graph_cost import graph_cost
from graphwright.cost_model.prediction import predict
from graphwright.cost_model.target import resolve_target
from graphwright.cost_model.workload import Workload
from graphwright.ir.errors import InputError, PassError
from graphwright.ir.graph import Graph
from graphwright.optimizer.build import op_by_op
from graphwright.optimizer.draft_program import draft_graph
from graphwright.runtime.lowering import LoweringOptions, Made, lower
from graphwright.runtime.model import OptimizedModel
from graphwright.runtime.program import Program
from graphwright.runtime.speculation import Speculation, make_drafter, make_speculation, parse_drafter
from tests.architectures import VOCAB, tiny_model
from tests.e2e.graph_stand_in import RecordedGraphs
from tests.e2e.packed_programs import PackedModel, random_text
from tests.e2e.test_speculation_exact import chi_square_p

NEW, PAGE = 12, 8
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
KV = "place_cache{cut=kv}"
HALVES = f"quantize_cache{{codec=quantspec,page={PAGE},recent=4}}"
INT8 = f"quantize_cache{{codec=int,bits=8,page={PAGE},first=3,recent=4}}"
FEW = f"keep=0.05,page={PAGE},recent=10"
#: What drafts, over what.
DRAFTS = {
    "recent": ((KV,), f"sparse({FEW})"),
    "mean": ((KV,), f"sparse(selector=mean,{FEW})"),
    "bounds": ((KV,), f"sparse(selector=bounds,{FEW})"),
    "packed": ((KV, INT8), "sparse(selector=mean,keep=0.05,recent=10)"),
    "quantspec": ((KV, HALVES), "quantspec"),
}
LENGTHS = (60, 41, 64, 33, 50, 57, 62, 38)
RAGGED = tuple(range(8))


@cache
def model(name: str, dtype: torch.dtype = torch.float32) -> PackedModel:
    """A tiny model whose attention matters: what a draft leaves out changes its tokens."""
    stock = tiny_model(name, dtype)
    with torch.no_grad():
        for parameter in stock.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return PackedModel(stock)


def rewritten(
    name: str, passes: Sequence[str], drafter: str = "", dtype: torch.dtype = torch.float32
) -> Graph:
    """The target's graph, which drafts with ``drafter``."""
    drafts = [f"speculate{{drafter={drafter}}}"] if drafter else []
    return model(name, dtype).rewrite([*passes, *drafts])[0]


@cache
def lowered(
    name: str, passes: tuple[str, ...], drafter: str = "", dtype: torch.dtype = torch.float32
) -> Program:
    """What it is as a program, op by op."""
    return op_by_op(model(name, dtype).model, rewritten(name, passes, drafter, dtype))


def program(
    name: str,
    passes: tuple[str, ...],
    drafter: str = "",
    *,
    tree: str = "chain",
    tokens: int = 4,
    dtype: torch.dtype = torch.float32,
) -> OptimizedModel:
    """The program as users see it."""
    own, chosen = model(name, dtype).model, {"drafter": drafter, "tree": tree, "tokens": tokens}
    return OptimizedModel(
        lowered(name, passes, drafter, dtype),
        config=own.config,
        generation_config=own.generation_config,
        speculation=make_speculation(chosen) if drafter else None,
    )


def new_tokens(fast: OptimizedModel, rows: Sequence[int], **options: Any) -> torch.Tensor:
    """What follows ragged prompts, ``[B, NEW]``."""
    longest = max(LENGTHS[row] for row in rows)
    ids, mask = torch.zeros((2, len(rows), longest), dtype=torch.int64)
    for place, row in enumerate(rows):
        ids[place, -LENGTHS[row] :] = random_text(1, LENGTHS[row], seed=row)[0]
        mask[place, -LENGTHS[row] :] = 1
    return fast.generate(ids, attention_mask=mask, **{**OPTIONS, **options})[:, longest:]


@cache
def plain_tokens(
    name: str, passes: tuple[str, ...], rows: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """What the target writes without drafts."""
    return new_tokens(program(name, passes, dtype=dtype), rows)


# --- what is generated ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "tree"),
    [((0,), "greedy"), (RAGGED, "chain"), (RAGGED, "greedy")],
    ids=["one", "ragged", "trees"],
)
@pytest.mark.parametrize("drafts", DRAFTS)
def test_greedy_tokens_are_the_target_s(drafts: str, rows: tuple[int, ...], tree: str) -> None:
    passes, drafter = DRAFTS[drafts]
    fast = program("llama", passes, drafter, tree=tree)
    assert torch.equal(new_tokens(fast, rows), plain_tokens("llama", passes, rows, torch.float32))
    stats = fast.stats()["last"]
    assert stats["draft_tokens"] > 0
    if len(rows) > 1:
        assert 0 < stats["accepted"] < stats["draft_tokens"]


@pytest.mark.parametrize("drafts", ["mean", "quantspec"])
def test_windows_and_bfloat16(drafts: str) -> None:
    """A layer with a window is read whole; another dtype changes nothing."""
    passes, drafter = DRAFTS[drafts]
    for name, dtype in (("gemma2", torch.float32), ("llama", torch.bfloat16)):
        fast = program(name, passes, drafter, dtype=dtype)
        want = plain_tokens(name, passes, RAGGED, dtype)
        assert torch.equal(new_tokens(fast, RAGGED), want)


@pytest.mark.parametrize("tree", ["chain", "greedy"])
def test_a_draft_that_reads_everything_is_always_right(tree: str) -> None:
    fast = program("llama", (KV,), f"sparse(selector=bounds,keep=1.0,page={PAGE})", tree=tree)
    new_tokens(fast, RAGGED)
    stats = fast.stats()["last"]
    assert stats["row_steps"] <= 8 * NEW / 2
    if tree == "chain":
        assert 0 < stats["accepted"] == stats["draft_tokens"]


def test_sampling_keeps_the_distribution() -> None:
    """Of three tokens, two likely ones each: eight cells."""
    fast = program("llama", (KV,), f"sparse({FEW})", tokens=2)
    prompt, rows = random_text(1, 40, seed=3), 800
    law = torch.zeros(8, dtype=torch.float64)
    kept: dict[tuple[int, ...], int] = {}
    for cell, path in enumerate(itertools.product((0, 1), repeat=3)):
        text, chance = prompt, 1.0
        for rank in path:
            best = fast.score(text)[0, -1].topk(2)
            chance *= float(best.values.softmax(0)[rank])
            text = torch.cat((text, best.indices[rank].view(1, 1)), 1)
        law[cell] = chance
        kept[tuple(text[0, 40:].tolist())] = cell
    torch.manual_seed(5)
    ids = prompt.expand(rows, -1)
    drawn = fast.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **{**OPTIONS, "do_sample": True, "max_new_tokens": 3},
        top_k=2,
    )[:, 40:]
    counts = torch.bincount(torch.tensor([kept[tuple(row)] for row in drawn.tolist()]), minlength=8)
    stats = fast.stats()["last"]
    assert 0 < stats["accepted"] < stats["draft_tokens"]
    assert chi_square_p(counts, law) > 1e-3


# --- what the draft program is -------------------------------------------------------------------


def prompted(target: Program, text: torch.Tensor) -> Any:
    """A state that holds 66 and 50 tokens of two rows."""
    state = target.allocate(2, 80)
    target.prefill(state, text[:, :66], torch.tensor([66, 50]))
    return state


@pytest.mark.parametrize("drafts", ["recent", "mean", "packed", "quantspec"])
def test_a_draft_step_is_one_of_the_cheaper_program(drafts: str) -> None:
    """The same logits as if the passes had made the target; and others than the target's."""
    passes, drafter = DRAFTS[drafts]
    text = random_text(2, 70)
    target = lowered("llama", passes, drafter)
    cheaper = lowered("llama", (*passes, *parse_drafter(drafter).draft_passes()))
    assert target.draft is not None and cheaper.draft is None
    step = (text[:, 66:].contiguous(), torch.tensor([4, 4]))
    drafted = target.draft.step(prompted(target, text), *step)
    torch.testing.assert_close(drafted, cheaper.step(prompted(cheaper, text), *step))
    assert (drafted - target.step(prompted(target, text), *step)).abs().max() > 1e-3


@pytest.mark.parametrize("drafts", ["mean", "quantspec"])
def test_weights_are_held_once(drafts: str) -> None:
    """Matrices that lowering lays out anew are made for the target, and the draft program reads them."""
    passes, drafter = DRAFTS[drafts]
    target = lowered("gpt2", passes, drafter)
    assert target.draft is not None
    held, read = (
        {t.untyped_storage().data_ptr() for t in program.lowered.slots if t is not None}
        for program in (target, target.draft)
    )
    assert read == held
    assert target.prepared_bytes == target.lowered.prepared_bytes > 0


def test_pieces_of_one_structure_are_made_once() -> None:
    """A layer that the draft's passes leave alone is not compiled again."""
    passes, drafter = DRAFTS["mean"][0], "sparse(selector=mean)"
    graph = rewritten("gemma2", passes, drafter)
    draft = draft_graph(graph)
    assert draft is not None
    made = Made()
    steps = [
        lower(g, torch.device("cpu"), LoweringOptions(compile=False), made=made) for g in (graph, draft.graph)
    ]
    own, other = ([call for call, _, _ in step.calls] for step in steps)
    assert sum(call in own for call in other) == len(other) - 1  # one layer of two has no window


def test_only_summaries_are_stored_besides() -> None:
    drafter = f"sparse(selector=bounds,page={PAGE})"
    graph = rewritten("llama", (KV,), drafter)
    target, alone = lowered("llama", (KV,), drafter), lowered("llama", (KV,))
    more = target.allocate(3, 100).nbytes() - alone.allocate(3, 100).nbytes()
    draft = draft_graph(graph)
    assert draft is not None
    assert more == draft.memory_bytes(graph, Workload(batch=3, prompt=60, generate=40))
    assert more == 3 * 13 * 2 * 2 * 16 * 2 * 4  # pages, layers, heads of 16, two extremes, float32
    state = target.allocate(3, 100)
    assert target.cache_parts()["summaries"] == more and state.room() == [32] * 3
    halves = lowered("llama", (KV, HALVES), "quantspec")
    assert halves.allocate(3, 100).nbytes() == lowered("llama", (KV, HALVES)).allocate(3, 100).nbytes()


def test_both_programs_are_recorded_over_one_state() -> None:
    passes, drafter = DRAFTS["mean"]
    fast = program("llama", passes, drafter)
    plain = fast.program
    assert isinstance(plain, Program) and plain.draft is not None
    recorder = RecordedGraphs()
    fast.program = Program(
        plain.lowered, config=plain.config, device=plain.device, dtype=plain.dtype, vocab_size=VOCAB,
        max_positions=plain.max_positions, graphs=recorder, draft=plain.draft.lowered,
    )  # fmt: skip
    for _ in range(2):
        assert torch.equal(new_tokens(fast, (0, 1)), plain_tokens("llama", passes, (0, 1), torch.float32))
    assert recorder.replays > 2 * NEW


# --- around it -----------------------------------------------------------------------------------


def test_plans_report_and_keep_their_draft_program(tmp_path: Path) -> None:
    lab, ids = model("llama"), random_text(2, 40)
    passes = [*DRAFTS["mean"][0], f"speculate{{drafter={DRAFTS['mean'][1]},tokens=4,acceptance=0.8}}"]
    workload = Workload(prompt=40, generate=8)
    fast = gw.optimize(lab.model, "cpu", passes=passes, workload=workload)
    (decision,) = (d for d in fast.report.decisions if d.pass_name == passes[-1])
    assert (
        "the draft program is the target's after sparsify_attention{selector=mean,keep=0.05"
        in decision.reason
    )
    assert decision.predicted is not None and decision.predicted["memory_bytes"] > 0
    predicted = fast.report.predicted["speculation"]
    drafting = predicted["cycle_seconds"] - predicted["verify_seconds"]
    assert drafting > 2 * predicted["decode_seconds"]  # four steps of the draft program
    saved = predicted["seconds_per_token"] - predicted["decode_seconds"]
    assert decision.predicted["seconds_per_token"] == pytest.approx(saved)

    fast.save(tmp_path / "plan")
    again = gw.load(tmp_path / "plan", lab.model)
    mask = torch.ones_like(ids)
    want = fast.generate(ids, attention_mask=mask, **OPTIONS)
    assert torch.equal(again.generate(ids, attention_mask=mask, **OPTIONS), want)
    assert again.stats()["last"]["accepted"] == fast.stats()["last"]["accepted"] > 0


def test_long_contexts_are_where_it_pays() -> None:
    """A draft that reads a sixteenth of the cache costs less the more there is of it."""
    graph = rewritten("llama", (KV,), "sparse")
    target = resolve_target("h100")
    ratios = []
    for prompt in (512, 1_000_000):
        draft, workload = draft_graph(graph), Workload(batch=8, prompt=prompt, generate=1)
        assert draft is not None
        dense = graph_cost(graph)
        step = predict(dense, target, batch=8, context=workload.mean_context, tokens=1).seconds
        ratios.append(draft.seconds(4, workload, target) / (4 * step))
    assert ratios[1] < 0.4 < ratios[0]


@pytest.mark.parametrize(
    ("name", "passes", "drafter", "why"),
    [
        ("llama", (KV,), "quantspec", r"quantize_cache\{codec=quantspec\}"),
        ("llama", (KV, INT8), "quantspec", "has no upper half"),
        ("llama", (KV, INT8), "sparse(page=32)", "packed in pages of 8 tokens"),
        ("llama", (KV, "sparsify_attention"), "sparse", "selected already"),
        ("llama", (KV, "evict_tokens{method=recent,tokens=48}"), "sparse", "cannot apply"),
        ("llama", ("place_cache{cut=pre_rotary}",), "sparse", "computed from what is stored"),
    ],
)
def test_what_has_no_draft_program_says_why(
    name: str, passes: tuple[str, ...], drafter: str, why: str
) -> None:
    graph = rewritten(name, passes, drafter)
    with pytest.raises(PassError, match=why) as error:
        op_by_op(model(name).model, graph)
    assert error.value.where and error.value.hint


def test_a_draft_may_not_read_what_nobody_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = rewritten("llama", (KV,), "sparse")
    kind = type(make_drafter("sparse"))
    monkeypatch.setattr(
        kind, "draft_passes", lambda self: (f"sparsify_attention{{selector=sentences,page={PAGE}}}",)
    )
    with pytest.raises(PassError, match="reads tokens, which steps of the target do not write"):
        draft_graph(graph)


@pytest.mark.parametrize("selector", ["channels", "sentences"])
def test_selectors_that_need_text_are_refused(selector: str) -> None:
    with pytest.raises(InputError, match=selector):
        make_drafter("sparse", selector=selector)


def test_another_programs_drafter_is_refused() -> None:
    passes, drafter = DRAFTS["mean"]
    fast = program("llama", passes, drafter)
    for speculation in (Speculation(make_drafter("sparse")), Speculation(make_drafter("quantspec"))):
        fast.speculation = speculation
        with pytest.raises(InputError, match=r"one that sparsify_attention\{selector=mean"):
            new_tokens(fast, (0,))
    fast = program("llama", passes)
    fast.speculation = Speculation(make_drafter("sparse"))
    with pytest.raises(InputError, match="this program has none"):
        new_tokens(fast, (0,))
