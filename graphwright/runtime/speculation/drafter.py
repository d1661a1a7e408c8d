"""Drafters: who guesses the next tokens. One method, one file; found by name through a registry.

A :class:`Drafter` proposes whole drafts. A :class:`PathDrafter` says what may follow any path below the last
token; which paths are followed is a tree's choice (:mod:`graphwright.runtime.speculation.trees`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch

from graphwright.runtime.speculation.draft import NO_DRAFT, Draft
from graphwright.runtime.speculation.growing import Ask, grow
from graphwright.runtime.speculation.parts import Part, Registry
from graphwright.runtime.speculation.successors import Successors


@dataclass(frozen=True)
class Generation:
    """What a drafter knows of the generation that it drafts for.

    Attributes:
        prompts: each row's tokens.
        program: the target's program; None where drafts are replayed over a text.
        state: its cache, which holds the prompts; None with the program.
        capacity: tokens that a row may reach, prompt and new together.
        sample: tokens are drawn; a drafter with a distribution may then draw as well, and say so in ``q``.
        temperature: of the request, for drafters that want to draw alike.
        replacement: the verifier wants siblings drawn with replacement.
    """

    prompts: Sequence[list[int]]
    program: Any = None
    state: Any = None
    capacity: int = 0
    sample: bool = False
    temperature: float = 1.0
    replacement: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of one row's step.

    Attributes:
        tokens: what the row gained, in order; the last of them was never drafted, or ended the row.
        draft: what was verified; :data:`NO_DRAFT` for the prompt's own logits and plain steps.
        path: draft indices that were accepted, from the root down.
        logits: ``[T, V]`` of the step's tokens, root first, T at least ``1 + len(draft.tokens)``: a view that
            is good until the next step. None where drafts are replayed over a text.
        hidden: the residual stream ``[T, H]`` before the first block and after each one, for drafters with
            :attr:`Drafter.wants_hidden`; empty after the prompt.
    """

    tokens: Sequence[int]
    draft: Draft = NO_DRAFT
    path: Sequence[int] = ()
    logits: torch.Tensor | None = None
    hidden: Sequence[torch.Tensor] = ()

    @property
    def nodes(self) -> list[int]:
        """The step token whose logits chose each of :attr:`tokens`."""
        return [0, *(index + 1 for index in self.path)][: len(self.tokens)]

    def chosen_logits(self) -> torch.Tensor:
        """``[len(tokens), V]``, which chose each of :attr:`tokens`."""
        assert self.logits is not None, "drafters that want logits say so by wants_logits"
        return self.logits[self.nodes]


class Drafter(Part, ABC):
    """Guesses tokens for the rows of one generation. A dataclass; its fields are its options.

    A drafter is used by one generation at a time; ``begin`` forgets the one before. Rows are numbered
    as in the batch throughout.
    """

    #: Cannot draft without the target's logits: a text alone does not say how good it is.
    wants_logits: ClassVar[bool] = False
    #: Ask the program for its residual stream, see :attr:`Outcome.hidden`.
    wants_hidden: ClassVar[bool] = False
    #: Proposes trees of its own.
    makes_trees: ClassVar[bool] = False
    #: How the planner tries it: options of ``speculate`` beside the drafter. By default not at all.
    proposals: ClassVar[Sequence[Mapping[str, Any]]] = ()

    @abstractmethod
    def begin(self, generation: Generation) -> None:
        """Start a generation whose prompts are in the cache."""

    @abstractmethod
    def propose(self, rows: Sequence[int], budget: Sequence[int]) -> list[Draft]:
        """Guess at most ``budget[i]`` tokens to follow everything that row ``rows[i]`` has observed.

        Every budget is at least 1; rows that may not draft now are left out.

        Returns:
            One draft for each of ``rows``; :data:`NO_DRAFT` where there is no guess.
        """

    @abstractmethod
    def observe(self, row: int, outcome: Outcome) -> None:
        """The row grew by ``outcome.tokens``. The first call follows the prompt."""

    def default_length(self) -> int:
        """Tokens per draft when no length rule is given."""
        return 8

    def draft_passes(self) -> tuple[str, ...]:
        """Passes that make the draft program's graph of the target's: ``Program.draft`` runs it over the
        target's cache. Default: none, there is no such program.
        """
        return ()

    def stopped(self) -> str | None:
        """Why a row of this generation went without drafts, for the statistics. Default: None."""
        return None

    def release(self) -> None:
        """The generation is over: give back what was borrowed for it. Default: nothing."""


class PathDrafter(Drafter):
    """A drafter that can say what follows any path: a tree grows its drafts."""

    @abstractmethod
    def look(self, asked: Sequence[Ask]) -> list[Successors]:
        """What may follow each of the step tokens asked about, one answer for each.

        Called once a round for all rows: a model drafter runs one step for all of them.
        """

    def settle(self) -> None:
        """The drafts of this cycle are complete: undo what :meth:`look` left in a cache. Default: nothing."""

    def propose(self, rows: Sequence[int], budget: Sequence[int]) -> list[Draft]:
        """Chains; with another tree, :func:`graphwright.runtime.speculation.growing.grow` asks directly."""
        from graphwright.runtime.speculation.trees.chain import Chain

        return [one.draft() for one in grow(Chain(), self, rows, budget, [0.0] * len(rows))]


_REGISTRY: Registry[Drafter] = Registry(
    "drafter",
    "graphwright.runtime.speculation.drafters",
    "ngram or ngram(max_ngram=4)",
    "graphwright.drafters",
)
_D = TypeVar("_D", bound=type[Drafter])


def drafter(name: str) -> Callable[[_D], _D]:
    """Register a drafter's dataclass under ``name``; its docstring's first line describes it."""
    return _REGISTRY.register(name)


def describe_drafters() -> dict[str, str]:
    """Every drafter's name and what it is, in one line each."""
    return _REGISTRY.describe()


def drafter_classes() -> dict[str, type[Drafter]]:
    """Every drafter's class by name."""
    return dict(sorted(_REGISTRY.classes().items()))


def parse_drafter(text: str) -> Drafter:
    """A drafter from ``name(option=value)``.

    Raises:
        InputError: there is no such drafter or option; the nearest names are in the hint.
    """
    return _REGISTRY.parse(text)


def make_drafter(name: str, **options: Any) -> Drafter:
    """Build the drafter ``name`` with ``options``.

    Raises:
        InputError: there is no such drafter or option; the nearest names are in the hint.
    """
    return _REGISTRY.make(name, **options)
