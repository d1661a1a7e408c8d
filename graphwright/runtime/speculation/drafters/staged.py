"""Drafts that a second model has verified before the program does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from graphwright.ir.errors import InputError
from graphwright.runtime.speculation.draft import NO_DRAFT, Draft
from graphwright.runtime.speculation.draft_model import NeedsModel
from graphwright.runtime.speculation.drafter import (
    Drafter,
    Generation,
    Outcome,
    PathDrafter,
    drafter,
    make_drafter,
)
from graphwright.runtime.speculation.drafters.model import ModelDrafter
from graphwright.runtime.speculation.growing import Ask, Growing, grow
from graphwright.runtime.speculation.successors import Successors
from graphwright.runtime.speculation.tree import MAX_TREE_TOKENS, chain
from graphwright.runtime.speculation.trees.chain import Chain
from graphwright.runtime.speculation.trees.tree import Tree


@drafter("staged")
@dataclass
class StagedDrafter(NeedsModel, Drafter):
    """Lets a smaller model verify the guesses of a cheap drafter, and drafts what it accepts.

    The smaller model takes one step for several tokens instead of one for each. The draft is one path, its
    likeliest tokens, also when sampling. Both models have one vocabulary.

    Options:
        path: folder or name of the smaller model, loaded when the program is built.
        inner: the cheap drafter; one that can guess below any path.
        tokens: most tokens of a cheap guess.

    Source: Zhang et al. 2025, "Speculative Decoding Meets Quantization" (SpecMQuant: a small model turns tree
    drafts into sequences, which the target verifies).
    """

    wants_logits: ClassVar[bool] = True  # a program is needed, which a text does not have

    inner: str = "suffix"
    tokens: int = 8
    tree: Tree = field(default_factory=Chain, init=False, repr=False, compare=False)
    _cheap: PathDrafter = field(init=False, repr=False, compare=False)
    _small: ModelDrafter = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        cheap = make_drafter(self.inner)
        if not isinstance(cheap, PathDrafter) or cheap.wants_logits:
            raise InputError(
                f"inner={self.inner} cannot guess below any path from the text alone",
                where="drafter=staged",
                hint="inner=suffix",
            )
        if not 1 <= self.tokens < MAX_TREE_TOKENS:
            raise InputError(
                f"tokens={self.tokens} is no number of tokens to guess",
                where="drafter=staged",
                hint=f"1 to {MAX_TREE_TOKENS - 1}",
            )
        self._cheap, self._small = cheap, ModelDrafter(vocabulary="same")

    def begin(self, generation: Generation) -> None:
        self._small.use(self.model)
        self._small.begin(replace(generation, sample=False, temperature=1.0))
        self._cheap.begin(replace(generation, sample=False))

    def observe(self, row: int, outcome: Outcome) -> None:
        self._small.observe(row, outcome)
        # It has seen neither this draft nor a step of its own tree.
        self._cheap.observe(row, Outcome(outcome.tokens))

    def propose(self, rows: Sequence[int], budget: Sequence[int]) -> list[Draft]:
        chains: dict[int, list[int]] = {row: [] for row in rows}
        most = dict(zip(rows, budget, strict=True))
        going_on = list(rows)
        while going_on:
            lengths = {row: len(chains[row]) for row in going_on}
            self._extend(chains, {row: most[row] - lengths[row] for row in going_on})
            going_on = [row for row in going_on if lengths[row] < len(chains[row]) < most[row]]
        return [Draft(chains[row]) if chains[row] else NO_DRAFT for row in rows]

    def stopped(self) -> str | None:
        return self._small.stopped()

    def release(self) -> None:
        self._small.release()
        self._cheap.release()

    def _extend(self, chains: dict[int, list[int]], room: dict[int, int]) -> None:
        """Let the smaller model verify one cheap guess a row; it accepts at least a token of its own."""
        below = _Below(self._cheap, chains)
        # One token less than there is room for: the smaller model's own follows.
        guessing = [row for row in room if room[row] > 1]
        budgets = [min(self.tokens, room[row] - 1) for row in guessing]
        guesses = {row: Growing() for row in room}
        guesses |= zip(
            guessing, grow(self.tree, below, guessing, budgets, [0.0] * len(guessing)), strict=True
        )
        asked = []
        for row, guess in guesses.items():
            whole, start = joined(chains[row], guess), len(chains[row])
            asked += [Ask(row, whole, start + node) for node in range(len(guess) + 1)]
        answers = iter(self._small.look(asked))
        self._small.settle()
        for row, guess in guesses.items():
            chains[row] += _accepted(guess, [next(answers) for _ in range(len(guess) + 1)])[: room[row]]


@dataclass
class _Below(PathDrafter):
    """A drafter asked about trees that grow from the end of a chain of each row."""

    drafter: PathDrafter
    chains: dict[int, list[int]]

    def begin(self, generation: Generation) -> None:
        self.drafter.begin(generation)

    def observe(self, row: int, outcome: Outcome) -> None:
        self.drafter.observe(row, outcome)

    def look(self, asked: Sequence[Ask]) -> list[Successors]:
        whole = {ask.row: joined(self.chains[ask.row], ask.growing) for ask in asked}
        return self.drafter.look(
            [Ask(ask.row, whole[ask.row], len(self.chains[ask.row]) + ask.node) for ask in asked]
        )

    def settle(self) -> None:
        self.drafter.settle()


def joined(before: Sequence[int], growing: Growing) -> Growing:
    """``growing`` at the end of a chain of tokens below the root."""
    whole, start = Growing(), len(before)
    whole.tokens = [*before, *growing.tokens]
    whole.parents = [*chain(start), *(parent + start for parent in growing.parents)]
    whole.chances = [*(1.0 for _ in before), *growing.chances]
    whole.depths = [*range(1, start + 1), *(depth + start for depth in growing.depths)]
    return whole


def _accepted(guess: Growing, answers: Sequence[Successors]) -> list[int]:
    """The likeliest path as far as the guess reaches, and the token after it; empty if there is no answer."""
    path: list[int] = []
    node = 0
    while answers[node].ahead() > 0:
        token, _ = answers[node].take()
        path.append(token)
        below = [
            index + 1
            for index, (drafted, parent) in enumerate(zip(guess.tokens, guess.parents, strict=True))
            if parent + 1 == node and drafted == token
        ]
        if not below:
            break
        node = below[0]
    return path
