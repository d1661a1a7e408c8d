"""Drafters that run a program to see what follows: the target's own in parts, or another one.

What they share is here: one step a round for all rows, with logits made into candidates. Which program runs
over which cache is a :class:`DraftSession`.

Tokens of a *cycle* are numbered as those of a step: the root, which is the row's newest token, is 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from graphwright.runtime.residual import Visit
from graphwright.runtime.speculation.drafter import Generation, Outcome, PathDrafter
from graphwright.runtime.speculation.growing import Ask, Growing
from graphwright.runtime.speculation.successors import NOTHING, Successors, successors_of
from graphwright.runtime.speculation.tree import MAX_TREE_TOKENS, StepTokens
from graphwright.runtime.transfers import upload


class DraftSession(ABC):
    """A program over a cache in which every row's text, but for its newest token, can be read.

    In a cycle, steps run over that text; :meth:`advance` makes tokens of a step part of what later steps of
    the cycle read, :meth:`retreat` ends the cycle. Implementations over a cache of their own bring it up to
    date with what :meth:`observe` told them, at the latest in the first step of a cycle.

    Attributes:
        device: of the program.
    """

    device: torch.device

    @abstractmethod
    def step(self, step: StepTokens) -> torch.Tensor:
        """Logits ``[B, T, V]`` of new tokens; a row with a count of 0 takes no part.

        ``depth`` and ``tree`` are relative to what the row has advanced to: depth 0 is the position after
        it, bit j stands for token j of this step.
        """

    @abstractmethod
    def advance(self, counts: Sequence[int]) -> None:
        """Later steps of this cycle read the first ``counts[b]`` tokens of row b's last step."""

    @abstractmethod
    def retreat(self) -> None:
        """Every row is back at its text. Called at the end of each cycle, and within it to start over."""

    @abstractmethod
    def observe(self, row: int, outcome: Outcome) -> None:
        """The row grew by ``outcome.tokens``; the last of them is the next root."""


@dataclass
class ProgramSession(DraftSession):
    """A program over a state that somebody else keeps up to date: the target's own.

    Args:
        program: runs the steps; ``device`` and ``step`` of a
            :class:`~graphwright.runtime.decoding.protocol.DecodingProgram`.
        state: its cache, or that of a program with the same stores.
        skip: layers to leave out. To be changed between cycles only: a layer that was left out has not
            written what it would read later in the cycle.
    """

    program: Any
    state: Any
    skip: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        self.device = self.program.device

    def step(self, step: StepTokens) -> torch.Tensor:
        parts: dict[str, Any] = {"skip": self.skip} if self.skip else {}
        logits: torch.Tensor = self.program.step(
            self.state, step.tokens, step.counts, depth=step.depth, tree=step.tree, **parts
        )
        return logits

    def look_through(self, step: StepTokens, visit: Visit) -> None:
        """Run all layers for the sake of the residual stream between them."""
        parts: dict[str, Any] = {"depth": step.depth, "tree": step.tree, "visit": visit, "logits": "last"}
        self.program.step(self.state, step.tokens, step.counts, **parts)

    def fits(self, tokens: int) -> bool:
        """Whether every row may run so many tokens now."""
        limits = (self.state.capacity, self.program.max_positions)
        return max(self.state.known) + tokens <= min(limit for limit in limits if limit is not None)

    def advance(self, counts: Sequence[int]) -> None:
        self.state.advance(counts)

    def retreat(self) -> None:
        self.state.retreat()

    def observe(self, row: int, outcome: Outcome) -> None:
        """Nothing to do: the target commits what it accepts."""


