"""Check and undo: what a clock that tests set says about a plan, its rivals and its drafts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import graphwright as gw
from graphwright.ir.errors import VerificationError
from graphwright.optimizer import build, check, drafting, settle, settle_drafts
from graphwright.optimizer.draft_program import speculation_of
from graphwright.optimizer.drafting import Tried, try_drafts
from graphwright.optimizer.planner import Candidate, menu
from graphwright.optimizer.report import Decision, Status
from graphwright.passes import base
from graphwright.passes.base import registered_passes
from graphwright.passes.compile_layers import CompileLayers
from graphwright.passes.place_cache import PlaceCache
from graphwright.passes.speculate import Speculate
from graphwright.runtime.lowering import LoweringOptions
from tests.architectures import POSITIONS, VOCAB, tiny_model
from tests.quality.rounded_cache import RoundCache

WORKLOAD = gw.Workload(prompt=64, generate=16)
KV, MINIMUM = "place_cache{cut=kv}", "place_cache{cut=minimum}"
ASSUMED = "speculate{drafter=ngram"
#: Longer than any prediction for a tiny model, so that rivals look better; and shorter.
SLOW, QUICK = 1.0, 1e-9


@dataclass
class Clock:
    """What every measurement of a step says.

    Attributes:
        plain: seconds of a step of one token, by what the program stores.
        verify: seconds of a step of several, as a multiple of that of one.
        asked: the programs that were timed, with the tokens of the step.
    """

    plain: dict[str, float] = field(default_factory=lambda: {KV: SLOW, MINIMUM: SLOW})
    verify: float = 1.0
    asked: list[tuple[str, int]] = field(default_factory=list)

    def measure(self, program: Any, workload: gw.Workload, tokens: int = 1) -> dict[str, float]:
        """In the place of ``check.measure_decode``."""
        stored = {8 * 128 * 4: KV, 8 * 64 * 4: MINIMUM}[program.allocate(1, 8).nbytes()]
        self.asked.append((stored, tokens))
        took = self.plain[stored] * (self.verify if tokens > 1 else 1)
        return {"seconds_per_token": took, "tokens_per_second": 1 / took, "context": 8.0, "cache_bytes": 0.0}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock; stock is slower than all programs."""
    found = Clock()
    monkeypatch.setattr(check, "measure_decode", found.measure)
    stock = {"seconds_per_token": 100.0, "tokens_per_second": 0.01}
    monkeypatch.setattr(check, "measure_stock", lambda *_: dict(stock))
    return found


@pytest.fixture(autouse=True)
def _few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled here: that takes long, and a clock decides all the same. Runners-up are enough."""
    monkeypatch.setattr(menu, "front", lambda *_: [])
    known = (PlaceCache, Speculate, RoundCache)
    monkeypatch.setattr(base, "_REGISTRY", {cls.name: cls for cls in known})


@pytest.fixture(scope="module")
def gpt2() -> Any:
    """Multi-head attention: keys and values, or half as much."""
    return tiny_model("gpt2", layers=1)


def optimize(model: Any, calibration: Any = None) -> gw.OptimizedModel:
    return gw.optimize(model, "cpu", workload=WORKLOAD, calibration=calibration)


def decisions(fast: gw.OptimizedModel, status: Status, name: str = "") -> list[Decision]:
    return [d for d in fast.report.by_status(status) if d.pass_name.startswith(name)]


def plans(fast: gw.OptimizedModel, status: str) -> list[dict[str, Any]]:
    return [plan for plan in fast.report.plans if plan["status"] == status]


def seconds(plan: dict[str, Any]) -> float | None:
    return plan["measured"] and plan["measured"]["seconds_per_token"]


# --- rivals --------------------------------------------------------------------------------------


@pytest.fixture
def no_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the placement of the cache is to be chosen."""
    monkeypatch.setattr(base, "_REGISTRY", {PlaceCache.name: PlaceCache})


