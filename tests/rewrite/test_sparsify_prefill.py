"""Masks for prompts as a rewrite: the graph, its price, and the sites that are left alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from graphwright.cost_model.estimate import estimate
from graphwright.cost_model.graph_cost import graph_cost
from graphwright.cost_model.memory import step_workspace
from graphwright.cost_model.stores import default_stores
from graphwright.cost_model.target import resolve_target
from graphwright.cost_model.workload import Budget, Workload
from graphwright.ir.errors import BudgetError, MaskError, PassError
from graphwright.ir.graph import Graph, argument
from graphwright.ir.prefill_masks import parse_mask
from graphwright.ir.serialize import dumps, graph_from_json, graph_to_json
from graphwright.optimizer.planner import Request
from graphwright.optimizer.planner.planning import plan_best, plan_given
from graphwright.passes.base import SiteRecord, parse_pass
from graphwright.runtime.storage import PREFILL_CHUNK
from tests.rewrite.cached_programs import TARGET, WORKLOAD, program, rewrite

KV = "place_cache{cut=kv}"
MASK = "a_shape(block=16, sinks=16, recent=32)"
SPARSE = f"sparsify_prefill{{mask={MASK}}}"
LONG = Workload(prompt=8192, generate=256)


def said(records: list[SiteRecord], name: str) -> list[SiteRecord]:
    """What one pass said."""
    return [r for r in records if r.pass_string.startswith(name)]


def saved(graph: Graph) -> Graph:
    """As a plan keeps it and gives it back."""
    return graph_from_json(json.loads(dumps(graph_to_json(graph))), graph.parameters, torch.device("cpu"))


def test_every_attention_gets_the_mask(captured) -> None:
    before, _ = rewrite(captured("llama"), KV)
    graph, records = rewrite(captured("llama"), KV, SPARSE)
    expected = before.counts()
    expected["prefill_attention"] = expected.pop("cache_attention")
    assert graph.counts() == expected
    for old, new in zip(before.calls("cache_attention"), graph.calls("prefill_attention"), strict=True):
        assert argument(new, "mask") == MASK
        for name in ("q", "keys", "values", "positions", "tree"):
            assert argument(new, name).name == argument(old, name).name
        for name in ("scale", "window", "softcap"):
            assert argument(new, name) == argument(old, name)
    assert all(
        r.status == "applied" and f"under {MASK}" in r.reason for r in said(records, "sparsify_prefill")
    )
    again = parse_pass(SPARSE)(graph, WORKLOAD, TARGET, force=True)
    assert {r.status for r in again} == {"illegal"} and "already" in again[0].reason
    assert {argument(n, "mask") for n in saved(graph).calls("prefill_attention")} == {MASK}


def test_what_is_left_alone_says_why(captured) -> None:
    _, records = rewrite(captured("gemma2"), KV, SPARSE)
    found = {r.status: r.reason for r in said(records, "sparsify_prefill")}
    assert set(found) == {"applied", "illegal"} and "a window of 16 tokens" in found["illegal"]
    _, records = rewrite(captured("llama"), KV, "quantize_cache{codec=int,bits=4,page=32}", SPARSE)
    assert "packed" in said(records, "sparsify_prefill")[0].reason
    _, records = rewrite(captured("gpt2"), "place_cache{cut=minimum}", SPARSE)
    assert "computed from what is stored" in said(records, "sparsify_prefill")[0].reason
    _, records = rewrite(captured("llama"), KV, "chunk_prefill{tokens=64}", SPARSE)
    assert "steps of 64 tokens, which attend to everything" in said(records, "sparsify_prefill")[0].reason
    _, records = rewrite(captured("llama"), KV, SPARSE, "chunk_prefill{tokens=64}")
    assert said(records, "chunk_prefill")[0].status == "illegal"


def test_pages_of_short_steps_are_kept(captured) -> None:
    before, _ = rewrite(captured("llama"), KV, "sparsify_attention{keep=0.25}")
    graph, records = rewrite(captured("llama"), KV, "sparsify_attention{keep=0.25}", SPARSE)
    assert {r.status for r in said(records, "sparsify_prefill")} == {"applied"}
    for old, new in zip(before.calls("cache_attention"), graph.calls("prefill_attention"), strict=True):
        assert argument(new, "pages").name == argument(old, "pages").name
        assert (argument(new, "page"), argument(new, "first")) == (
            argument(old, "page"),
            argument(old, "first"),
        )
    place = {"batch": 1, "context": 4096, "tokens": 1}
    costs = [graph_cost(g).total.at(**place) for g in (before, graph)]
    assert costs[0].bytes_read == costs[1].bytes_read


@pytest.mark.parametrize(("tokens", "same"), [(1, True), (64, True), (65, False), (512, False)])
def test_only_long_steps_cost_less(tokens: int, same: bool, captured) -> None:
    mask = "a_shape(sinks=128, recent=256)"
    graphs = [rewrite(captured("llama"), KV, *p)[0] for p in ([], [f"sparsify_prefill{{mask={mask}}}"])]
    costs = [_attention(graph_cost(g)).at(batch=2, context=8192, tokens=tokens) for g in graphs]
    flops = [cost.total_flops for cost in costs]
    assert costs[0].bytes_read == costs[1].bytes_read
    assert (flops[0] == flops[1]) == same
    if not same:
        # Computed tokens over visible ones, times what FlexAttention takes longer for each here.
        assert flops[1] / flops[0] == pytest.approx(1.65 * 512 / (8192 + (tokens + 1) / 2), rel=0.01)


def _attention(cost: Any) -> Any:
    return cost.by_op["prefill_attention" if "prefill_attention" in cost.by_op else "cache_attention"]


def test_the_report_says_what_it_is_worth(captured) -> None:
    """On a CPU a mask that keeps half costs more than the dense kernel; one that keeps little costs less."""
    machine = resolve_target("cpu")
    notes = {}
    for mask in ("chunked(keep=0.9)", "chunked(keep=0.1)"):
        request = Request(machine, LONG, Budget(), 1 << 17)
        graph = captured("llama").canonical.copy()
        planned = plan_given(graph, [KV, "compile_layers", f"sparsify_prefill{{mask={mask}}}"], request)
        found = next(d for d in planned.decisions if d.pass_name.startswith("sparsify_prefill"))
        assert found.fidelity == "lossy"
        assert "attention of a prompt of 8,192 tokens takes" in found.reason
        notes[mask] = (found.predicted["seconds_per_token"], planned.predicted["prefill"]["seconds"])
        assert planned.predicted["decode"] is not None
    base = plan_given(captured("llama").canonical.copy(), [KV, "compile_layers"], request)
    (more, longer), (less, shorter) = notes["chunked(keep=0.9)"], notes["chunked(keep=0.1)"]
    assert more > 0 > less
    assert shorter < base.predicted["prefill"]["seconds"] < longer


def test_by_itself_it_applies_only_where_it_pays(captured) -> None:
    machine = resolve_target("cpu")
    for keep, status in ((0.9, "unprofitable"), (0.1, "applied")):
        graph, _ = rewrite(captured("llama"), KV)
        chosen = parse_pass(f"sparsify_prefill{{mask=chunked(keep={keep})}}")
        assert {r.status for r in chosen(graph, LONG, machine)} == {status}
    assert type(chosen).variants() == []
    request = Request(machine, LONG, Budget(kl=1.0), 1 << 17, must_fit=False)
    chosen_by_planner = plan_best(captured("llama").canonical, request).plan.passes
    assert not any("prefill" in name for name in chosen_by_planner)


@pytest.mark.parametrize("text", ["chunked(keep=2)", "a_shape(recent=100)", "unknown"])
def test_masks_that_do_not_parse_are_refused(text: str) -> None:
    with pytest.raises(MaskError):
        parse_pass(f"sparsify_prefill{{mask={text}}}")


def test_it_prints_as_it_parses() -> None:
    text = "sparsify_prefill{mask=chunked(chunk=256, keep=0.5)}"
    assert str(parse_pass(text)) == text
    assert parse_mask(parse_pass(text).mask).keep == 0.5  # type: ignore[attr-defined]


# --- smaller steps -------------------------------------------------------------------------------


def test_smaller_steps_take_the_workspace_that_was_predicted(captured) -> None:
    graph, records = rewrite(captured("llama"), KV, "chunk_prefill{tokens=128}")
    assert graph.annotations["prefill_chunk"] == 128
    assert said(records, "chunk_prefill")[0].status == "applied"
    before, _ = rewrite(captured("llama"), KV)
    found = [
        estimate(g, resolve_target("h100"), Workload(prompt=4096))["memory"]["workspace_bytes"]
        for g in (before, graph)
    ]
    expected = step_workspace(graph, default_stores(graph), 128).bytes(1, 4096 + 256)
    assert found[1] == expected < found[0]
    runs = program(captured("llama").model, graph)
    assert runs.lowered.prefill_chunk == 128 and runs._chunk == 128
    assert program(captured("llama").model, before)._chunk == PREFILL_CHUNK
    assert saved(graph).annotations["prefill_chunk"] == 128


def test_auto_takes_the_largest_step_that_fits(captured) -> None:
    graph, _ = rewrite(captured("llama"), KV)
    whole = estimate(graph, TARGET, WORKLOAD)["memory"]
    auto = parse_pass("chunk_prefill")
    sizes = {}
    for tokens in (512, 208, 64):
        step = step_workspace(graph, default_stores(graph), tokens).bytes(1, WORKLOAD.capacity)
        limit = whole["weights_bytes"] + whole["cache_bytes"] + step
        chosen = auto.resolve(graph, WORKLOAD, TARGET, limit)
        sizes[tokens] = chosen.tokens  # type: ignore[attr-defined]
        smaller = auto.resolve(graph, WORKLOAD, TARGET, limit - 1)
        assert smaller.size == max(64, tokens - 16)  # type: ignore[attr-defined]
    assert sizes == {512: "512", 208: "208", 64: "64"}
    assert str(auto) == "chunk_prefill" and str(chosen) == "chunk_prefill{tokens=64}"


def test_a_budget_that_whole_steps_exceed_is_met_in_smaller_ones(captured) -> None:
    graph = captured("llama").canonical
    roomy = plan_given(graph.copy(), [KV], Request(TARGET, WORKLOAD, Budget(), 2048))
    memory = roomy.predicted["memory"]
    few = step_workspace(roomy.graph, default_stores(roomy.graph), 96).bytes(1, WORKLOAD.capacity)
    limit = memory["weights_bytes"] + memory["cache_bytes"] + few
    request = Request(TARGET, WORKLOAD, Budget(memory=limit), 2048)
    planned = plan_given(graph.copy(), [KV, "chunk_prefill"], request)
    assert planned.plan.passes == (KV, "chunk_prefill{tokens=96}")
    assert planned.predicted["memory"]["fits"] and not memory["total_bytes"] <= limit
    found = plan_best(graph, request)
    assert "chunk_prefill{tokens=64}" in found.plan.passes and found.predicted["memory"]["fits"]
    assert found.graph.annotations["prefill_chunk"] == 64
    assert all("chunk_prefill{tokens=64}" in other.passes for other in found.others)
    assert next(d for d in found.decisions if d.pass_name.startswith("chunk")).status == "applied"
    little = Request(TARGET, WORKLOAD, Budget(memory=limit // 2), 2048)
    with pytest.raises(BudgetError, match="memory"):
        plan_best(graph, little)


@pytest.mark.parametrize("tokens", ["63", "100", "528", "0", "many"])
def test_steps_of_no_such_size_are_refused(tokens: str) -> None:
    with pytest.raises(PassError, match="multiple of 16 from 64 to 512"):
        parse_pass(f"chunk_prefill{{tokens={tokens}}}")
