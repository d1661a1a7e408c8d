"""The raisers: what canonicalization consists of, in an order that their declared needs decide."""

from __future__ import annotations

import graphlib
from collections.abc import Callable
from dataclasses import dataclass

from graphwright.ir.canonicalize.rewriter import Rewriter
from graphwright.ir.errors import PassError


@dataclass(frozen=True)
class Raiser:
    """One step of canonicalization.

    Args:
        name: what it raises, normally the name of a semantic op.
        after: names of the raisers whose result it reads.
        run: edits the graph through the rewriter.
        summary: one line for people.
    """

    name: str
    after: tuple[str, ...]
    run: Callable[[Rewriter], None]
    summary: str


RAISERS: dict[str, Raiser] = {}


def raiser(name: str, *, after: tuple[str, ...] = ()) -> Callable[[Callable[[Rewriter], None]], Callable]:
    """Register a function as a raiser; ``after`` names the raisers that it needs to have run."""

    def register(run: Callable[[Rewriter], None]) -> Callable:
        if name in RAISERS:
            raise PassError(f"two raisers are called {name!r}", where=run.__module__, hint="rename one")
        RAISERS[name] = Raiser(name, after, run, (run.__doc__ or "").strip().splitlines()[0])
        return run

    return register


def in_order(raisers: dict[str, Raiser] | None = None) -> list[Raiser]:
    """All raisers, each after the ones that it names; the order does not depend on imports.

    Raises:
        PassError: a need is unknown, or two raisers need each other.
    """
    known = RAISERS if raisers is None else raisers
    for item in known.values():
        for need in item.after:
            if need not in known:
                raise PassError(
                    f"raiser {item.name!r} runs after {need!r}, which does not exist",
                    hint=f"known raisers: {', '.join(sorted(known))}",
                )
    sorter = graphlib.TopologicalSorter({name: sorted(known[name].after) for name in sorted(known)})
    try:
        return [known[name] for name in sorter.static_order()]
    except graphlib.CycleError as error:
        raise PassError(f"raisers need each other: {' -> '.join(error.args[1])}") from error
