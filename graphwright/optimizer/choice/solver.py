"""Solving: the integer program, its answer checked against the limits, and what ties are sought among."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from graphwright.ir.errors import BudgetError
from graphwright.optimizer.choice.cover import Cover, broken
from graphwright.optimizer.choice.integer_program import IntegerProgram, Objective
from graphwright.optimizer.choice.problem import ROUNDING, Counts, Left, Problem, rounded_up

# Solutions that break a limit within the solver's tolerance are cut off one by one; if there are more, the
# limits are tightened, by ten times as much each time.
_CUTS, _TIGHTENINGS, _FIRST_TIGHTENING = 100, 8, 1e-11
# A price is worse for certain if it is so by more than the linear solver's tolerance adds up to.
_CLEARLY = 1e-9


def minimize(
    problem: Problem, left: Left, limits: Mapping[str, float], objective: Objective
) -> Counts | None:
    """The best solution within the limits; None if there is none.

    Raises:
        BudgetError: the solver reached its limits before it found any solution.
    """
    cuts: list[Cover] = []
    tighter = 0.0
    for _ in range(_CUTS + _TIGHTENINGS):
        found = IntegerProgram(problem, left, limits, objective, cuts, tighter).solve()
        if found is None:
            return None
        wrong = broken(problem, left, limits, found)
        within = _within_cap(problem, objective, found)
        if not wrong and within:
            return replace(found, optimal=False) if tighter else found
        cuts += wrong
        if len(cuts) > _CUTS or not within:
            tighter = max(10 * tighter, _FIRST_TIGHTENING)
    raise BudgetError(
        "the solver found no selection that keeps within the bounds for certain",
        where="bounds",
        hint="loosen the tightest bound a little; its figures lie within the solver's precision",
    )


def as_good(
    problem: Problem,
    left: Left,
    limits: Mapping[str, float],
    objective: Objective,
    found: Counts | None = None,
) -> Left:
    """What solutions that are as good as ``found`` can use (reduced cost fixing).

    A column whose reduced cost in the linear relaxation exceeds the gap between the relaxation and
    ``found`` makes any solution worse. Without ``found``, the best one under the program option that the
    relaxation prefers is compared with: a small problem that spares the large one most of its columns.

    Args:
        objective: one of columns and program options only.
    """
    if found is None and left.programs.sum() == 1:
        return left
    relaxed = IntegerProgram(problem, left, limits, objective).relaxed()
    if relaxed is None:
        return left
    bound, reduced, program = relaxed
    if found is None:
        chosen = np.arange(len(problem.programs)) == program
        found = minimize(problem, Left(left.columns & chosen[problem.program], chosen), limits, objective)
        if found is None:
            return left
    price = float(objective.columns @ found.columns + objective.programs[found.program])
    clearly = _CLEARLY * max(abs(price), float(np.abs(objective.columns).max(initial=0.0)))
    return Left(left.columns & (bound + reduced <= price + clearly), left.programs)


def _within_cap(problem: Problem, objective: Objective, found: Counts) -> bool:
    most = objective.most_excess
    if not objective.soft or most is None:
        return True
    return excess(problem, objective.soft, found) <= rounded_up(most) + ROUNDING


def excess(problem: Problem, soft: Mapping[str, float], found: Counts) -> float:
    """By how much a solution exceeds soft limits, each relative to its limit, in sum."""
    over = 0.0
    for measure, limit in soft.items():
        if not problem.meets({measure: limit}, found):
            over += problem.total(measure, found) / limit - 1
    return over
