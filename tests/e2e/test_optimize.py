"""``optimize`` and ``plan`` as a caller meets them: choices, refusals, reports."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import graphwright as gw
from graphwright.cost_model.target import resolve_target
from graphwright.ir.errors import (
    BudgetError,
    InputError,
    PassError,
    UnknownTargetError,
    UnsupportedModelError,
)
from graphwright.optimizer.report import Status
from tests.architectures import tiny_config, tiny_model


@pytest.fixture(scope="module")
def llama() -> Any:
    """A tiny stock Llama."""
    return tiny_model("llama")


@pytest.fixture(scope="module")
def chosen(llama: Any) -> gw.OptimizedModel:
    """What the planner makes of it."""
    return gw.optimize(llama, "cpu", workload=gw.Workload(prompt=32, generate=16))


def test_the_planner_places_and_compiles(chosen: gw.OptimizedModel) -> None:
    """Keys and values for grouped heads, compiled layers, and every decision in the report."""
    assert chosen.plan.passes[:2] == ("place_cache{cut=kv}", "compile_layers")
    placed = [d for d in chosen.report.decisions if d.pass_name == "place_cache{cut=kv}"]
    assert [d.status for d in placed] == [Status.APPLIED, Status.APPLIED]
    assert all("keys and values" in d.reason for d in placed)
    assert any(d.pass_name.startswith("speculate") for d in chosen.report.decisions)
    assert [k["op"] for k in chosen.report.kernels].count("append_attention") == 2


def test_predicted_stands_beside_measured(chosen: gw.OptimizedModel) -> None:
    """Time and memory, predicted and measured, and the quality against stock."""
    report = chosen.report
    assert report.predicted["decode"]["seconds_per_token"] > 0
    assert report.measured["decode"]["seconds_per_token"] > 0
    assert report.measured["stock"]["seconds_per_token"] > 0
    assert report.measured["quality"]["top1_agreement"] == 1.0
    assert report.predicted["memory"]["weights_bytes"] == chosen.memory()["weights"]
    assert gw.Report.from_json(report.to_json()).to_json() == report.to_json()


def test_code_before_and_after_is_runnable_python(chosen: gw.OptimizedModel) -> None:
    """The captured graph and the rewritten one print as Python."""
    for code in (chosen.report.code_before, chosen.report.code_after):
        compile(code, "graph", "exec")
    assert "attention" in chosen.report.code_before
    assert "cache_attention" in chosen.report.code_after


@pytest.mark.parametrize(
    ("passes", "words"),
    [
        (["fly"], "no pass named"),
        (["place_cache{cut=fly}"], "no cut"),
        (["place_cache{depth=3}"], "no option"),
        (["speculate{drafter=ngram}"], "needs cache"),
        (["place_cache{cut=kv}", "absorb_projections"], "cannot apply"),
    ],
)
def test_passes_that_cannot_apply_raise(llama: Any, passes: list[str], words: str) -> None:
    """A pass that was asked for by name never fails silently."""
    with pytest.raises(PassError, match=words):
        gw.optimize(llama, "cpu", passes=passes)


def test_an_unknown_drafter_is_refused(llama: Any) -> None:
    """Before anything runs, with the drafters that exist."""
    with pytest.raises(gw.GraphwrightError, match="crystal"):
        gw.optimize(llama, "cpu", passes=["place_cache", "speculate{drafter=crystal}"])


def test_an_unknown_target_names_the_nearest(llama: Any) -> None:
    """``h10`` is probably an H100."""
    with pytest.raises(UnknownTargetError, match="h100"):
        gw.optimize(llama, "h10")


def test_a_budget_that_no_plan_meets(llama: Any) -> None:
    """Too little memory, too little time: the closest plan is named."""
    with pytest.raises(BudgetError, match="closest plan"):
        gw.optimize(llama, "cpu", budget=gw.Budget(memory="1KiB"))
    with pytest.raises(BudgetError, match="closest plan"):
        gw.optimize(llama, "cpu", budget=gw.Budget(latency=1e-12))


def test_a_target_that_is_not_here_is_in_the_report(llama: Any) -> None:
    """The program runs where the model is, and the report says so."""
    fast = gw.optimize(llama, "h100", passes=["place_cache"])
    fallbacks = fast.report.by_status(Status.FALLBACK)
    assert any("planned for h100" in d.reason for d in fallbacks)


def test_a_target_of_ones_own(llama: Any) -> None:
    """A ``Target`` object need not be in the catalog."""
    mine = dataclasses.replace(resolve_target("h100"), name="my-card")
    fast = gw.optimize(llama, mine, passes=["place_cache"])
    assert fast.plan.target == "my-card"
    assert any("planned for my-card" in d.reason for d in fast.report.by_status(Status.FALLBACK))


def test_plan_needs_no_weights(tmp_path: Path) -> None:
    """From a configuration, its file or a model on meta: the same prediction, in the same report."""
    config = tiny_config("qwen2")
    report = gw.plan(config, "h100", workload=gw.Workload(prompt=64, generate=32))
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    from_file = gw.plan(tmp_path / "config.json", "h100", workload=gw.Workload(prompt=64, generate=32))
    assert report.predicted == from_file.predicted
    assert report.predicted["decode"]["tokens_per_second"] > 0
    assert report.predicted["memory"]["fits"]
    assert report.measured.keys() == {"seconds"}


def test_plan_answers_whether_it_fits() -> None:
    """Without a budget, too little memory is an answer; with one, it is an error."""
    config = tiny_config("llama", max_position_embeddings=1 << 30)
    workload = gw.Workload(batch=64, prompt=1 << 28, generate=32)
    memory = gw.plan(config, "h100", workload=workload).predicted["memory"]
    assert not memory["fits"]
    assert memory["largest_batch"] < 64
    with pytest.raises(BudgetError, match="closest plan"):
        gw.plan(config, "h100", workload=workload, budget=gw.Budget(memory="80GiB"))


def test_plan_refuses_what_is_no_decoder(tmp_path: Path) -> None:
    """A path without a configuration, and an object that is none."""
    with pytest.raises(InputError, match="no such file"):
        gw.plan(tmp_path / "missing.json", "h100")
    with pytest.raises(InputError, match="cannot plan"):
        gw.plan(3, "h100")  # type: ignore[arg-type]


def test_a_model_without_weights_is_refused() -> None:
    """``optimize`` on meta points at ``plan``."""
    with pytest.raises(UnsupportedModelError, match="meta"):
        gw.optimize(tiny_model("llama", device="meta"), "cpu")


def test_the_workload_changes_what_is_stored() -> None:
    """Multi-head attention: keys and values while they fit, the layer input when memory is short."""
    config = tiny_config("gpt2", layers=8)
    roomy = gw.plan(config, "h100", workload=gw.Workload(batch=1, prompt=64, generate=32))
    assert any(d.pass_name == "place_cache{cut=kv}" and d.status is Status.APPLIED for d in roomy.decisions)
    large = gw.Workload(batch=64, prompt=128, generate=64)
    full = gw.plan(config, "h100", workload=large).predicted["memory"]
    tight = gw.Budget(memory=int(full["total_bytes"] - full["cache_bytes"] // 4))
    short = gw.plan(config, "h100", workload=large, budget=tight)
    applied = {d.pass_name for d in short.decisions if d.status is Status.APPLIED}
    assert any(name.startswith("place_cache{cut=minimum") for name in applied)
    assert short.predicted["memory"]["fits"]


def test_latent_attention_is_cached_compressed() -> None:
    """DeepSeek-V3: the latent and the rotary part, with the projections absorbed, match stock."""
    model = tiny_model("deepseek_v3")
    fast = gw.optimize(model, "cpu", passes=["place_cache{cut=minimum}", "absorb_projections"])
    rank = model.config.kv_lora_rank + model.config.qk_rope_head_dim
    state = fast.program.allocate(1, 10)
    assert state.nbytes() == model.config.num_hidden_layers * 10 * rank * 4
    ids = torch.randint(3, 60, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(fast.score(ids, step=7), expected, atol=1e-5, rtol=1e-4)


def test_a_slower_program_is_undone_and_said(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """When measured slower than stock, compiled layers give way to plain ones, and the report says so."""
    from graphwright.optimizer import check

    def seconds(program: Any, workload: Any) -> dict[str, float]:
        took = 3.0 if program.lowered.compiled else 2.0
        return {"seconds_per_token": took, "tokens_per_second": 1 / took, "context": 8.0, "cache_bytes": 0.0}

    monkeypatch.setattr(check, "measure_decode", seconds)
    monkeypatch.setattr(
        check, "measure_stock", lambda *_: {"seconds_per_token": 1.0, "tokens_per_second": 1.0}
    )
    fast = gw.optimize(llama, "cpu", passes=["place_cache", "compile_layers"])
    assert not fast.program.lowered.compiled
    assert [d.pass_name for d in fast.report.by_status(Status.UNDONE)] == ["compile_layers"]
    assert any("2.00 times" in d.reason for d in fast.report.by_status(Status.FALLBACK))


def test_names_of_the_catalog() -> None:
    """One line each."""
    for listing in (gw.targets(), gw.passes(), gw.drafters(), gw.codecs(), gw.selectors()):
        assert listing
        assert all(line for line in listing.values())
    assert {"cpu", "a100", "h100", "h200"} <= gw.targets().keys()
    assert {"place_cache", "absorb_projections", "speculate", "compile_layers"} <= gw.passes().keys()
