"""The pass protocol: a rewrite is a frozen dataclass that finds, judges, prices and applies itself.

A pass prints as one string, ``speculate{drafter=ngram,tokens=8}``, and parses back from it. A
subclass writes four methods; the base owns verification, records and rollback:

- ``find(graph)``: where could this apply?
- ``legal(site)``: may it, and if not why? Never reads the hardware.
- ``gain(site, workload, target)``: what would it change? Never edits, holds no thresholds.
- ``apply(site, graph)``: do it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, final, get_type_hints

from graphwright.ir.errors import GraphwrightError, PassError
from graphwright.ir.graph import Graph, layer_number
from graphwright.ir.verifier import verify

if TYPE_CHECKING:
    from torch.fx.node import Node

    from graphwright.cost_model.target import Target
    from graphwright.cost_model.workload import Workload

Fidelity = Literal["exact", "reordered", "distribution", "lossy"]


@dataclass(frozen=True)
class Site:
    """A place in a graph where a pass could apply.

    Attributes:
        name: what the report calls it, usually a module path.
        nodes: the nodes that ``apply`` starts from.
        info: what ``find`` learned and the other methods need.
    """

    name: str
    nodes: tuple[Node, ...] = ()
    info: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def layer(self) -> int | None:
        """The decoder layer that the name points into; None for a site of the whole program."""
        return layer_number(self.name)


@dataclass(frozen=True)
class StepShape:
    """What a program-wide pass makes of a decode step, for its price.

    Attributes:
        tokens: tokens per row that a step runs.
        expected: tokens per row that it yields on average.
        share: how many of the steps have this shape; the others run one token and yield one.
        draft_seconds: making the drafts of one such step.
    """

    tokens: int = 1
    expected: float = 1.0
    share: float = 1.0
    draft_seconds: float = 0.0

    @property
    def tokens_per_step(self) -> float:
        """Tokens per row and step, over steps of both kinds."""
        return self.share * self.expected + (1 - self.share)


@dataclass(frozen=True)
class Verdict:
    """Whether a pass may apply at a site, and why (not)."""

    ok: bool
    reason: str


@dataclass(frozen=True)
class CostDelta:
    """What applying would change; negative is better.

    Attributes:
        seconds_per_token: change of the decode time of one token.
        memory_bytes: change of the resident bytes at the workload's full context.
        note: the arithmetic in words, for the report.
    """

    seconds_per_token: float = 0.0
    memory_bytes: float = 0.0
    note: str = ""

    @property
    def profitable(self) -> bool:
        """Faster, or as fast and smaller."""
        return (self.seconds_per_token, self.memory_bytes) < (0.0, 0.0)


@dataclass(frozen=True)
class SiteRecord:
    """What a pass did at one site; the optimizer turns these into report decisions."""

    pass_string: str
    site: str
    status: Literal["applied", "illegal", "unprofitable", "not found"]
    reason: str
    fidelity: Fidelity
    predicted: dict[str, float] | None = None


@dataclass(frozen=True)
class Pass(ABC):
    """Base of every rewrite. Fields of the subclass are its options.

    Options of every pass:
        layers: the decoder layers to apply to, ``0-3+7``; all of them by default.

    Class attributes:
        scope: ``site`` for a pass that the planner may apply layer by layer, ``program`` for one choice
            for the whole program.
        needs_context: what a lossy pass loses shows behind a long context only; it is measured there.
        requires, provides: facts about the graph that have to hold before, and that hold after.
        follows: names of the passes that come before this one where both are in a list.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    fidelity: ClassVar[Fidelity]
    needs_context: ClassVar[bool] = False
    scope: ClassVar[Literal["site", "program"]] = "site"
    requires: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()
    follows: ClassVar[frozenset[str]] = frozenset()

    layers: str = field(default="", kw_only=True)

    @classmethod
    def variants(cls) -> list[Pass]:
        """What the planner tries: the pass in each form worth pricing. Default: as it is by itself."""
        return [cls()]

    @classmethod
    def proposed(cls, workload: Workload) -> list[Pass]:
        """What the planner tries for a workload. Default: :meth:`variants`, whatever the workload."""
        return cls.variants()

    def step_shape(self) -> StepShape:
        """For a program-wide pass: how many tokens a step runs and yields. Default: one."""
        return StepShape()

    @abstractmethod
    def find(self, graph: Graph) -> list[Site]:
        """Every place where this pass could apply."""

    @abstractmethod
    def legal(self, site: Site) -> Verdict:
        """Whether it may apply there."""

    @abstractmethod
    def gain(self, site: Site, workload: Workload, target: Target) -> CostDelta:
        """What applying there would change."""

    @abstractmethod
    def apply(self, site: Site, graph: Graph) -> None:
        """Rewrite the graph at this site."""

    def resolve(self, graph: Graph, workload: Workload, target: Target, memory: float | None) -> Pass:
        """Settle options that are ``auto``; ``memory`` is the limit in bytes. Default: nothing to settle."""
        return self

    @final
    def __call__(
        self, graph: Graph, workload: Workload, target: Target, *, force: bool = False, rollback: bool = True
    ) -> list[SiteRecord]:
        """Apply at every legal and profitable site; on an error the graph is as it was.

        Args:
            force: apply wherever it is legal, profitable or not (the pass was asked for by name).
            rollback: whether the graph must be as it was after an error; a copy of one's own need not.

        Raises:
            PassError: ``apply`` or the verifier failed.
        """
        snapshot = graph.copy() if rollback else graph
        try:
            sites = self._selected(self.find(graph))
            records = [self._at(site, graph, workload, target, force) for site in sites]
            if any(r.status == "applied" for r in records):
                graph.eliminate_dead_code()
                graph.drop_unused_placeholders()
                verify(graph)
        except Exception as error:
            graph.restore(snapshot)
            if isinstance(error, PassError):
                raise
            raise PassError(
                f"{self} failed and was rolled back: {error}",
                where=self.name,
                hint="leave the pass out, and report this with the model's configuration",
            ) from error
        return records or [SiteRecord(str(self), "program", "not found", "no site matches", self.fidelity)]

    def _selected(self, sites: list[Site]) -> list[Site]:
        wanted = parse_layers(self.layers)
        return sites if wanted is None else [site for site in sites if site.layer in wanted]

    def _at(self, site: Site, graph: Graph, workload: Workload, target: Target, force: bool) -> SiteRecord:
        verdict = self.legal(site)
        if not verdict.ok:
            return SiteRecord(str(self), site.name, "illegal", verdict.reason, self.fidelity)
        delta = self.gain(site, workload, target)
        predicted = {"seconds_per_token": delta.seconds_per_token, "memory_bytes": delta.memory_bytes}
        if not force and not delta.profitable:
            reason = delta.note or "the cost model predicts no gain"
            return SiteRecord(str(self), site.name, "unprofitable", reason, self.fidelity, predicted)
        self.apply(site, graph)
        reason = "; ".join(filter(None, (verdict.reason, delta.note)))
        return SiteRecord(str(self), site.name, "applied", reason, self.fidelity, predicted)

    def __str__(self) -> str:
        options = sorted(dataclasses.fields(self), key=lambda f: f.name == "layers")  # what, then where
        changed = [
            f"{f.name}={_spell(getattr(self, f.name))}" for f in options if getattr(self, f.name) != f.default
        ]
        return f"{self.name}{{{','.join(changed)}}}" if changed else self.name


