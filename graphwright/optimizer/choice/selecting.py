"""The fastest selection within bounds, the closest one to bounds that nothing meets, and the next best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from graphwright.ir.errors import BudgetError
from graphwright.optimizer.choice.integer_program import Objective
from graphwright.optimizer.choice.options import Bounds, ProgramOption, Selection, SiteOption, check_options
from graphwright.optimizer.choice.problem import (
    Counts,
    Left,
    Problem,
    build,
    drop_dominated,
    restrict,
    rounded_up,
    start,
)
from graphwright.optimizer.choice.solver import as_good, excess, minimize
from graphwright.optimizer.quantities import duration, quantity

#: The fastest first. What is as fast should be small; what is as small should lose nothing.
FASTEST = ("seconds", "memory", "kl")
_EXACTEST = ("kl", "seconds", "memory")


def choose(
    sites: Mapping[str, Sequence[SiteOption]], programs: Sequence[ProgramOption], bounds: Bounds
) -> Selection | None:
    """The fastest selection within the bounds; None if there is none.

    Ties go to less memory, then to less kl, then to fewer distinct options over the sites, then to the
    options that come earlier.

    Args:
        sites: the options of each site, in order of preference.
        programs: the options of the whole program, in order of preference.
        bounds: what the selection may cost.

    Raises:
        InputError: options that make no sense (see ``options.check_options``).
        BudgetError: the solver gave up without an answer.
    """
    check_options(sites, programs)
    problem = build(sites, programs)
    found = fastest(problem, start(problem), bounds.limits())
    return None if found is None else problem.selection(found)


def closest(
    sites: Mapping[str, Sequence[SiteOption]], programs: Sequence[ProgramOption], bounds: Bounds
) -> Selection:
    """The selection that breaks the bounds least, for saying what a budget would have to allow.

    Minimizes the sum of the excesses, each relative to its bound (that of perplexity by its logarithm). A
    bound that allows no loss at all stays as it is, unless some site has no exact option. Ties go to the
    more exact, then the faster selection, then as in ``choose``.

    Raises:
        InputError: options that make no sense.
        BudgetError: the solver gave up without an answer.
    """
    check_options(sites, programs)
    problem = build(sites, programs)
    soft = bounds.limits()
    hard: dict[str, float] = {}
    for measure in [m for m, limit in soft.items() if limit == 0]:
        del soft[measure]
        hard[measure] = 0.0
        if in_order(problem, start(problem), hard, ()) is None:
            del hard[measure]
            least = _required(in_order(problem, start(problem), hard, (measure,)))
            hard[measure] = problem.total(measure, least)
    return problem.selection(_required(in_order(problem, start(problem), hard, _EXACTEST, soft)))


def runners_up(
    sites: Mapping[str, Sequence[SiteOption]],
    programs: Sequence[ProgramOption],
    bounds: Bounds,
    best: Selection,
    most: int = 6,
) -> list[Selection]:
    """The best selections without one of the choices that ``best`` made, fastest first, at most ``most``.

    A choice is an option name in use, wherever the site has another option, or the program option.

    Raises:
        InputError: options that make no sense.
        BudgetError: the solver gave up without an answer.
    """
    check_options(sites, programs)
    problem = build(sites, programs)
    alternatives = [_without_program(problem, best.program)]
    alternatives += [_without_name(problem, name) for name in dict.fromkeys(best.sites.values())]
    found: list[Selection] = []
    for left in alternatives:
        if left.nothing or left.same_as(start(problem)):
            continue
        counts = fastest(problem, left, bounds.limits())
        other = None if counts is None else problem.selection(counts)
        if other is not None and not any(same_choices(other, known) for known in (best, *found)):
            found.append(other)
    return sorted(found, key=lambda s: (s.seconds_per_token, s.memory_bytes, s.kl))[:most]


def same_choices(one: Selection, other: Selection) -> bool:
    """Whether two selections choose alike."""
    return one.program == other.program and dict(one.sites) == dict(other.sites)


def explain(best: Selection, other: Selection) -> str:
    """Why ``other`` lost against ``best``, in a few words: ``1.4 ms a token slower, 120 MB less``."""
    parts = []
    slower = other.seconds_per_token - best.seconds_per_token
    if abs(slower) > rounded_up(best.seconds_per_token) - best.seconds_per_token:
        parts.append(f"{duration(abs(slower))} a token {'slower' if slower > 0 else 'faster'}")
    more = other.memory_bytes - best.memory_bytes
    if abs(more) >= 0.5:
        parts.append(f"{quantity('bytes', abs(more))} {'more' if more > 0 else 'less'}")
    loss = other.kl - best.kl
    if abs(loss) > rounded_up(best.kl) - best.kl:
        parts.append(f"{abs(loss):.2g} nats a token {'further from' if loss > 0 else 'closer to'} exact")
    return ", ".join(parts) or "equal in time, memory and quality, and not preferred"


# --- one problem, several objectives in turn -----------------------------------------------------------


def fastest(problem: Problem, left: Left, limits: Mapping[str, float]) -> Counts | None:
    """The fastest solution within the limits, ties as in ``choose``."""
    return in_order(problem, left, limits, FASTEST)


def in_order(
    problem: Problem,
    start_from: Left,
    limits: Mapping[str, float],
    order: Sequence[str],
    soft: Mapping[str, float] | None = None,
) -> Counts | None:
    """Minimize the excess over soft limits, then each measure in turn, then distinct names and late options.

    One solve for each, with what came before fixed but for rounding (the lexicographic method). A
    perturbation of one objective cannot do it: bytes, nats and ranks would have to fit between the smallest
    real difference in seconds and the solver's tolerance. Where no limit binds, fixing one measure rules out
    nearly everything, and the later solves are small or not needed.

    Returns:
        The solution, ``optimal`` if the solver proved the first of its answers; None if nothing keeps
        within the limits.
    """
    limits, soft, cap = dict(limits), dict(soft or {}), 0.0
    left = restrict(problem, start_from, limits)
    if left.nothing:
        return None
    left = drop_dominated(problem, left, [*limits, *soft], order)
    best: Counts | None = None
    if soft:
        best = _required(minimize(problem, left, limits, _excess_of(problem, soft)))
        cap = excess(problem, soft, best)
        limits |= {m: min(limit * (1 + cap), limits.get(m, np.inf)) for m, limit in soft.items()}
        soft = soft if cap else {}
    for measure in (*order, None):
        left = restrict(problem, left, limits)
        if best is not None and left.decided(problem):
            break
        objective = _tidy(problem) if measure is None else _sum_of(problem, measure)
        if measure is not None and not soft:
            left = restrict(problem, as_good(problem, left, limits, objective), limits)
        if left.nothing:
            break  # by rounding alone
        found = minimize(problem, left, limits, replace(objective, soft=soft, most_excess=cap))
        if found is None:
            break  # nothing keeps within the limits; or only the best so far does, by rounding
        best = found if best is None else replace(found, optimal=best.optimal)
        if measure is not None:
            if not soft:
                left = as_good(problem, left, limits, objective, found)
            limits[measure] = min(problem.total(measure, best), limits.get(measure, np.inf))
    return best


def _sum_of(problem: Problem, measure: str) -> Objective:
    return Objective(problem.values[measure], problem.base[measure])


def _excess_of(problem: Problem, soft: Mapping[str, float]) -> Objective:
    return Objective(np.zeros(len(problem.group)), np.zeros(len(problem.programs)), soft=soft)


def _tidy(problem: Problem) -> Objective:
    """Few names first; then early options. A name costs more than all ranks together."""
    ranks = problem.option.astype(np.float64)
    latest = len(problem.programs) + sum(
        len(names) * len(sites) for names, sites in zip(problem.names, problem.classes, strict=True)
    )
    return Objective(ranks, np.arange(len(problem.programs), dtype=np.float64), per_name=float(latest))


def _required(found: Counts | None) -> Counts:
    """A solution that exists, since every site has an option and no hard limit excludes the cheapest."""
    if found is None:
        raise BudgetError(
            "the solver found no selection where there is one",
            where="bounds",
            hint="scale the options' figures: they differ by more than a float can add up",
        )
    return found


def _without_program(problem: Problem, name: str) -> Left:
    keep = np.array([program != name for program in problem.programs], dtype=np.bool_)
    return Left(keep[problem.program], keep)


def _without_name(problem: Problem, name: str) -> Left:
    """Without an option name, except at sites that have no other."""
    forbidden = [[n == name and len(names) > 1 for n in names] for names in problem.names]
    keep = [not forbidden[g][o] for g, o in zip(problem.group.tolist(), problem.option.tolist(), strict=True)]
    return Left(np.array(keep, dtype=np.bool_), start(problem).programs)
