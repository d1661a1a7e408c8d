"""The options as arrays: classes of equal sites, what each choice costs, and what can be ruled out early.

A *column* is one option of one class of sites under one program option; a *cell* is a class under a program
option, whose columns share out the sites of the class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graphwright.optimizer.choice.options import ProgramOption, Selection, SiteOption

#: What a choice costs. Each adds up over program and sites; seconds are those per token.
MEASURES = ("seconds", "memory", "kl", "log_perplexity")
#: What equal sums of floats may differ by, relative to the sum: they were added in another order.
ROUNDING = 1e-13


@dataclass(frozen=True, eq=False)
class Counts:
    """A solution: the program option, and how many sites of its class each column has, ``[columns]``."""

    program: int
    columns: np.ndarray
    optimal: bool = True


@dataclass(frozen=True, eq=False)
class Problem:
    """The options as arrays over columns.

    Attributes:
        programs: names of the program options.
        classes: sites with the same options and numbers, in the order of the sites.
        names: names of the options of each class.
        group, option, program, cell: class, option, program option and cell of each column, ``[columns]``.
        values: by measure, what the column costs per site, ``[columns]``.
        base: by measure, what the program option costs, ``[programs]``.
    """

    programs: tuple[str, ...]
    classes: tuple[tuple[str, ...], ...]
    names: tuple[tuple[str, ...], ...]
    group: np.ndarray
    option: np.ndarray
    program: np.ndarray
    cell: np.ndarray
    values: dict[str, np.ndarray]
    base: dict[str, np.ndarray]

    @property
    def counts(self) -> np.ndarray:
        """Sites of each class, ``[classes]``."""
        return np.array([len(sites) for sites in self.classes], dtype=np.int64)

    def total(self, measure: str, found: Counts) -> float:
        """What a solution costs, rounded once."""
        used = np.flatnonzero(found.columns)
        parts = self.values[measure][used] * found.columns[used]
        return math.fsum([float(self.base[measure][found.program]), *parts.tolist()])

    def meets(self, limits: Mapping[str, float], found: Counts) -> bool:
        """Whether a solution keeps within the limits, but for rounding. A limit of 0 has no rounding."""
        return all(self.total(measure, found) <= rounded_up(limit) for measure, limit in limits.items())

    def cheapest(self, measure: str, alive: np.ndarray) -> np.ndarray:
        """The least that one site costs in each cell, ``[cells]``; infinite where no column is left."""
        least = np.full(len(self.classes) * len(self.programs), np.inf)
        np.minimum.at(least, self.cell[alive], self.values[measure][alive])
        return least

    def floors(self, measure: str, alive: np.ndarray) -> np.ndarray:
        """The least that a selection under each program option can cost, ``[programs]``."""
        least = self.cheapest(measure, alive).reshape(len(self.classes), len(self.programs))
        parts = least * self.counts[:, None]
        return np.array([math.fsum([base, *parts[:, w]]) for w, base in enumerate(self.base[measure])])

    def selection(self, found: Counts) -> Selection:
        """The solution by names; the sites of a class take its options in order, first come first served."""
        sites: dict[str, str] = {}
        for group, members in enumerate(self.classes):
            columns = np.flatnonzero((self.group == group) & (found.columns > 0))
            names = [self.names[group][self.option[c]] for c in columns for _ in range(found.columns[c])]
            sites.update(zip(members, names, strict=True))
        return Selection(
            self.programs[found.program],
            sites,
            self.total("seconds", found),
            self.total("memory", found),
            self.total("kl", found),
            math.exp(self.total("log_perplexity", found)),
            found.optimal,
        )


def rounded_up(limit: float) -> float:
    """The limit, and what rounding may add to a sum that equals it."""
    return limit + ROUNDING * abs(limit)


def build(sites: Mapping[str, Sequence[SiteOption]], programs: Sequence[ProgramOption]) -> Problem:
    """The arrays of a problem whose options are checked."""
    members: dict[tuple[object, ...], list[str]] = {}
    for site, options in sites.items():
        key = tuple(
            (o.name, o.kl, o.log_perplexity, *((o.seconds[p.name], o.kept(p.name)) for p in programs))
            for o in options
        )
        members.setdefault(key, []).append(site)
    classes = tuple(tuple(group) for group in members.values())
    kinds = [sites[group[0]] for group in classes]
    rows = [(g, o, w) for g, kind in enumerate(kinds) for o in range(len(kind)) for w in range(len(programs))]
    index = np.array(rows, dtype=np.int64).reshape(-1, 3)
    chosen = [(kinds[g][o], programs[w]) for g, o, w in rows]
    return Problem(
        programs=tuple(p.name for p in programs),
        classes=classes,
        names=tuple(tuple(o.name for o in kind) for kind in kinds),
        group=index[:, 0],
        option=index[:, 1],
        program=index[:, 2],
        cell=index[:, 0] * len(programs) + index[:, 2],
        values={
            "seconds": np.array([o.seconds[p.name] / p.tokens_per_step for o, p in chosen], dtype=np.float64),
            "memory": np.array([o.kept(p.name) for o, p in chosen], dtype=np.float64),
            "kl": np.array([o.kl for o, _ in chosen], dtype=np.float64),
            "log_perplexity": np.array([o.log_perplexity for o, _ in chosen], dtype=np.float64),
        },
        base={
            "seconds": np.array([p.seconds / p.tokens_per_step for p in programs], dtype=np.float64),
            "memory": np.array([p.memory_bytes for p in programs], dtype=np.float64),
            "kl": np.array([p.kl for p in programs], dtype=np.float64),
            "log_perplexity": np.array([p.log_perplexity for p in programs], dtype=np.float64),
        },
    )


@dataclass(frozen=True, eq=False)
class Left:
    """What is still possible: columns ``[columns]`` and program options ``[programs]``."""

    columns: np.ndarray
    programs: np.ndarray

    @property
    def nothing(self) -> bool:
        return not self.programs.any()

    def decided(self, problem: Problem) -> bool:
        """Whether one selection is left: one program option, and one column in each of its cells."""
        return int(self.programs.sum()) == 1 and int(self.columns.sum()) == len(problem.classes)

    def same_as(self, other: Left) -> bool:
        """Whether nothing was ruled out between the two."""
        return bool((self.columns == other.columns).all() and (self.programs == other.programs).all())


def start(problem: Problem) -> Left:
    """Nothing is ruled out yet."""
    return Left(np.ones(len(problem.group), dtype=np.bool_), np.ones(len(problem.programs), dtype=np.bool_))


def restrict(problem: Problem, left: Left, limits: Mapping[str, float]) -> Left:
    """Rule out what breaks a limit even with the cheapest choice everywhere else.

    A program option under which some class has no column left goes too. A limit of 0 leaves exactly the
    options that cost 0, whatever the solver's tolerance.
    """
    while True:
        before = left
        programs = left.programs & np.isfinite(problem.floors("memory", left.columns))
        left = Left(left.columns & programs[problem.program], programs)
        for measure, limit in limits.items():
            left = _within(problem, left, measure, limit)
        if left.same_as(before):
            return left


def _within(problem: Problem, left: Left, measure: str, limit: float) -> Left:
    slack = rounded_up(limit) - problem.floors(measure, left.columns)
    programs = left.programs & (slack >= 0)
    above = problem.values[measure] - problem.cheapest(measure, left.columns)[problem.cell]
    columns = left.columns & programs[problem.program]
    columns[columns] &= above[columns] <= slack[problem.program][columns]
    return Left(columns, programs)


def drop_dominated(problem: Problem, left: Left, limited: Sequence[str], order: Sequence[str]) -> Left:
    """Rule out columns that another column of their cell beats.

    That one costs no more in any limited measure, and less in the first measure of ``order`` in which
    the two differ by more than rounding, so that swapping them always improves a selection.
    """
    columns = left.columns.copy()
    noise = {m: ROUNDING * _ceiling(problem, m) for m in order}
    for cell in np.unique(problem.cell[columns]):
        members = np.flatnonzero(columns & (problem.cell == cell))
        columns[members[_beaten(problem, members, limited, order, noise)]] = False
    return Left(columns, left.programs)


def _ceiling(problem: Problem, measure: str) -> float:
    shape = (len(problem.classes), len(problem.programs))
    worst = np.zeros(shape[0] * shape[1])
    np.maximum.at(worst, problem.cell, np.abs(problem.values[measure]))
    per_program = (worst.reshape(shape) * problem.counts[:, None]).sum(axis=0)
    return float((per_program + np.abs(problem.base[measure])).max())


def _beaten(
    problem: Problem,
    members: np.ndarray,
    limited: Sequence[str],
    order: Sequence[str],
    noise: Mapping[str, float],
) -> np.ndarray:
    """Which of the columns of one cell another one beats, ``[members]``."""
    allowed = np.ones((len(members), len(members)), dtype=np.bool_)  # [better, worse]
    for measure in limited:
        value = problem.values[measure][members]
        allowed &= value[:, None] <= value[None, :]
    better = np.zeros_like(allowed)
    level = np.ones_like(allowed)
    for measure in order:
        change = problem.values[measure][members][:, None] - problem.values[measure][members][None, :]
        # A tiny gain decides nothing (it may be noise), but must not be a loss.
        better |= level & (change < -2 * noise[measure])
        level &= change <= 0
    return (allowed & better).any(axis=0)
