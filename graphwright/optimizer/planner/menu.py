"""Everything that can be chosen, with its prices, and what is said about what was not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from graphwright.ir.errors import BudgetError, PassError
from graphwright.ir.graph import Graph
from graphwright.optimizer.choice import Bounds, Selection, choose, closest, explain, front, runners_up
from graphwright.optimizer.planner.alternatives import (
    Alternative,
    Layer,
    ProgramChoice,
    find_alternatives,
    find_program_choices,
    name_of,
    place_in_chain,
)
from graphwright.optimizer.planner.prices import PriceList, site_name
from graphwright.optimizer.planner.request import Candidate, Request, to_decision
from graphwright.optimizer.quality import Sensitivity
from graphwright.optimizer.quantities import duration, quantity
from graphwright.optimizer.report import Decision, Status
from graphwright.passes.base import Pass, order_passes, registered_passes, spell_layers


@dataclass
class Menu:
    """Everything that can be chosen, with its prices.

    Attributes:
        usable: alternatives that apply somewhere.
        unusable: those that apply nowhere, for their reasons.
        choices: program-wide ones; ``refused`` are the passes that are not legal.
        prices: of all of them.
        fixed_bytes: weights and workspace.
    """

    request: Request
    usable: list[Alternative]
    unusable: list[Alternative]
    choices: list[ProgramChoice]
    refused: list[Decision]
    prices: PriceList
    fixed_bytes: float

    def __post_init__(self) -> None:
        self._sites = self.prices.sites()
        self._programs = self.prices.programs(self.fixed_bytes)
        self._bounds = self.request.bounds
        self._chosen_bytes = self._reserved = 0.0

    def choose(self) -> Selection:
        """The fastest within the budget. If only the memory is in the way and need not fit, without it."""
        best = choose(self._sites, self._programs, self._bounds)
        if best is None and not self.request.must_fit:
            self._bounds = replace(self._bounds, memory_bytes=None)
            best = choose(self._sites, self._programs, self._bounds)
        if best is not None:
            self._chosen_bytes = best.memory_bytes
            return best
        self.refuse(closest(self._sites, self._programs, self._bounds))

    def refuse(self, near: Selection) -> NoReturn:
        """Nothing is within the budget; ``near`` comes closest.

        Raises:
            BudgetError: always.
        """
        raise BudgetError(
            f"no plan is within the budget: {_excess(near, self._bounds, self._reserved)}",
            where=f"{self.request.target.name}, {self.request.workload}",
            hint=f"the closest plan is {[str(p) for p in self.passes_of(near)]}; "
            "shorten the workload or raise the budget",
        )

    def reserve(self, more_bytes: float) -> bool:
        """Set memory aside for what only the whole plan shows; whether the choice must be made again.

        Options add up to what they keep; the workspace of recomputation is known of the rewritten graph.
        """
        allowed = self.request.memory_limit
        if self._bounds.memory_bytes is None or self._chosen_bytes + more_bytes <= allowed:
            return False
        self._reserved = min(more_bytes, allowed - 1.0)
        self._bounds = replace(self._bounds, memory_bytes=allowed - self._reserved)
        return True

    def passes_of(self, chosen: Selection) -> list[Pass]:
        """A selection as passes: each once, with the layers it applies to unless those are all it can."""
        by_name = {a.name: a for a in self.usable}
        layers: dict[Pass, set[Layer]] = {}
        for layer in self.prices.layers:
            for step in by_name[chosen.sites[site_name(layer)]].passes:
                layers.setdefault(step, set()).add(layer)
        # Layers differ in their chains: what comes first in any of them comes first in the program.
        layers = dict(sorted(layers.items(), key=lambda item: place_in_chain(item[0])))
        everywhere = {step: self._reach(step) for step in layers}
        passes = [
            step
            if found >= everywhere[step]
            else replace(step, layers=spell_layers(x for x in found if x is not None))
            for step, found in layers.items()
        ]
        program = next(c for c in self.choices if c.name == chosen.program)
        return [*passes, *program.passes]

    def _reach(self, step: Pass) -> set[Layer]:
        return {layer for a in self.usable if step in a.passes for layer in a.layers}

    def others(self, best: Selection) -> list[Candidate]:
        """The front of plans and the runners-up, fastest first."""
        found = [best]
        rest = front(self._sites, self._programs, self._bounds)
        rest += runners_up(self._sites, self._programs, self._bounds, best)
        for other in sorted(rest, key=lambda s: (s.seconds_per_token, s.memory_bytes, s.kl)):
            if not any(other.program == s.program and dict(other.sites) == dict(s.sites) for s in found):
                found.append(other)
        return [self._candidate(other, explain(best, other)) for other in found[1:]]

    def _candidate(self, chosen: Selection, reason: str) -> Candidate:
        passes = tuple(str(p) for p in order_passes(self.passes_of(chosen)))
        return Candidate(
            passes, chosen.seconds_per_token, chosen.memory_bytes, chosen.kl, chosen.perplexity, reason,
            self._step_seconds(chosen),
        )  # fmt: skip

    def _step_seconds(self, chosen: Selection) -> float:
        """Of a step of one token: the selection without the passes that draft."""
        program = next(c for c in self.choices if c.name == chosen.program)
        plain = name_of(program.rewriting)
        outside = next(p.seconds for p in self._programs if p.name == plain)
        return outside + sum(
            next(o.seconds[plain] for o in options if o.name == chosen.sites[site])
            for site, options in self._sites.items()
        )

    def refusals(self, best: Selection) -> list[Decision]:
        """Why each alternative and each program-wide pass that was not chosen was not."""
        chosen = {str(p) for a in self.usable if a.name in best.sites.values() for p in a.passes}
        found = list(self.refused)
        if not best.optimal:
            reason = "the search was stopped early: another plan may be faster"
            found.append(Decision("plan", "", Status.FALLBACK, reason, None, None, "exact"))
        # Several chains may end in one pass and be refused for one reason: once is enough.
        refused = {(r.pass_string, r.site, r.reason): r for a in self.unusable for r in a.records}
        found += [to_decision(record) for record in refused.values()]
        for alternative in self.usable:
            if str(alternative.passes[-1]) not in chosen:
                found += self._lost(
                    best, str(alternative.passes[-1]), alternative.passes[-1].fidelity, alternative.name
                )
        program = next(c for c in self.choices if c.name == best.program)
        for step in dict.fromkeys(p for c in self.choices for p in c.passes if p not in program.passes):
            sets = [c.name for c in self.choices if step in c.passes]
            found += self._lost(best, str(step), step.fidelity, None, sets)
        return found

    def _lost(
        self, best: Selection, name: str, fidelity: str, site_option: str | None, programs: Sequence[str] = ()
    ) -> list[Decision]:
        """The best plan with something that was not chosen, against the best plan."""
        sites, program_options = self._sites, self._programs
        if programs:
            program_options = [p for p in program_options if p.name in programs]
        else:
            sites = {
                site: [o for o in options if o.name == site_option] or options
                for site, options in sites.items()
            }
        other = choose(sites, program_options, self._bounds)
        if other is None:
            everywhere = site_option is not None and len(self.prices.layers) > 1
            reason = f"{'in all layers it is ' if everywhere else ''}not within the budget"
            return [Decision(name, "", Status.UNPROFITABLE, reason, None, None, fidelity)]
        delta = {
            "seconds_per_token": other.seconds_per_token - best.seconds_per_token,
            "memory_bytes": other.memory_bytes - best.memory_bytes,
        }
        reason = f"the best plan with it is {explain(best, other)}"
        return [Decision(name, "", Status.UNPROFITABLE, reason, delta, None, fidelity)]


def make_menu(graph: Graph, request: Request) -> Menu:
    """Find and price everything.

    Args:
        graph: the canonical graph; stays as it is.
        request: what is planned for.

    Raises:
        PassError: no cache can be placed.
    """
    found = list(find_alternatives(graph, request))
    usable = [a for a in found if a.layers]
    if not usable:
        reasons = sorted({f"{r.site}: {r.reason}" for a in found for r in a.records})
        raise PassError(f"no cache can be placed: {'; '.join(reasons[:3])}", where="planning")
    choices, refused = find_program_choices(usable[0].graph, request)
    losses, unmeasured = _losses(usable, request)
    usable = [a for a in usable if a not in unmeasured]
    predicted = request.estimate(usable[0].graph)["memory"]
    decisions = [to_decision(record) for record in refused]
    if not request.allows_loss:
        measured = request.budget.allows_loss
        reason = "plans with it lose more than the budget allows" if measured else "the budget allows no loss"
        decisions += [
            Decision(str(chosen), "", Status.ILLEGAL, reason, fidelity="lossy")
            for cls in registered_passes().values()
            if cls.scope == "site" and cls.fidelity == "lossy"
            for chosen in cls.variants()
        ]
    decisions += [
        Decision(
            str(a.passes[-1]), "", Status.ILLEGAL, "what it loses cannot be measured here", fidelity="lossy"
        )
        for a in unmeasured
    ]
    return Menu(
        request, usable, [a for a in found if not a.layers], choices, decisions,
        PriceList(usable, choices, request, losses),
        float(predicted["weights_bytes"] + predicted["workspace_bytes"]),
    )  # fmt: skip


def _losses(
    usable: Sequence[Alternative], request: Request
) -> tuple[dict[str, Mapping[tuple[str, str], Sensitivity]], list[Alternative]]:
    """What lossy passes lose on top of each exact chain; and the alternatives that cannot be measured."""
    lossy = [a for a in usable if a.lossy]
    if request.measure_loss is None:
        return {}, lossy
    losses: dict[str, Mapping[tuple[str, str], Sensitivity]] = {}
    for base in [a for a in usable if not a.lossy]:
        passes = dict.fromkeys(p for a in lossy if a.exact_name == base.name for p in a.lossy)
        if passes:
            losses[base.name] = request.measure_loss(base.graph, list(passes))
    return losses, []


def _excess(near: Selection, bounds: Bounds, reserved: float) -> str:
    """Which bounds the closest plan breaks, and by how much; ``reserved`` bytes are in no option's price."""
    parts = []
    if bounds.memory_bytes is not None and near.memory_bytes > bounds.memory_bytes:
        needed, allowed = (quantity("bytes", x + reserved) for x in (near.memory_bytes, bounds.memory_bytes))
        parts.append(f"the closest needs at least {needed} of memory, the limit is {allowed}")
    if bounds.seconds_per_token is not None and near.seconds_per_token > bounds.seconds_per_token:
        needed, allowed = duration(near.seconds_per_token), duration(bounds.seconds_per_token)
        parts.append(f"the closest takes {needed} a token, {allowed} are allowed")
    if bounds.kl is not None and near.kl > bounds.kl:
        parts.append(f"the closest loses {near.kl:.3g} nats a token, {bounds.kl:.3g} are allowed")
    if bounds.perplexity is not None and near.perplexity > bounds.perplexity:
        parts.append(
            f"the closest has {near.perplexity:.4g} times the perplexity, {bounds.perplexity:.4g} is allowed"
        )
    return "; ".join(parts)