def test_a_rival_that_measures_faster_takes_the_plans_place(gpt2: Any, clock: Clock, no_drafts: None) -> None:
    clock.plain[MINIMUM] = 0.5 * SLOW
    fast = optimize(gpt2)
    assert fast.plan.passes == (MINIMUM,)
    assert len(fast.graph.placeholders("state")) == 1  # the layer's input, not keys and values
    assert [d.pass_name for d in decisions(fast, Status.UNDONE)] == [KV]
    undone = decisions(fast, Status.UNDONE)[0]
    assert undone.measured == {"seconds_per_token": 0.5 * SLOW}
    assert "1 s a step with it, 500 ms a step with place_cache{cut=minimum}" in undone.reason
    applied = decisions(fast, Status.APPLIED)
    assert {d.pass_name for d in applied} == {MINIMUM}
    assert [d.measured for d in applied if not d.site] == [{"seconds_per_token": -0.5 * SLOW}]
    assert sum(1 for d in applied if d.site) == 1  # and what it does in the layer
    assert not [d for d in decisions(fast, Status.UNPROFITABLE) if d.pass_name == MINIMUM]

    # The table of plans shows both.
    chosen, slower = plans(fast, "chosen"), plans(fast, "undone")
    assert [plan["passes"] for plan in chosen] == [[MINIMUM]]
    assert [plan["passes"] for plan in slower] == [[KV]]
    assert seconds(chosen[0]) == 0.5 * SLOW and seconds(slower[0]) == SLOW
    assert "measured slower" in slower[0]["reason"] and "measured faster" in chosen[0]["reason"]
    passes = [tuple(plan["passes"]) for plan in fast.report.plans]
    assert len(set(passes)) == len(passes)
    assert fast.report.measured["speedup"]["ratio"] == pytest.approx(100.0 / 0.5)
    assert fast.report.measured["quality"]["top1_agreement"] == 1.0


