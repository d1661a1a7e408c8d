"""Chances that mean what they say: how often candidates like this one were right so far."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from graphwright.runtime.speculation.successors import NOTHING, Ranked, Successors

#: A token, its kind, and what its chance is taken to be before anything was observed.
Candidate = tuple[int, Hashable, float]
#: Below a cell's chance there are this many imagined trials.
PRIOR_TRIALS = 4.0
#: A cell with so many trials is halved, so that it follows the text.
MOST_TRIALS = 256.0


class Tally:
    """Hit rates by kind of candidate.

    A *kind* is whatever tells candidates apart before they are verified: the length of the match, the rank,
    the draft's own probability in steps. The estimate starts at a prior and moves to what was observed; old
    observations fade, since a text changes.
    """

    def __init__(self) -> None:
        self._cells: dict[Hashable, tuple[float, float]] = {}

    def chance(self, kind: Hashable, prior: float) -> float:
        """The estimated probability that a candidate of this kind is right."""
        cell = self._cells.get(kind)
        if cell is None:
            return prior
        return (cell[0] + prior * PRIOR_TRIALS) / (cell[1] + PRIOR_TRIALS)

    def record(self, kind: Hashable, hit: bool) -> None:
        """A candidate of this kind was right, or it was not."""
        hits, trials = self._cells.get(kind, (0.0, 0.0))
        if trials >= MOST_TRIALS:
            hits, trials = hits / 2, trials / 2
        self._cells[kind] = (hits + hit, trials + 1.0)

    def learn(self, candidates: Sequence[Candidate], chosen: int) -> None:
        """The target chose ``chosen`` where these were the candidates."""
        for token, kind, _ in candidates:
            self.record(kind, token == chosen)

    def rank(self, candidates: Sequence[Candidate]) -> Successors:
        """The candidates by their chances; of a token that is there twice, the better one."""
        if not candidates:
            return NOTHING
        best: dict[int, float] = {}
        cells = self._cells
        for token, kind, prior in candidates:  # as chance() does; this runs for every node of every draft
            cell = cells.get(kind)
            chance = prior if cell is None else (cell[0] + prior * PRIOR_TRIALS) / (cell[1] + PRIOR_TRIALS)
            if chance > best.get(token, 0.0):
                best[token] = chance
        order = sorted(best, key=best.__getitem__, reverse=True)  # stable: ties in the order given
        return Ranked(order, [best[token] for token in order])
