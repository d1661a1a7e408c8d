"""Cuts against solutions that break a limit by less than the solver can see.

HiGHS takes z = 0.9999999 for a whole number, and so sees room where there is none: beside an option of
terabytes, a limit is met to within kilobytes only. Such a solution holds a *cover*, choices that together
break the limit; a row forbids to make all of them (Balas 1975, Mathematical Programming 8), which is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from graphwright.optimizer.choice.problem import Counts, Left, Problem, rounded_up


@dataclass(frozen=True, eq=False)
class Cover:
    """Choices that together break a limit.

    Attributes:
        columns: columns of one program option, ``[choices]``.
        sites: from how many sites on each of them is part of the cover, ``[choices]``.
    """

    columns: np.ndarray
    sites: np.ndarray


def broken(problem: Problem, left: Left, limits: Mapping[str, float], found: Counts) -> list[Cover]:
    """A cover for each limit that a solution breaks."""
    return [
        _cover(problem, left, measure, limit, found)
        for measure, limit in limits.items()
        if not problem.meets({measure: limit}, found)
    ]


def _cover(problem: Problem, left: Left, measure: str, limit: float, found: Counts) -> Cover:
    """The heaviest choices of a solution that suffice to break the limit, the rest being the cheapest."""
    columns = np.flatnonzero(found.columns)
    least = problem.cheapest(measure, left.columns)
    above = problem.values[measure][columns] - least[problem.cell[columns]]
    sites = found.columns[columns].copy()
    over = problem.total(measure, found) - rounded_up(limit)
    for index in np.argsort(above, kind="stable"):
        while sites[index] and over - above[index] > 0:
            sites[index] -= 1
            over -= above[index]
    return Cover(columns[sites > 0], sites[sites > 0])
