"""Drafters: who guesses the next tokens. One method, one file; found by name through a registry."""

from __future__ import annotations

import difflib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import entry_points
from typing import Any, ClassVar, TypeVar

import torch

from graphwright.ir.errors import InputError
from graphwright.runtime.speculation.tree import check_tree, children, is_chain


@dataclass(frozen=True)
class Draft:
    """Guessed tokens for one row, as a tree below the last committed token.

    Args:
        tokens: N token ids.
        parents: ``[N]`` index of each token's parent, -1 for the root; None for a chain.
        q: ``[N, V]`` the distributions the tokens were *drawn* from, for a chain; None when the
            drafter is deterministic given the text so far. Sampling verification is exact only if
            this is true.

    Raises:
        InputError: the parents are not a tree, siblings repeat a token, or q came with a tree.
    """

    tokens: Sequence[int] = ()
    parents: Sequence[int] | None = None
    q: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.parents is not None:
            check_tree(self.tokens, self.parents)
            if is_chain(self.parents):
                object.__setattr__(self, "parents", None)
        if self.q is not None and (self.parents is not None or self.q.shape[0] != len(self.tokens)):
            raise InputError("q needs a chain and one distribution for each of its tokens", where="Draft")

    @cached_property
    def successors(self) -> list[dict[int, int]]:
        """For every token of the step (root first), its children as ``{token: draft index}``."""
        if self.parents is None:
            return [{token: index} for index, token in enumerate(self.tokens)] + [{}]
        return children(self.tokens, self.parents)


#: No guess: the row takes a plain step.
NO_DRAFT = Draft()


class Drafter(ABC):
    """Guesses tokens for the rows of one generation. Options are keyword arguments of the constructor.

    A drafter is used by one generation at a time; ``begin`` forgets the one before. Rows are numbered
    as in the batch throughout.
    """

    #: Set by :func:`drafter`.
    name: ClassVar[str] = ""
    #: Ask the loop for the target's logits in :meth:`observe`.
    wants_logits: ClassVar[bool] = False

    @abstractmethod
    def begin(self, prompts: list[list[int]], program: Any) -> None:
        """Start a generation from each row's prompt tokens; ``program`` is the target's program."""

    @abstractmethod
    def propose(self, rows: Sequence[int], budget: Sequence[int]) -> list[Draft]:
        """Guess at most ``budget[i]`` tokens to follow everything that row ``rows[i]`` has observed.

        Every budget is at least 1; rows that may not draft now are left out.

        Returns:
            One draft for each of ``rows``; :data:`NO_DRAFT` where there is no guess.
        """

    @abstractmethod
    def observe(self, row: int, tokens: Sequence[int], *, logits: torch.Tensor | None = None) -> None:
        """The row grew by ``tokens``; ``logits [len(tokens), V]`` chose them if :attr:`wants_logits`."""

    def default_length(self) -> int:
        """Tokens per draft when no length rule is given."""
        return 8

    def __str__(self) -> str:
        return self.name


_DRAFTERS: dict[str, type[Drafter]] = {}
_D = TypeVar("_D", bound=type[Drafter])


def drafter(name: str) -> Callable[[_D], _D]:
    """Register a drafter class under ``name``; its docstring's first line describes it."""

    def register(cls: _D) -> _D:
        cls.name = name
        _DRAFTERS[name] = cls
        return cls

    return register


def _load_plugins() -> None:
    for point in entry_points(group="graphwright.drafters"):
        if point.name not in _DRAFTERS:
            drafter(point.name)(point.load())


def drafters() -> dict[str, str]:
    """Every drafter's name and what it is, in one line each."""
    _load_plugins()
    return {name: (inspect.getdoc(cls) or "").splitlines()[0] for name, cls in sorted(_DRAFTERS.items())}


def drafter_class(name: str) -> type[Drafter]:
    """The class of the drafter ``name``.

    Raises:
        InputError: there is no such drafter; the nearest names are in the hint.
    """
    known = drafters()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or sorted(known)
        raise InputError(
            f"there is no drafter '{name}'", where="drafter", hint=f"did you mean {', '.join(near)}?"
        )
    return _DRAFTERS[name]


def drafter_options(name: str, offered: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the offered options that the drafter ``name`` takes; none if there is no such drafter."""
    known = inspect.signature(_DRAFTERS[name]).parameters if name in drafters() else {}
    return {option: value for option, value in offered.items() if option in known}


def make_drafter(name: str, **options: Any) -> Drafter:
    """Build the drafter ``name`` with ``options``.

    Raises:
        InputError: there is no such drafter or option; the nearest names are in the hint.
    """
    cls = drafter_class(name)
    accepted = list(inspect.signature(cls).parameters)
    wrong = sorted(set(options) - set(accepted))
    if wrong:
        raise InputError(
            f"drafter '{name}' has no option {', '.join(wrong)}",
            where=f"drafter={name}",
            hint=f"its options are {', '.join(accepted) or 'none'}",
        )
    return cls(**options)
