"""The selections that nothing beats in quality and speed at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graphwright.ir.errors import InputError
from graphwright.optimizer.choice.options import Bounds, ProgramOption, Selection, SiteOption, check_options
from graphwright.optimizer.choice.problem import Counts, Problem, build, rounded_up, start
from graphwright.optimizer.choice.selecting import fastest, in_order, same_choices

# Solves that find nothing new are the price of looking in the right places; so many for each point.
_TRIES = 3


@dataclass(frozen=True, eq=False)
class _Gap:
    """Between two neighbours of the front there may be others, whose axis lies above ``low``."""

    fast: Counts
    slow: Counts
    low: float


def front(
    sites: Mapping[str, Sequence[SiteOption]],
    programs: Sequence[ProgramOption],
    bounds: Bounds,
    points: int = 8,
) -> list[Selection]:
    """The Pareto front of quality (kl) against speed within the bounds, fastest first.

    Where the fastest selection is as exact as any, quality is no question, and the front is that of memory
    against speed. Its ends are the answer of ``choose`` and the most exact (or smallest) selection within
    the bounds. Points between them come from the epsilon-constraint method (Haimes, Lasdon and Wismer 1971):
    the fastest selection with the axis bounded. The bound goes to the middle of the widest gap, in which
    neighbours differ most in both (the box algorithm: Hamacher, Pedersen and Ruzika 2007, Operations Research
    Letters 35(3)).

    Args:
        points: how many selections at most, at least 2.

    Returns:
        Distinct selections of which none is at least as good as another in time, memory and kl; empty
        if nothing is within the bounds.

    Raises:
        InputError: options that make no sense, or fewer than two points.
        BudgetError: the solver gave up without an answer.
    """
    check_options(sites, programs)
    if points < 2:
        raise InputError(
            f"a front of {points} points has no two ends", where="points", hint="ask for at least 2"
        )
    problem, limits = build(sites, programs), bounds.limits()
    best = fastest(problem, start(problem), limits)
    if best is None:
        return []
    axis = "kl"
    least = in_order(problem, start(problem), limits, ("kl", "seconds", "memory")) or best
    if problem.total("kl", best) <= rounded_up(problem.total("kl", least)):
        axis, limits["kl"] = "memory", problem.total("kl", best)
        least = in_order(problem, start(problem), limits, ("memory", "seconds", "kl")) or best
    found = [best, least, *_between(problem, limits, axis, best, least, points - 2)]
    found.sort(key=lambda c: (problem.total("seconds", c), -problem.total(axis, c)))
    distinct: list[Selection] = []
    for selection in map(problem.selection, found):
        if not any(same_choices(selection, known) for known in distinct):
            distinct.append(selection)
    return distinct


def _between(
    problem: Problem, limits: Mapping[str, float], axis: str, best: Counts, least: Counts, most: int
) -> list[Counts]:
    """At most ``most`` points of the front between its ends."""
    order = ("seconds", axis, "kl" if axis == "memory" else "memory")
    ends = _Gap(best, least, problem.total(axis, least))
    whole = _size(problem, axis, ends)
    gaps, found = [ends], list[Counts]()
    for _ in range(_TRIES * most):
        widest = max(gaps, key=lambda gap: _size(problem, axis, gap))
        if len(found) == most or _size(problem, axis, widest) <= 1e-9 * whole:
            break
        gaps.remove(widest)
        middle = _halfway(axis, widest.low, problem.total(axis, widest.fast))
        bounded = {**limits, axis: min(middle, limits.get(axis, middle))}
        point = in_order(problem, start(problem), bounded, order)
        slowest = problem.total("seconds", widest.slow)
        if point is None or slowest <= rounded_up(problem.total("seconds", point)):
            gaps.append(_Gap(widest.fast, widest.slow, middle))
            continue
        found.append(point)
        gaps += [
            _Gap(widest.fast, point, middle),
            _Gap(point, widest.slow, problem.total(axis, widest.slow)),
        ]
    return found


def _size(problem: Problem, axis: str, gap: _Gap) -> float:
    """The area in which there may be other points."""
    time = problem.total("seconds", gap.slow) - problem.total("seconds", gap.fast)
    high = problem.total(axis, gap.fast)
    width = math.sqrt(high) - math.sqrt(gap.low) if axis == "kl" else high - gap.low
    return max(time, 0.0) * max(width, 0.0)


def _halfway(axis: str, low: float, high: float) -> float:
    """The middle; that of the roots for kl, which grows with the square of the error in the logits."""
    return ((math.sqrt(low) + math.sqrt(high)) / 2) ** 2 if axis == "kl" else (low + high) / 2
