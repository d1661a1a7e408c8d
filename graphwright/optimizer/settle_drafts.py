"""Whether and how to draft, by measurement: what the caller's prompts accept, and what steps take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from graphwright.cost_model.graph_cost import graph_cost
from graphwright.cost_model.prediction import predict
from graphwright.cost_model.speculation import predict_speculation
from graphwright.optimizer import check
from graphwright.optimizer.describe import drafts_of, without_speculation
from graphwright.optimizer.drafting import (
    CONTINUATION,
    Tried,
    continue_prompts,
    measured_drafts,
    measured_seconds,
    proposed_drafts,
    try_drafts,
    until_end,
    weighs_costs,
    with_costs,
)
from graphwright.optimizer.planner import Request
from graphwright.optimizer.quantities import duration
from graphwright.optimizer.report import Decision, Status
from graphwright.optimizer.settled import NOISE, Settled
from graphwright.passes.base import parse_pass
from graphwright.passes.speculate import Speculate
from graphwright.runtime.speculation.acceptance import Text

# A trial writes so many tokens, or more for as long as plain steps take this time.
_LEAST_TRIED, _TRIED_SECONDS = 64, 3.0

#: Tokens of the steps whose times length rules are told.
_COSTED = (1, 2, 4, 8, 16, 32)


@dataclass
class _Race:
    """Drafts against plain steps.

    Attributes:
        plain: measured seconds of a plain step.
        seconds: per token, by draft; of drafts that could not win if verifying was as cheap as a plain
            step, what they would take even so.
        verify: measured seconds of a step, by its tokens.
        best: the draft that takes least.
        per_token: what it takes, by generating where that was tried.
        tried: how that went.
    """

    plain: float
    seconds: dict[Speculate, float]
    verify: dict[int, float]
    best: Speculate
    per_token: float
    tried: Tried | None = None

    @property
    def pays(self) -> bool:
        """Whether drafts are faster than plain steps, by more than noise."""
        return self.per_token < (1 - NOISE) * self.plain

    def of(self, drafts: Speculate) -> float:
        """What these drafts take, as they would be accepted; a failed trial of the best speaks for all."""
        if self.tried is not None and not self.pays:
            return self.per_token
        alike = [took for other, took in self.seconds.items() if other.options() == drafts.options()]
        return self.per_token if same_drafts(drafts, self.best) or not alike else alike[0]


def settle_drafts(
    model: PreTrainedModel, settled: Settled, request: Request, prompts: Sequence[Sequence[int]]
) -> None:
    """Draft as the measurements say is fastest; undo drafts that they say are slower.

    Steps are timed one by one, and with the caller's prompts the winner generates once with and once
    without drafts, which includes what the host does between steps.
    """
    if not settled.built.graph.placeholders("state"):
        return
    chosen = drafts_of(settled.built.planned.plan.passes)
    texts = _texts(model, settled, request, prompts)
    candidates = _candidates(settled, request, texts, chosen)
    if not candidates:
        return
    race = _race(settled, request, candidates, texts)
    if prompts and race.pays:
        program = settled.built.program
        tokens = min(request.workload.generate, max(_LEAST_TRIED, int(_TRIED_SECONDS / race.plain)))
        race.tried = try_drafts(model, program, race.best, prompts, request.workload.batch, tokens)
        race.per_token = race.plain - race.tried.saved
    if chosen is not None:
        settled.times[settled.built.planned.plan.passes] = race.of(chosen)
        if not (race.pays and same_drafts(chosen, race.best)):
            settled.decisions.append(_declined(chosen, race, Status.UNDONE))
    elif not race.pays:
        settled.decisions.append(_declined(race.best, race, Status.UNPROFITABLE))
    if race.pays:
        settled.decisions.append(_applied(race, bool(prompts)))
        shape = race.best.step_shape()
        settled.measured["speculation"] = {
            "decode_seconds": race.plain,
            "verify_seconds": race.verify[shape.tokens],
            "tokens_per_cycle": shape.tokens_per_step,
            "seconds_per_token": race.per_token,
            "speedup": race.plain / race.per_token,
            **({} if race.tried is None else {"stats": race.tried.stats}),
        }
    _draft_with(settled, request, chosen, race)


def same_drafts(one: Speculate | None, other: Speculate | None) -> bool:
    """Whether two programs draft alike, whatever acceptance each was priced with."""
    return (one and one.options()) == (other and other.options())


def _texts(
    model: PreTrainedModel, settled: Settled, request: Request, prompts: Sequence[Sequence[int]]
) -> list[Text]:
    """What the program itself writes after the caller's prompts."""
    if not prompts:
        return []
    # As long as the workload's: what a model writes repeats itself more the longer it gets.
    tokens = min(request.workload.generate, CONTINUATION)
    config = model.generation_config
    ends = config.eos_token_id
    ends = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
    texts = continue_prompts(settled.built.program, prompts, tokens)
    return [until_end(Text(*text), ends) for text in texts]


def _candidates(
    settled: Settled, request: Request, texts: Sequence[Text], chosen: Speculate | None
) -> tuple[Speculate, ...]:
    """What to weigh: drafts as the program's own continuations accept them; else what the planner assumed."""
    if not texts:
        return () if chosen is None else (chosen,)
    return measured_drafts(texts, proposed_drafts(_predicted_costs(settled, request)))