@dataclass
class ProgramDrafter(PathDrafter):
    """Base of drafters that run a program: answers with its distributions, one step a round for all rows.

    A chain grows one token a step. Of another tree, the trunk is read from the cache, and everything above
    it runs again in each round, under the tree's mask. Subclasses say what runs (:meth:`open`).
    """

    wants_logits: ClassVar[bool] = True  # a program is needed, which a text does not have

    _session: DraftSession = field(init=False, repr=False, compare=False)
    _generation: Generation = field(init=False, repr=False, compare=False)
    _roots: list[int] = field(default_factory=list, init=False, repr=False, compare=False)
    # Of each row, the tokens of this cycle that the session has advanced by.
    _ahead: list[int] = field(default_factory=list, init=False, repr=False, compare=False)
    _between: bool = field(default=True, init=False, repr=False, compare=False)  # cycles

    @abstractmethod
    def open(self, generation: Generation) -> DraftSession:
        """What runs in this generation.

        Raises:
            InputError: this program cannot draft so.
        """

    def prepare(self, rows: Sequence[int]) -> None:
        """A cycle begins, in which these rows draft first. Default: nothing."""

    def goes_beyond(self, ask: Ask) -> bool:
        """Whether to look for what follows this token at all; decided before it is known. Default: always."""
        return True

    def law(self, logits: torch.Tensor) -> torch.Tensor:
        """The probabilities ``[R, V]`` (float32) to draft from, given logits ``[R, V]``."""
        return torch.softmax(logits.float() / self._generation.temperature, dim=-1)

    def begin(self, generation: Generation) -> None:
        rows = len(generation.prompts)
        self._generation = generation
        self._roots, self._ahead, self._between = [0] * rows, [0] * rows, True
        self._session = self.open(generation)

    def observe(self, row: int, outcome: Outcome) -> None:
        self._roots[row] = outcome.tokens[-1]
        self._session.observe(row, outcome)

    def look(self, asked: Sequence[Ask]) -> list[Successors]:
        if self._between:
            self._between = False
            self.prepare(sorted({ask.row for ask in asked}))
        sample, replacement = self._generation.sample, self._generation.replacement
        answers: list[Successors] = [NOTHING] * len(asked)
        places = [place for place, ask in enumerate(asked) if self.goes_beyond(ask)]
        laws = self._laws([asked[place] for place in places]) if places else ()
        for place, law in zip(places, laws, strict=True):
            answers[place] = successors_of(law, sample=sample, replacement=replacement)
        return answers

    def settle(self) -> None:
        self._between = True
        self._retreat()

    def release(self) -> None:
        """Let go of the target's cache and of what reads it."""
        self._generation = Generation(())
        vars(self).pop("_session", None)  # there is none where the generation failed to begin

    # --- steps -----------------------------------------------------------------------------------

    def _laws(self, asked: Sequence[Ask]) -> torch.Tensor:
        """Run a step for the tokens asked about: ``[R, V]``."""
        growing = {ask.row: ask.growing for ask in asked}
        if not self._continues(asked, growing):
            self._retreat()
        logits = self._session.step(self._step_tokens(growing))
        rows = [ask.row for ask in asked]
        columns = [ask.node - self._ahead[ask.row] for ask in asked]
        self._advance(growing)
        return self.law(logits[rows, columns])

    def _retreat(self) -> None:
        if any(self._ahead):
            self._session.retreat()
            self._ahead = [0] * len(self._ahead)

    def _continues(self, asked: Sequence[Ask], growing: dict[int, Growing]) -> bool:
        """Whether a step of what is new answers: nothing new grew below, or is asked about, the trunk."""
        if any(ask.node < self._ahead[ask.row] for ask in asked):
            return False
        if any(self._ahead[row] > trunk_of(one) for row, one in growing.items()):
            return False
        widest = max(len(one) + 1 - self._ahead[row] for row, one in growing.items())
        # Ring buffers hold so many tokens beyond a row's text, padding included.
        return max(self._ahead) + widest <= MAX_TREE_TOKENS

    def _step_tokens(self, growing: dict[int, Growing]) -> StepTokens:
        """Every row's tokens above its trunk; rows that do not grow take no part."""
        tokens: list[list[int]] = [[] for _ in self._roots]
        depths: list[list[int]] = [[] for _ in self._roots]
        masks: list[list[int]] = [[] for _ in self._roots]
        branched = False
        for row, one in growing.items():
            start = self._ahead[row]
            tokens[row] = [self._roots[row], *one.tokens][start:]
            branched |= trunk_of(one) < len(one) + 1
            for index, node in enumerate(range(start, len(one) + 1)):
                depths[row].append(one.depth(node) - start)
                parent = one.parents[node - 1] + 1 - start if node else -1
                masks[row].append((1 << index) | (masks[row][parent] if parent >= 0 else 0))
        counts = upload([len(row) for row in tokens], self._session.device)
        laid_out = [self._padded(lists) for lists in ((tokens, depths, masks) if branched else (tokens,))]
        return StepTokens(laid_out[0], counts, *(laid_out[1:] or (None, None)))

    def _padded(self, lists: list[list[int]]) -> torch.Tensor:
        width = max(len(row) for row in lists)
        return upload([row + [0] * (width - len(row)) for row in lists], self._session.device)

    def _advance(self, growing: dict[int, Growing]) -> None:
        more = [0] * len(self._ahead)
        for row, one in growing.items():
            more[row] = trunk_of(one) - self._ahead[row]
        if any(more):
            self._session.advance(more)
            self._ahead = [ahead + n for ahead, n in zip(self._ahead, more, strict=True)]


def trunk_of(growing: Growing) -> int:
    """How many tokens, from the root on, everything else has grown above: the whole of a chain."""
    last = len(growing)  # of the trunk, so far
    for index, parent in enumerate(growing.parents):
        if parent + 1 < index:  # the step token index + 1 does not follow the one before it
            last = min(last, parent + 1)
    return last + 1
