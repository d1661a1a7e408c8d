"""The integer program: its rows, assembled from what is left of a problem, and HiGHS's answer.

For every program option w a binary y[w]; for every column (class c, option o, program w) an integer
z[c, o, w] with ``sum over o of z[c, o, w] = sites of c * y[w]``. Limits are one row per program option rather
than one for all: with them the linear relaxation is the convex hull of the relaxations under each program
option (Balas 1979, Annals of Discrete Mathematics 5), so that branching over y costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds as Box
from scipy.optimize import LinearConstraint, linprog, milp
from scipy.sparse import csc_array

from graphwright.ir.errors import BudgetError
from graphwright.optimizer.choice.cover import Cover
from graphwright.optimizer.choice.problem import Counts, Left, Problem, rounded_up

# HiGHS's tolerances are absolute, 1e-6 for rows and gap. Prices are brought to a size at which the gap is
# 1e-12 of the largest, and limits to one at which the tolerance is 1e-10 of the limit.
_SCALE, _ROWS = 1e6, 1e4
# Nodes come first, so that an answer does not depend on how busy the machine is; seconds are the safety net.
_LIMITS = {"node_limit": 20_000, "time_limit": 30.0, "mip_rel_gap": 1e-9}


@dataclass(frozen=True)
class Objective:
    """What to minimize over what is left.

    Attributes:
        columns: price per site of each column, ``[columns]``.
        programs: price of each program option, ``[programs]``.
        per_name: price of each distinct option name in use.
        soft: limits that may be broken.
        most_excess: the most that soft limits may be exceeded by, in sum and relative to each; None makes
            this excess the objective.
    """

    columns: np.ndarray
    programs: np.ndarray
    per_name: float = 0.0
    soft: Mapping[str, float] = field(default_factory=dict)
    most_excess: float | None = None


class IntegerProgram:
    """One integer program: variables are columns, program options, distinct names, excesses."""

    def __init__(
        self,
        problem: Problem,
        left: Left,
        limits: Mapping[str, float],
        objective: Objective,
        cuts: Sequence[Cover] = (),
        tighter: float = 0.0,
    ) -> None:
        self.problem, self.left, self.objective = problem, left, objective
        self.columns = np.flatnonzero(left.columns)
        self.programs = np.flatnonzero(left.programs)
        self.y = np.full(len(problem.programs), -1)
        self.y[self.programs] = len(self.columns) + np.arange(len(self.programs))
        self.cost: list[float] = [*objective.columns[self.columns], *objective.programs[self.programs]]
        counts = problem.counts[problem.group[self.columns]]
        self.most: list[float] = [*counts.astype(float), *np.ones(len(self.programs))]
        self.integer = [1] * len(self.cost)
        self.entries: list[tuple[np.ndarray, np.ndarray]] = []
        self.lower: list[float] = []
        self.upper: list[float] = []
        self._share_out()
        for measure, limit in limits.items():
            self._limit(measure, limit, 1 - tighter)
        if objective.per_name:
            self._names(objective.per_name)
        if objective.soft:
            self._soft(objective.soft, objective.most_excess, 1 - tighter)
        for cut in cuts:
            self._forbid(cut)

    def solve(self) -> Counts | None:
        """The solution that HiGHS finds, with whole numbers."""
        result = milp(
            self.prices,
            integrality=np.array(self.integer),
            bounds=Box(np.zeros(len(self.cost)), np.array(self.most)),
            constraints=LinearConstraint(self._matrix(), np.array(self.lower), np.array(self.upper)),
            options=_LIMITS,
        )
        if result.x is None:
            if result.status == 2:
                return None
            raise BudgetError(
                f"the solver stopped without a selection: {result.message}",
                where="bounds",
                hint="ask for fewer options, or loosen the bounds",
            )
        whole = np.rint(result.x).astype(np.int64)
        found = np.zeros(len(self.problem.group), dtype=np.int64)
        found[self.columns] = whole[: len(self.columns)]
        program = int(self.programs[np.argmax(result.x[self.y[self.programs]])])
        found[self.problem.program != program] = 0
        return Counts(program, found, result.status == 0)

    def relaxed(self) -> tuple[float, np.ndarray, int] | None:
        """The linear relaxation: its objective, reduced costs ``[columns]``, the option it prefers."""
        equal = np.array(self.lower) == np.array(self.upper)
        matrix, upper = self._matrix().tocsr(), np.array(self.upper)
        result = linprog(
            self.prices,
            A_eq=matrix[equal],
            b_eq=upper[equal],
            A_ub=None if equal.all() else matrix[~equal],
            b_ub=None if equal.all() else upper[~equal],
            bounds=np.stack([np.zeros(len(self.cost)), np.array(self.most)], axis=1),
            method="highs",
        )
        if result.status != 0:
            return None
        reduced = np.zeros(len(self.problem.group))
        reduced[self.columns] = np.maximum(result.lower.marginals[: len(self.columns)], 0.0)
        program = int(self.programs[np.argmax(result.x[self.y[self.programs]])])
        return result.fun / self.scale, reduced / self.scale, program

    @property
    def scale(self) -> float:
        """What the objective is multiplied by."""
        return _SCALE / max(float(np.abs(self.cost).max()), 1e-300)

    @property
    def prices(self) -> np.ndarray:
        """The objective's coefficients, scaled."""
        return np.array(self.cost) * self.scale

    def _matrix(self) -> csc_array:
        rows = np.concatenate([np.full(len(at), row) for row, (at, _) in enumerate(self.entries)])
        at = np.concatenate([at for at, _ in self.entries]).astype(np.int64)
        values = np.concatenate([values for _, values in self.entries])
        return csc_array((values, (rows, at)), shape=(len(self.entries), len(self.cost)))

    # --- rows ------------------------------------------------------------------------------------

    def _row(self, at: np.ndarray, values: np.ndarray, lower: float, upper: float) -> None:
        self.entries.append((at, values))
        self.lower.append(lower)
        self.upper.append(upper)

    def _variable(self, cost: float, most: float, integer: int) -> int:
        self.cost.append(cost)
        self.most.append(most)
        self.integer.append(integer)
        return len(self.cost) - 1

    def _share_out(self) -> None:
        """One program option; its cells share out the sites of each class."""
        self._row(self.y[self.programs], np.ones(len(self.programs)), 1.0, 1.0)
        cells = self.problem.cell[self.columns]
        for cell in np.unique(cells):
            group, program = divmod(int(cell), len(self.problem.programs))
            at = np.append(np.flatnonzero(cells == cell), self.y[program])
            values = np.append(np.ones(len(at) - 1), -float(len(self.problem.classes[group])))
            self._row(at, values, 0.0, 0.0)

    def _above(self, measure: str, program: int) -> tuple[np.ndarray, np.ndarray, float]:
        """Columns under a program option, what each costs above the cheapest of its cell, and the floor."""
        least = self.problem.cheapest(measure, self.left.columns)
        at = np.flatnonzero(self.problem.program[self.columns] == program)
        which = self.columns[at]
        above = self.problem.values[measure][which] - least[self.problem.cell[which]]
        return at, above, float(self.problem.floors(measure, self.left.columns)[program])

    def _limit(self, measure: str, limit: float, share: float) -> None:
        """What the columns cost above the floor keeps within what the limit leaves above it."""
        for program in self.programs:
            at, above, floor = self._above(measure, program)
            slack = rounded_up(limit) - floor
            if slack <= 0 or float(above @ np.array(self.most)[at]) <= slack:
                continue  # `restrict` left the cheapest columns only; or no choice can break the limit
            used = above > 0
            values = np.append(above[used] * (_ROWS / slack), -_ROWS * share)
            self._row(np.append(at[used], self.y[program]), values, -np.inf, 0.0)

    def _names(self, price: float) -> None:
        """A binary per option name, set if any class uses it."""
        problem, variables = self.problem, dict[str, int]()
        groups, options = problem.group[self.columns], problem.option[self.columns]
        for group, option in dict.fromkeys(zip(groups.tolist(), options.tolist(), strict=True)):
            name = problem.names[group][option]
            if name not in variables:
                variables[name] = self._variable(price, 1.0, 1)
            at = np.append(np.flatnonzero((groups == group) & (options == option)), variables[name])
            values = np.append(np.ones(len(at) - 1), -float(len(problem.classes[group])))
            self._row(at, values, -np.inf, 0.0)

    def _soft(self, soft: Mapping[str, float], cap: float | None, share: float) -> None:
        """A variable per soft limit and program option: the excess, relative to the limit."""
        variables = []
        for measure, limit in soft.items():
            for program in self.programs:
                at, above, floor = self._above(measure, program)
                over = self._variable(1.0 if cap is None else 0.0, np.inf, 0)
                variables.append(over)
                unit = max(limit, abs(rounded_up(limit) - floor))
                values = np.concatenate([above, [floor - rounded_up(limit), -limit]]) * (_ROWS / unit)
                self._row(np.concatenate([at, [self.y[program], over]]), values, -np.inf, 0.0)
        if cap is not None:
            scale = _ROWS / max(cap, 1e-6)
            most = rounded_up(cap) * share * scale
            self._row(np.array(variables), np.full(len(variables), scale), -np.inf, most)

    def _forbid(self, cover: Cover) -> None:
        """Not all choices of a cover at once."""
        at, most = [], -1.0
        for column, sites in zip(cover.columns.tolist(), cover.sites.tolist(), strict=True):
            variable = float(np.searchsorted(self.columns, column))
            spare = len(self.problem.classes[self.problem.group[column]]) - sites
            if spare:  # a binary says whether the column has that many sites
                chosen = self._variable(0.0, 1.0, 1)
                self._row(np.array([variable, chosen]), np.array([1.0, -(spare + 1.0)]), -np.inf, sites - 1.0)
            at.append(float(chosen) if spare else variable)
            most += 1.0 if spare else sites
        self._row(np.array(at), np.ones(len(at)), -np.inf, most)
