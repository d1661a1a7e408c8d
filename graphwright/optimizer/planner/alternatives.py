"""What could be done: chains of site passes, and sets of program-wide passes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from graphwright.cost_model.stores import StoreSpec, default_stores
from graphwright.ir.graph import Graph, layer_number
from graphwright.optimizer.planner.layers import AlikeLayers, Layer, in_layer
from graphwright.optimizer.planner.request import Request
from graphwright.passes.base import (
    Pass,
    SiteRecord,
    StepShape,
    in_chain_order,
    registered_passes,
    spell_layers,
)


@dataclass(frozen=True)
class Alternative:
    """One chain of site passes, tried on a copy of the graph at every layer.

    Attributes:
        passes: in order.
        graph: rewritten wherever the chain is legal; of alike layers a lossy pass rewrote only one.
        layers: where all of the chain applied.
        records: what the last pass of the chain did at each site.
        alike: by layer, the one that was rewritten in its place, where it was not itself.
    """

    passes: tuple[Pass, ...]
    graph: Graph
    layers: frozenset[Layer]
    records: tuple[SiteRecord, ...]
    alike: Mapping[int, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """``place_cache{cut=minimum} + absorb_projections``."""
        return name_of(self.passes)

    def sample(self, layer: Layer) -> Layer:
        """The layer of the graph that shows what becomes of this one."""
        return layer if layer is None else self.alike.get(layer, layer)

    @property
    def lossy(self) -> tuple[Pass, ...]:
        """The passes that change what the model computes."""
        return tuple(p for p in self.passes if p.fidelity == "lossy")

    @property
    def exact_name(self) -> str:
        """The name of the chain without them."""
        return name_of([p for p in self.passes if p.fidelity != "lossy"])


@dataclass(frozen=True)
class ProgramChoice:
    """One set of program-wide passes; the empty one is the plain program.

    Attributes:
        passes: in order.
        shape: tokens of a step, by the one pass that changes them.
    """

    passes: tuple[Pass, ...] = ()

    @property
    def name(self) -> str:
        """``compile_layers + speculate{drafter=ngram}``; ``plain`` for none."""
        return name_of(self.passes)

    @property
    def shape(self) -> StepShape:
        """What a step runs and yields."""
        return next((p.step_shape() for p in self.passes if p.step_shape() != StepShape()), StepShape())

    @property
    def rewriting(self) -> tuple[Pass, ...]:
        """The passes that change what a step of one token costs."""
        return tuple(p for p in self.passes if p.step_shape() == StepShape())


def name_of(passes: Sequence[Pass]) -> str:
    """Passes as one name."""
    return " + ".join(map(str, passes)) or "plain"


def place_in_chain(chosen: Pass) -> int:
    """Sorts passes as chains have them: what gives a program its cache, then the others in their order."""
    kinds = in_chain_order(registered_passes().values())
    return -1 if "cache" in chosen.provides else kinds.index(type(chosen))


def find_alternatives(graph: Graph, request: Request) -> Iterator[Alternative]:
    """Chains that begin by giving the program a cache; each further pass once, where what it needs is there.

    A chain whose last pass applies nowhere ends there, and is given all the same, for its reasons. A chain
    has two lossy passes at most, and the second one comes in one form only (:func:`_forms`): otherwise the
    number of chains would multiply with every such pass.

    Args:
        graph: the canonical graph; copied for each chain.
        request: lossy passes are tried only if it allows a loss.
    """
    classes = [cls for cls in in_chain_order(registered_passes().values()) if cls.scope == "site"]
    first = [p for cls in classes if "cache" in cls.provides for p in cls.variants()]
    rest = [cls for cls in classes if "cache" not in cls.provides]

    kinds: dict[str, AlikeLayers] = {}

    def extend(base: Alternative) -> Iterator[Alternative]:
        yield base
        if not base.layers:
            return
        provided = frozenset().union(*(p.provides for p in base.passes))
        for cls in rest:
            unusable = not cls.requires <= provided or (cls.fidelity == "lossy" and not request.allows_loss)
            # In one order: each set of passes is tried once.
            if unusable or any(
                type(p) in rest and rest.index(type(p)) >= rest.index(cls) for p in base.passes
            ):
                continue
            for chosen in _forms(cls, base):
                if chosen.fidelity == "lossy":
                    if not base.lossy:
                        kinds.setdefault(base.name, AlikeLayers(base.graph))
                    yield from extend(_sampled(base, kinds.get(base.exact_name), chosen, request))
                else:
                    yield from extend(_applied(base.graph, base, chosen, request))

    seen: set[tuple[StoreSpec, ...]] = set()
    for chosen in first:
        for found in extend(_applied(graph, None, chosen, request)):
            stores = tuple(default_stores(found.graph))
            # A cut that stores keys and values everywhere is no alternative to storing keys and values.
            if len(found.passes) == 1 and stores in seen:
                yield _same_as_before(found)
                break
            seen.add(stores)
            yield found


def _forms(cls: type[Pass], base: Alternative) -> Sequence[Pass]:
    """The forms of a pass that are tried on top of a chain: the middle one for a second lossy pass."""
    forms = cls.variants()
    if cls.fidelity != "lossy" or not base.lossy:
        return forms
    return forms[(len(forms) - 1) // 2 :][:1] if len(base.lossy) == 1 else ()


def _same_as_before(found: Alternative) -> Alternative:
    """A placement that gives the program of an earlier one: of no use, with the reason."""
    reason = "stores in every layer what another placement does"
    record = SiteRecord(str(found.passes[-1]), "program", "unprofitable", reason, found.passes[-1].fidelity)
    return replace(found, layers=frozenset(), records=(record,))


def _applied(graph: Graph, base: Alternative | None, chosen: Pass, request: Request) -> Alternative:
    trial = graph.copy()
    records = chosen(trial, request.workload, request.target, force=True, rollback=False)
    applied = frozenset(layer_number(r.site) for r in records if r.status == "applied")
    if base is None:
        return Alternative((chosen,), trial, applied, tuple(records))
    layers = frozenset(layer for layer in base.layers if base.sample(layer) in applied)
    return Alternative((*base.passes, chosen), trial, layers, tuple(records), base.alike)


def _sampled(base: Alternative, alike: AlikeLayers | None, chosen: Pass, request: Request) -> Alternative:
    """A lossy pass on top of a chain, applied to one of all layers that are alike.

    There are many variants of such passes, and their graphs are only priced: rewriting every one of a
    model's equal layers for each would be most of the planning.

    Args:
        base: the chain.
        alike: the layers of its exact part; None if that was not looked at.
        chosen: the pass.
        request: what is planned for.
    """
    samples = alike.samples(chosen) if alike is not None else {}
    if base.alike and samples:
        # Layers that the first lossy pass took for alike must be so for the second one, too: the graph shows
        # no others. What it left as they were, it found to be unlike all of these.
        agreed = all(samples.get(x) == samples.get(sample) for x, sample in base.alike.items())
        samples = dict(base.alike) if agreed else {}
    if not samples:
        return _applied(base.graph, base, chosen, request)
    found = _applied(base.graph, base, replace(chosen, layers=spell_layers(samples.values())), request)
    by_layer: dict[Layer, list[SiteRecord]] = {}
    for record in found.records:
        by_layer.setdefault(layer_number(record.site), []).append(record)
    records = tuple(
        replace(record, site=in_layer(record.site, layer), pass_string=str(chosen))
        for layer, sample in samples.items()
        for record in by_layer.get(sample, ())
    )
    applied = {layer for layer, sample in samples.items() if sample in _applied_layers(found.records)}
    layers = frozenset(layer for layer in base.layers if layer in applied)
    return Alternative((*base.passes, chosen), found.graph, layers, records, samples)


def _applied_layers(records: Sequence[SiteRecord]) -> set[Layer]:
    return {layer_number(r.site) for r in records if r.status == "applied"}


def find_program_choices(graph: Graph, request: Request) -> tuple[list[ProgramChoice], list[SiteRecord]]:
    """Every set of program-wide passes that is legal, the empty one first; and why the others are not.

    Args:
        graph: with a cache.
    """
    given: dict[str, list[Pass]] = {}
    for chosen in request.program_passes:
        given.setdefault(chosen.name, []).append(chosen)
    refused: list[SiteRecord] = []
    groups: list[list[Pass | None]] = []
    for name, cls in registered_passes().items():
        if cls.scope != "program":
            continue
        group: list[Pass | None] = [None]
        for chosen in given.get(name, []) or cls.proposed(request.workload):
            record = _refusal(chosen, graph, request)
            if record is None:
                group.append(chosen)
            else:
                refused.append(record)
        groups.append(group)
    choices = [
        ProgramChoice(tuple(p for p in combination if p)) for combination in itertools.product(*groups)
    ]
    return choices, refused


def _refusal(chosen: Pass, graph: Graph, request: Request) -> SiteRecord | None:
    """Why a program-wide pass may not apply; None if it may."""
    if chosen.fidelity == "lossy" and not request.allows_loss:
        return SiteRecord(str(chosen), "program", "illegal", "the budget allows no loss", chosen.fidelity)
    sites = chosen.find(graph)
    if not sites:
        return SiteRecord(str(chosen), "program", "not found", "no site matches", chosen.fidelity)
    verdicts = [chosen.legal(site) for site in sites]
    if any(verdict.ok for verdict in verdicts):
        return None
    return SiteRecord(str(chosen), "program", "illegal", verdicts[0].reason, chosen.fidelity)