def test_the_rival_that_stays_is_compared_with_stock(
    gpt2: Any, clock: Clock, no_drafts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rewrite is never kept for its speed alone."""
    clock.plain[MINIMUM] = 0.5 * SLOW
    stored: list[int] = []
    compare = check.compare_logits

    def worse_and_worse(model: Any, program: Any, ids: torch.Tensor) -> dict[str, float]:
        stored.append(program.allocate(1, 8).nbytes())
        return compare(model, program, ids) | {"relative_logit_difference": len(stored) - 1.0}

    monkeypatch.setattr(check, "compare_logits", worse_and_worse)
    with pytest.raises(VerificationError, match="differ from the stock model's"):
        optimize(gpt2)
    assert stored == [8 * 128 * 4, 8 * 64 * 4]


def test_a_rival_that_measures_slower_stays_a_rival(gpt2: Any, clock: Clock, no_drafts: None) -> None:
    clock.plain[MINIMUM] = 2 * SLOW
    fast = optimize(gpt2)
    assert fast.plan.passes == (KV,)
    assert (MINIMUM, 1) in clock.asked
    assert not decisions(fast, Status.UNDONE) and not plans(fast, "undone")
    others = {tuple(plan["passes"]): seconds(plan) for plan in plans(fast, "runner-up")}
    assert others[(MINIMUM,)] == 2 * SLOW


def test_what_cannot_win_is_not_built(gpt2: Any, clock: Clock, no_drafts: None) -> None:
    """The program is as fast as predicted or faster: no other prediction promises more."""
    clock.plain = {KV: QUICK, MINIMUM: QUICK / 10}
    fast = optimize(gpt2)
    assert fast.plan.passes == (KV,)
    assert clock.asked == [(KV, 1)]
    assert plans(fast, "runner-up") and all(seconds(plan) is None for plan in plans(fast, "runner-up"))


@pytest.mark.parametrize(("share", "kept"), [(0.98, KV), (0.96, MINIMUM)])
def test_noise_decides_nothing(gpt2: Any, clock: Clock, no_drafts: None, share: float, kept: str) -> None:
    clock.plain[MINIMUM] = share * SLOW
    fast = optimize(gpt2)
    assert fast.plan.passes == (kept,)
    assert bool(decisions(fast, Status.UNDONE)) == (kept == MINIMUM)


def test_rivals_are_weighed_without_their_drafts(gpt2: Any, clock: Clock) -> None:
    """Where every plan drafts, the graph below the drafts is still checked; and drafts go with the winner."""
    clock.plain[MINIMUM], clock.verify = 0.5 * SLOW, 1.0
    fast = optimize(gpt2)
    assert fast.plan.passes[0] == MINIMUM
    assert fast.plan.passes[1].startswith(ASSUMED) and len(fast.plan.passes) == 2
    assert speculation_of(fast.graph) is not None
    assert [d.pass_name for d in decisions(fast, Status.UNDONE)] == [KV]
    assert fast.report.measured["speculation"]["decode_seconds"] == 0.5 * SLOW


def test_a_rival_loses_nothing_or_by_the_same_passes() -> None:
    """Only the chosen plan was measured as a whole. Mixtures of options come last."""

    def candidate(step: float, *passes: str) -> Candidate:
        return Candidate(passes, step, 1.0, 0.0, 1.0, "", step)

    own = (KV, "round_cache{bits=8}")
    others = [
        candidate(3.0, MINIMUM),
        candidate(0.5, "place_cache{cut=minimum,layers=0}", "place_cache{cut=kv,layers=1}"),
        candidate(1.0, MINIMUM, "round_cache"),
        candidate(2.0, MINIMUM, "round_cache{bits=8}", "speculate{drafter=ngram}"),
        candidate(4.0, *own),
    ]
    planned: Any = SimpleNamespace(plan=SimpleNamespace(passes=own), others=others)
    found = [rival.passes for rival in settle._rivals(planned, [own])]
    assert found == [(MINIMUM, "round_cache{bits=8}"), (MINIMUM,), others[1].passes]


# --- compiling -----------------------------------------------------------------------------------


def test_what_is_undone_is_neither_planned_nor_saved(
    gpt2: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that no longer compiles is priced, listed and saved as it runs."""
    monkeypatch.setattr(base, "_REGISTRY", registered_passes() | {"compile_layers": CompileLayers})
    lower = build.lower

    def pretend(graph: Any, device: torch.device, options: LoweringOptions, **shared: Any) -> Any:
        step = lower(graph, device, LoweringOptions(compile=False), **shared)
        return replace(step, compiled=options.compile)

    monkeypatch.setattr(build, "lower", pretend)
    built: list[bool] = []

    def measure(program: Any, workload: gw.Workload, tokens: int = 1) -> dict[str, float]:
        built.append(program.lowered.compiled)
        took = SLOW if program.lowered.compiled else 0.5 * SLOW
        return {"seconds_per_token": took, "tokens_per_second": 1.0, "context": 8.0, "cache_bytes": 0.0}

    monkeypatch.setattr(check, "measure_decode", measure)
    monkeypatch.setattr(check, "measure_stock", lambda *_: {"seconds_per_token": 0.1})
    fast = gw.optimize(gpt2, "cpu", workload=WORKLOAD, passes=[KV, "compile_layers"])
    assert built == [True, False]
    assert fast.plan.passes == (KV,)
    assert fast.graph.annotations["compile"] is False  # what is loaded later runs as this does
    assert [d.pass_name for d in decisions(fast, Status.UNDONE)] == ["compile_layers"]
    assert not decisions(fast, Status.APPLIED, "compile_layers")
    assert fast.plan.seconds_per_token == fast.report.predicted["decode"]["seconds_per_token"]


# --- drafts --------------------------------------------------------------------------------------

REPEATED = [7, 8, 9, 10, 11, 12, 13, 14] * 6
Texts = list[tuple[list[int], list[int]]]


def unlike(first: int, last: int) -> list[int]:
    """Part of a text in which no token appears twice."""
    generator = torch.Generator().manual_seed(3)
    return (torch.randperm(VOCAB - 3, generator=generator)[first:last] + 3).tolist()


@pytest.fixture
def continued(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int]], None]:
    """``continued(tokens)``: what the program writes after each prompt."""

    def set_to(tokens: list[int]) -> None:
        monkeypatch.setattr(
            settle_drafts, "continue_prompts", lambda _, prompts, __: [(list(p), tokens) for p in prompts]
        )

    return set_to


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What generating with drafts saves a token: the last element."""
    found = [0.5 * SLOW]
    monkeypatch.setattr(settle_drafts, "try_drafts", lambda *_: Tried(found[-1], {"drafts": 3}))
    return found


def test_drafts_stay_where_prompts_repeat_themselves(
    gpt2: Any, clock: Clock, continued: Any, saved: list[float]
) -> None:
    continued(REPEATED)
    fast = optimize(gpt2, [REPEATED, REPEATED])
    drafts = speculation_of(fast.graph)
    assert drafts is not None
    applied = decisions(fast, Status.APPLIED, "speculate")
    assert [d.pass_name for d in applied] == [fast.plan.passes[-1]]
    assert "on the caller's prompts" in applied[0].reason
    assert applied[0].measured == {"seconds_per_token": pytest.approx(-0.5 * SLOW)}
    measured = fast.report.measured["speculation"]
    assert measured["stats"] == {"drafts": 3}
    assert measured["tokens_per_cycle"] > 2 and measured["speedup"] == pytest.approx(2.0)
    assert seconds(plans(fast, "chosen")[0]) == measured["seconds_per_token"] == 0.5 * SLOW


def test_drafts_that_random_prompts_never_accept_are_not_planned(
    gpt2: Any, clock: Clock, continued: Any
) -> None:
    """The halves of the prompts say so already; nothing is undone, and nothing verified."""
    continued(unlike(50, 90))
    fast = optimize(gpt2, [unlike(0, 50)])
    assert fast.plan.passes == (KV,) and speculation_of(fast.graph) is None
    assert not decisions(fast, Status.UNDONE)
    assert all(tokens == 1 for _, tokens in clock.asked)
    refused = decisions(fast, Status.UNPROFITABLE, "speculate")
    assert refused and all(d.reason for d in refused)


def test_drafts_that_the_programs_own_text_refuses_are_undone(
    gpt2: Any, clock: Clock, continued: Any
) -> None:
    """The prompts repeat themselves and their continuation does not: the program is what counts."""
    continued(unlike(50, 90))
    fast = optimize(gpt2, [REPEATED])
    assert fast.plan.passes == (KV,) and speculation_of(fast.graph) is None
    undone = decisions(fast, Status.UNDONE)
    assert len(undone) == 1 and undone[0].pass_name.startswith(ASSUMED)
    assert "if verifying costs no more than a plain step" in undone[0].reason
    assert all(tokens == 1 for _, tokens in clock.asked)
    assert [plan["passes"][-1] for plan in plans(fast, "undone")] == [undone[0].pass_name]
    assert not decisions(fast, Status.APPLIED, "speculate")
    assert "speculation" not in fast.report.measured
    assert fast.plan.seconds_per_token == fast.report.predicted["decode"]["seconds_per_token"]


def test_drafts_whose_verification_is_slow_are_undone(gpt2: Any, clock: Clock) -> None:
    """Without prompts the assumed acceptance stays, and the measured step decides."""
    clock.verify = 1.5
    fast = optimize(gpt2)
    assert fast.plan.passes == (KV,)
    undone = decisions(fast, Status.UNDONE)
    assert len(undone) == 1 and undone[0].pass_name.startswith(ASSUMED)
    assert "tokens a step take" in undone[0].reason and "1 s without" in undone[0].reason
    assert undone[0].measured is not None and undone[0].measured["seconds_per_token"] > 0
    assert len([tokens for _, tokens in clock.asked if tokens > 1]) == 1
    row = plans(fast, "undone")[0]
    assert row["passes"][-1] == undone[0].pass_name and (seconds(row) or 0.0) > SLOW


def test_drafts_within_the_noise_are_undone(gpt2: Any, clock: Clock) -> None:
    clock.verify = 1.17  # the assumed acceptance gives 1.19 tokens a step
    fast = optimize(gpt2)
    assert fast.plan.passes == (KV,)
    undone = decisions(fast, Status.UNDONE)
    assert len(undone) == 1 and undone[0].measured is not None
    assert -0.03 * SLOW < undone[0].measured["seconds_per_token"] < 0


def test_generating_overrules_the_steps(gpt2: Any, clock: Clock, continued: Any, saved: list[float]) -> None:
    """Steps alone promise a gain; what the host does between them takes it back."""
    continued(REPEATED)
    saved.append(-0.2 * SLOW)
    fast = optimize(gpt2, [REPEATED])
    assert fast.plan.passes == (KV,) and speculation_of(fast.graph) is None
    undone = decisions(fast, Status.UNDONE)
    assert len(undone) == 1
    assert "generating with speculate{" in undone[0].reason and "1.2 s a token" in undone[0].reason
    assert undone[0].measured == {"seconds_per_token": pytest.approx(0.2 * SLOW)}
    assert seconds(plans(fast, "undone")[0]) == pytest.approx(1.2 * SLOW)


def test_another_length_that_measures_faster_takes_the_place(
    gpt2: Any, clock: Clock, continued: Any, saved: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planner's drafts are undone, and both are in the report."""
    continued(REPEATED)

    def short_ones_are_cheap(program: Any, workload: gw.Workload, tokens: int = 1) -> dict[str, float]:
        step = clock.measure(program, workload, tokens)
        return step | {"seconds_per_token": SLOW if tokens <= 3 else 20 * SLOW}

    monkeypatch.setattr(check, "measure_decode", short_ones_are_cheap)
    fast = optimize(gpt2, [REPEATED])
    second = fast.plan.passes[-1]
    assert "tokens=2" in second
    undone = decisions(fast, Status.UNDONE)
    assert len(undone) == 1 and second in undone[0].reason and "tokens=2" not in undone[0].pass_name
    assert [d.pass_name for d in decisions(fast, Status.APPLIED, "speculate")] == [second]
    assert plans(fast, "undone")[0]["passes"][-1] == undone[0].pass_name


def test_generation_really_runs(gpt2: Any, clock: Clock, continued: Any) -> None:
    """Nothing patched but the clock of steps: prompts as long as the model's positions leave room too."""
    continued(REPEATED)
    fast = optimize(gpt2, [(REPEATED * 6)[:POSITIONS]])
    assert fast.plan.passes[0] == KV
    drafts = Speculate(tokens=4)
    for prompt in (REPEATED[:1], REPEATED, (REPEATED * 6)[:POSITIONS]):
        found = try_drafts(gpt2, fast.program, drafts, [prompt], batch=2)
        assert abs(found.saved) < 60 and found.stats["tokens"] > 0


def test_prompts_that_leave_no_room_keep_what_was_assumed(
    gpt2: Any, clock: Clock, saved: list[float]
) -> None:
    """A prompt of all positions has no continuation to learn from."""
    full = (REPEATED * 6)[:POSITIONS]
    fast = optimize(gpt2, [full])
    assert drafting.continue_prompts(fast.program, [full]) == []
    assert fast.plan.passes[-1].startswith(ASSUMED)