def _predicted_costs(settled: Settled, request: Request) -> dict[int, float]:
    """A step's predicted time by its tokens, relative to a plain one."""
    workload, cost = request.workload, graph_cost(settled.built.graph)

    def seconds(tokens: int) -> float:
        place: dict[str, Any] = {"batch": workload.batch, "context": workload.mean_context, "tokens": tokens}
        return predict(cost, request.target, **place).seconds

    plain = seconds(1)
    return {tokens: max(1.0, seconds(tokens) / plain) for tokens in _COSTED}


def _race(
    settled: Settled, request: Request, candidates: Sequence[Speculate], texts: Sequence[Text]
) -> _Race:
    workload, plain = request.workload, settled.step_seconds
    verify: dict[int, float] = {}

    def step_seconds(tokens: int) -> float:
        if tokens not in verify:
            step = check.measure_decode(settled.built.program, workload, tokens)
            verify[tokens] = step["seconds_per_token"]
        return verify[tokens]

    seconds: dict[Speculate, float] = {}
    for candidate in candidates:
        shape = candidate.step_shape()
        # A step never takes less than a plain one: what cannot gain even so is not timed.
        least = measured_seconds(shape, plain, plain, workload.batch)
        if least >= (1 - NOISE) * plain:
            seconds[candidate] = least
            continue
        if weighs_costs(candidate) and texts:  # it drafts otherwise once it knows what steps take
            costs = {tokens: max(1.0, step_seconds(tokens) / plain) for tokens in _COSTED}
            (candidate,) = measured_drafts(texts, [with_costs(candidate, costs)])
            shape = candidate.step_shape()
        seconds[candidate] = measured_seconds(shape, plain, step_seconds(shape.tokens), workload.batch)
    best = min(seconds, key=lambda p: seconds[p])
    return _Race(plain, seconds, verify, best, seconds[best])


# --- what became of it ---------------------------------------------------------------------------


def _draft_with(settled: Settled, request: Request, chosen: Speculate | None, race: _Race) -> None:
    """Put the choice into the graph, the plan and its decisions."""
    planned, graph = settled.built.planned, settled.built.graph
    graph.annotations.pop("speculation", None)
    passes = without_speculation(planned.plan.passes)
    best = race.best if race.pays else None
    if best is not None:
        best.apply(best.find(graph)[0], graph)
        passes = (*passes, str(best))
    # Lines about these drafts give way to what was measured of them.
    planned.decisions[:] = [
        d for d in planned.decisions if not (_is_about(d, chosen) or _is_about(d, best))
    ]  # fmt: skip
    if passes != planned.plan.passes or best is not None:
        predicted = _predicted(settled, request, best)
        planned.plan = replace(planned.plan, passes=passes, seconds_per_token=predicted)


def _predicted(settled: Settled, request: Request, drafts: Speculate | None) -> float:
    """What the cost model says of the program with these drafts, as it says it of the other plans."""
    workload = request.workload
    place: dict[str, Any] = {"batch": workload.batch, "context": workload.mean_context}
    cost = graph_cost(settled.built.graph)
    if drafts is None:
        return predict(cost, request.target, **place, phase="decode").seconds
    priced = predict_speculation(
        cost, request.target, drafts.acceptance, drafts.priced_tokens, **place, hit_rate=drafts.hit_rate
    )
    return priced["seconds_per_token"]


def _is_about(decision: Decision, drafts: Speculate | None) -> bool:
    if drafts is None or decision.pass_name.split("{")[0] != Speculate.name:
        return False
    found = parse_pass(decision.pass_name)
    return isinstance(found, Speculate) and same_drafts(found, drafts)


def _declined(drafts: Speculate, race: _Race, status: Status) -> Decision:
    """Why these drafts did not stay, or did not come."""
    took = race.of(drafts)
    shape = next((p.step_shape() for p in race.seconds if same_drafts(p, drafts)), drafts.step_shape())
    if race.pays:
        against = f"{duration(race.per_token)} with {race.best}"
    else:
        against = f"{duration(race.plain)} without"
    if race.tried is not None and not race.pays:
        found = f"generating with {race.best} takes {duration(race.per_token)} a token"
    elif shape.tokens in race.verify:
        found = f"{shape.tokens_per_step:.2f} tokens a step take {duration(took)} a token"
    else:
        found = (
            f"{shape.tokens_per_step:.2f} tokens a step are {duration(took)} a token at least, "
            "if verifying costs no more than a plain step"
        )
    lost = {"seconds_per_token": took - (race.per_token if race.pays else race.plain)}
    return Decision(str(drafts), "", status, f"measured: {found}, {against}", None, lost, drafts.fidelity)


def _applied(race: _Race, on_prompts: bool) -> Decision:
    shape = race.best.step_shape()
    evidence = "on the caller's prompts" if on_prompts else "as reference prose accepts them, steps measured"
    reason = (
        f"{shape.tokens_per_step:.2f} tokens a step of {shape.tokens} {evidence}: "
        f"{duration(race.per_token)} a token, {duration(race.plain)} without"
    )
    saved = {"seconds_per_token": race.per_token - race.plain}
    return Decision(str(race.best), "", Status.APPLIED, reason, None, saved, race.best.fidelity)