# --- layers --------------------------------------------------------------------------------------


def parse_layers(text: str) -> frozenset[int] | None:
    """``"0-3+7"`` as layer numbers; None for the empty text, which means all.

    Raises:
        PassError: not numbers and ranges joined by ``+``.
    """
    if not text:
        return None
    found: set[int] = set()
    for part in text.split("+"):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise PassError(f"layers={text!r} names no layers", hint="write layers=0-3+7")
        found.update(range(first, last + 1))
    return frozenset(found)


def spell_layers(layers: Iterable[int]) -> str:
    """Layer numbers as :func:`parse_layers` reads them."""
    runs: list[list[int]] = []
    for layer in sorted(set(layers)):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return "+".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


# --- registry and strings ------------------------------------------------------------------------

_REGISTRY: dict[str, type[Pass]] = {}
P = TypeVar("P", bound=type[Pass])


def register_pass(cls: P) -> P:
    """Class decorator: make a pass known by its ``name``."""
    _REGISTRY[cls.name] = cls
    return cls


@functools.cache
def _load_entry_points() -> None:
    """Import the passes of other packages, once."""
    for entry in importlib.metadata.entry_points(group="graphwright.passes"):
        if entry.name not in _REGISTRY:
            entry.load()


def registered_passes() -> dict[str, type[Pass]]:
    """All passes by name, with those of other packages (entry points ``graphwright.passes``)."""
    import graphwright.passes  # noqa: F401  the package imports its own passes

    _load_entry_points()
    return dict(_REGISTRY)


