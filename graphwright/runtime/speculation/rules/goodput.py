"""As many tokens as pay for what they make the step cost; none where drafts lose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import ClassVar

from graphwright.cost_model.speculation import best_drafts, expected_tokens
from graphwright.ir.errors import InputError
from graphwright.runtime.speculation.options import StepCosts, step_costs
from graphwright.runtime.speculation.rules.length_rule import LengthRule, length_rule
from graphwright.runtime.speculation.tree import MAX_TREE_TOKENS

# What a new row is taken to have seen: so many tokens, of which the share `start` was accepted.
_PRIOR = 2.0
# Sums that are less have been forgotten.
_VANISHED = 1e-6


@dataclass
class _Row:
    """What became of one row's drafts; sums that forget.

    Attributes:
        tried, kept: tokens reached in verification, the first refused one included, and those accepted.
        promised, held: acceptances that the chances of drafts promised, and those that came.
        promise: of the draft that is being verified; None where it stated no chances.
        states_chances: the last draft did.
        idle: cycles without a draft since the last one.
    """

    tried: float
    kept: float
    promised: float = _PRIOR
    held: float = _PRIOR
    promise: float | None = None
    states_chances: bool = False
    idle: int = 0


@length_rule("goodput")
@dataclass
class Goodput(LengthRule):
    """The number of tokens with the largest expected yield for the cost of the step, row by row.

    A row's yield is estimated from what became of its own drafts. Drafts whose tokens state their chances are
    grown as far as one could pay and cut to the likeliest tokens that do; the chances are corrected by the
    ratio of accepted to promised tokens so far. Of other drafts, the length is chosen by the share of
    accepted tokens. Where not even one token pays, the row takes plain steps, and every ``probe``-th of them
    verifies one token, so that it starts again when drafts are good again.

    Rows of a batch are judged each on its own, as if the step were as wide as its own draft; in truth it is
    as wide as the longest. What drafting itself takes is not counted: put it into ``costs`` where a draft
    model makes it matter.

    Options:
        costs: of a step by its tokens, relative to a plain step; straight in between, and no draft is longer
            than the last says. Measure them on the machine.
        start: share of accepted tokens that a new row is taken to have.
        memory: what the past keeps of its weight from draft to draft.
        probe: plain steps from one trial to the next.

    Source: Liu et al. 2024, "Optimizing Speculative Decoding for Serving Large Language Models Using Goodput"
    (SmartSpec).
    """

    weighs_costs: ClassVar[bool] = True

    costs: str = "1:1.0+2:1.25+4:1.45+8:1.9+16:2.5+32:3.7"
    start: float = 0.6
    memory: float = 0.9
    probe: int = 16
    _curve: StepCosts = field(init=False, repr=False, compare=False)
    _most: int = field(init=False, repr=False, compare=False)
    _least: float = field(init=False, repr=False, compare=False)
    _rows: list[_Row] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not (0 <= self.start <= 1 and 0 < self.memory < 1 and self.probe >= 1):
            raise InputError(
                f"start={self.start}, memory={self.memory}, probe={self.probe} are not a rule",
                where="rule=goodput",
                hint="start from 0 to 1, memory between 0 and 1, probe >= 1",
            )
        self._curve = step_costs(self.costs, "rule=goodput(costs=...)")
        self._most = min(self._curve.most, MAX_TREE_TOKENS) - 1
        # The least chance that can pay: that of a token beside others which yielded nothing.
        costs = [self._curve(tokens) for tokens in range(1, self._most + 2)]
        self._least = min(more / less - 1 for less, more in pairwise(costs))

    def begin(self, rows: int) -> None:
        self._rows = [_Row(_PRIOR, _PRIOR * self.start) for _ in range(rows)]

    def budget(self, row: int) -> int:
        state = self._rows[row]
        state.promise = None
        if state.states_chances:  # they say where to stop, unless not even a sure token would pay
            best = self._most if self._speedup(1 + self._honesty(state), 1) > 1 else 0
        else:
            accepted = state.kept / state.tried
            best = best_drafts(lambda n: self._speedup(expected_tokens(accepted, n), n), self._most)
        return best or int(self._is_due(state))

    def floor(self, row: int) -> float:
        return min(1.0, self._least / self._honesty(self._rows[row]))

    def keep(self, row: int, chances: Sequence[float]) -> int:
        state = self._rows[row]
        promised = [0.0, *accumulate(chances)]
        honesty = self._honesty(state)
        most = min(len(chances), self._most)
        best = best_drafts(lambda n: self._speedup(1 + honesty * promised[n], n), most)
        if best == 0 and self._is_due(state):
            best = 1
        state.states_chances, state.promise = True, promised[best]
        return best

    def update(self, row: int, proposed: int, accepted: int) -> None:
        state = self._rows[row]
        state.idle = 0
        state.kept = self.memory * state.kept + accepted
        state.tried = self.memory * state.tried + accepted + (accepted < proposed)
        if state.promise is None:
            state.states_chances = False
        else:
            state.promised = self.memory * state.promised + state.promise
            state.held = self.memory * state.held + accepted

    def _speedup(self, tokens: float, drafts: int) -> float:
        """Of a step with so many drafts that yields so many tokens, over plain steps."""
        return tokens * self._curve(1) / self._curve(1 + drafts)

    def _is_due(self, state: _Row) -> bool:
        """Count a plain step; whether it should try a token instead."""
        state.idle += 1
        return state.idle >= self.probe

    @staticmethod
    def _honesty(state: _Row) -> float:
        """Accepted tokens for each one that chances promised; never 0, for sums that forget may vanish."""
        return max(state.held / max(state.promised, _VANISHED), _VANISHED)