def describe_passes() -> dict[str, str]:
    """Every pass with its summary and fidelity in one line."""
    return {name: f"{cls.summary} ({cls.fidelity})" for name, cls in sorted(registered_passes().items())}


def parse_pass(text: str | Pass) -> Pass:
    """``"place_cache{cut=kv}"`` as a pass object.

    Raises:
        PassError: unknown pass or option, or a value that does not parse.
    """
    if isinstance(text, Pass):
        return text
    name, _, rest = text.strip().partition("{")
    known = registered_passes()
    if name not in known:
        raise PassError(f"there is no pass named {name!r}", hint=f"known passes: {', '.join(sorted(known))}")
    if rest and not rest.endswith("}"):
        raise PassError(f"{text!r} lacks its closing brace", hint=f"write {name}{{option=value,...}}")
    cls = known[name]
    types = get_type_hints(cls)
    options: dict[str, Any] = {}
    for item in filter(None, _split_options(rest.removesuffix("}"))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not _takes(cls, key):
            names = ", ".join(f.name for f in dataclasses.fields(cls) if _takes(cls, f.name)) or "none"
            raise PassError(f"{name} has no option {key!r}", hint=f"its options: {names}")
        options[key] = _parse_value(types[key], value, f"{name}.{key}")
    parse_layers(options.get("layers", ""))
    try:
        return cls(**options)
    except GraphwrightError:
        raise
    except (TypeError, ValueError) as error:
        raise PassError(f"{text!r} is not a valid pass: {error}") from error


def _split_options(text: str) -> list[str]:
    """Split at commas outside of parentheses: ``codec=outliers(fraction=0.01, axis=token),page=32``."""
    return re.split(r",(?![^()]*\))", text)


def _takes(cls: type[Pass], option: str) -> bool:
    """Whether an option is one of the pass's; a pass for the whole program has no layers."""
    if option == "layers" and cls.scope == "program":
        return False
    return option in {f.name for f in dataclasses.fields(cls)}


def in_chain_order(classes: Iterable[type[Pass]]) -> list[type[Pass]]:
    """Kinds of passes, each after those that it follows; otherwise as they come."""
    waiting, ordered = list(classes), []
    while waiting:
        names = {cls.name for cls in waiting}
        first = next((cls for cls in waiting if not cls.follows & (names - {cls.name})), waiting[0])
        waiting.remove(first)
        ordered.append(first)
    return ordered


def order_passes(chosen: Iterable[Pass]) -> list[Pass]:
    """Order by ``requires``, ``provides`` and ``follows``; the given order breaks ties.

    Raises:
        PassError: something that is required is provided by no pass of the list.
    """
    waiting = list(chosen)
    offered = frozenset().union(*(p.provides for p in waiting)) if waiting else frozenset()
    ordered: list[Pass] = []
    done: frozenset[str] = frozenset()
    while waiting:
        able = [p for p in waiting if p.requires & offered <= done and p.requires <= offered]
        names = {p.name for p in waiting}
        ready = next((p for p in able if not p.follows & (names - {p.name})), None)
        if ready is None:
            stuck = waiting[0]
            missing = ", ".join(sorted(stuck.requires - done))
            providers = [n for n, c in registered_passes().items() if c.provides & stuck.requires]
            raise PassError(
                f"{stuck} needs {missing}, which no pass of the list provides",
                hint=f"add {' or '.join(providers) or 'a pass that provides it'} to the list",
            )
        waiting.remove(ready)
        ordered.append(ready)
        done |= ready.provides
    return ordered


def _spell(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _parse_value(kind: Any, text: str, where: str) -> Any:
    converters: dict[Any, Callable[[str], Any]] = {int: int, float: float, bool: _parse_bool}
    try:
        return converters.get(kind, str)(text)
    except ValueError:
        raise PassError(f"{text!r} is not a value for {where}", hint=f"give a {kind.__name__}") from None


def _parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"
