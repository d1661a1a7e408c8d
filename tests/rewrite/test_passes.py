"""The pass protocol: strings, order, records, force, rollback."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphwright.cost_model.target import Target
from graphwright.cost_model.workload import Workload
from graphwright.ir.errors import GraphwrightError, PassError
from graphwright.ir.graph import Graph, argument
from graphwright.ir.printer import to_python
from graphwright.passes.absorb_projections import AbsorbProjections
from graphwright.passes.base import (
    CostDelta,
    Fidelity,
    Pass,
    Site,
    Verdict,
    order_passes,
    parse_pass,
    registered_passes,
)
from graphwright.passes.compile_layers import CompileLayers
from graphwright.passes.place_cache import CUTS, PlaceCache
from graphwright.passes.speculate import MOST_TOKENS, Speculate
from tests.rewrite.cached_programs import TARGET, WORKLOAD


@dataclass(frozen=True)
class Scale(Pass):
    """Doubles the scale of every attention; for these tests only, and not registered.

    Options:
        seconds: what it claims to change.
        fault: ``raise`` fails after the first edit, ``invalid`` leaves a graph that breaks an invariant.
        legal_sites: attentions where it says it may apply.
    """

    name: ClassVar[str] = "scale"
    summary: ClassVar[str] = "for tests"
    fidelity: ClassVar[Fidelity] = "lossy"

    seconds: float = -1.0
    fault: str = "none"
    legal_sites: int = 2

    def find(self, graph: Graph) -> list[Site]:
        return [Site(f"site {i}", (n,), {"index": i}) for i, n in enumerate(graph.calls("attention"))]

    def legal(self, site: Site) -> Verdict:
        ok = site.info["index"] < self.legal_sites
        return Verdict(ok, "may be scaled" if ok else "too far up")

    def gain(self, site: Site, workload: Workload, target: Target) -> CostDelta:
        return CostDelta(self.seconds, 0.0, "as claimed")

    def apply(self, site: Site, graph: Graph) -> None:
        node = site.nodes[0]
        node.args = (*node.args[:3], argument(node, "scale") * 2, *node.args[4:])
        graph.annotations["scaled"] = True
        if self.fault == "raise" and site.info["index"] == 1:
            raise RuntimeError("out of paint")
        if self.fault == "invalid":
            graph.emit(torch.ops.aten.relu_.default, node.args[0], after=node.args[0])


def scales(graph: Graph) -> list[float]:
    return [argument(node, "scale") for node in graph.calls("attention")]


# --- strings -------------------------------------------------------------------------------------

POSITIVE = st.integers(1, MOST_TOKENS)
PASSES = st.one_of(
    st.builds(PlaceCache, cut=st.sampled_from(CUTS)),
    st.builds(AbsorbProjections),
    st.builds(CompileLayers),
    st.builds(
        Speculate,
        drafter=st.from_regex(r"[a-z][a-z_]{0,10}", fullmatch=True),
        tokens=POSITIVE,
        tree=st.sampled_from(["chain", "fixed(widths=2+1)"]),
        rule=st.sampled_from(["fixed", "adaptive(high=9)"]),
        acceptance=st.floats(0, 1),
    ),
)


@given(PASSES)
def test_a_pass_parses_back_from_what_it_prints(chosen: Pass) -> None:
    assert parse_pass(str(chosen)) == chosen


@given(PASSES)
def test_a_pass_object_is_taken_as_it_is(chosen: Pass) -> None:
    assert parse_pass(chosen) is chosen


def test_only_changed_options_are_printed() -> None:
    assert str(PlaceCache()) == "place_cache"
    assert str(PlaceCache("kv")) == "place_cache{cut=kv}"


def test_spaces_and_empty_braces_parse() -> None:
    assert parse_pass(" place_cache{ cut = kv } ") == PlaceCache("kv")
    assert parse_pass("place_cache{}") == PlaceCache()


@pytest.mark.parametrize(
    ("text", "what", "hint"),
    [
        ("place_cash", "no pass named 'place_cash'", "place_cache"),
        ("place_cache{cute=kv}", "no option 'cute'", "cut"),
        ("place_cache{kv}", "no option 'kv'", "cut"),
        ("place_cache{cut=kv", "closing brace", "place_cache{"),
        ("place_cache{cut=none}", "no cut 'none'", "minimum"),
        ("speculate{tokens=many}", "'many' is not a value for speculate.tokens", "int"),
        ("speculate{acceptance=1.5}", "acceptance=1.5", "0.0 to 1.0"),
    ],
)
def test_bad_strings_are_explained(text: str, what: str, hint: str) -> None:
    with pytest.raises(PassError) as caught:
        parse_pass(text)
    assert what in caught.value.what
    assert caught.value.hint is not None and hint in caught.value.hint
    assert isinstance(caught.value, GraphwrightError)


def test_every_registered_pass_says_what_it_is() -> None:
    known = registered_passes()
    assert {"place_cache", "absorb_projections", "compile_layers", "speculate"} <= set(known)
    for name, cls in known.items():
        assert (
            cls.name == name
            and cls.summary
            and cls.fidelity in ("exact", "reordered", "distribution", "lossy")
        )
    assert "scale" not in known


# --- order ---------------------------------------------------------------------------------------


def test_what_is_required_comes_first() -> None:
    chosen = [Speculate(), AbsorbProjections(), PlaceCache(), CompileLayers()]
    ordered = order_passes(chosen)
    assert sorted(map(str, ordered)) == sorted(map(str, chosen))
    assert ordered.index(PlaceCache()) < min(ordered.index(Speculate()), ordered.index(AbsorbProjections()))


def test_the_given_order_breaks_ties() -> None:
    free = [CompileLayers(), PlaceCache()]
    assert order_passes(free) == free
    assert order_passes(free[::-1]) == free[::-1]
    assert order_passes([]) == []


def test_a_missing_requirement_names_who_provides_it() -> None:
    with pytest.raises(PassError, match=r"speculate.* needs cache") as caught:
        order_passes([CompileLayers(), Speculate()])
    assert caught.value.hint is not None and "place_cache" in caught.value.hint


# --- applying ------------------------------------------------------------------------------------


def test_records_say_what_happened_at_each_site(captured) -> None:
    graph = captured("llama").canonical.copy()
    before = scales(graph)
    records = Scale(legal_sites=1)(graph, WORKLOAD, TARGET)
    assert [(r.site, r.status) for r in records] == [("site 0", "applied"), ("site 1", "illegal")]
    assert records[0].reason == "may be scaled; as claimed" and records[1].reason == "too far up"
    assert records[0].predicted == {"seconds_per_token": -1.0, "memory_bytes": 0.0}
    assert all(r.fidelity == "lossy" and r.pass_string == "scale{legal_sites=1}" for r in records)
    assert scales(graph) == [before[0] * 2, before[1]]


def test_what_does_not_pay_is_left_alone(captured) -> None:
    graph = captured("llama").canonical.copy()
    text = to_python(graph)
    records = Scale(seconds=1.0)(graph, WORKLOAD, TARGET)
    assert [(r.status, r.reason) for r in records] == [("unprofitable", "as claimed")] * 2
    assert to_python(graph) == text


def test_force_applies_what_does_not_pay_but_not_what_is_illegal(captured) -> None:
    graph = captured("llama").canonical.copy()
    records = Scale(seconds=1.0, legal_sites=1)(graph, WORKLOAD, TARGET, force=True)
    assert [r.status for r in records] == ["applied", "illegal"]


def test_no_site_is_one_record(captured) -> None:
    records = AbsorbProjections()(captured("llama").canonical.copy(), WORKLOAD, TARGET)
    assert [(r.site, r.status) for r in records] == [("program", "not found")]


@pytest.mark.parametrize(("fault", "what"), [("raise", "out of paint"), ("invalid", "mutation")])
def test_a_failing_pass_leaves_the_graph_as_it_was(captured, fault: str, what: str) -> None:
    graph = captured("llama").canonical.copy()
    text, before, parameters = to_python(graph), scales(graph), dict(graph.parameters)
    with pytest.raises(PassError, match="rolled back") as caught:
        Scale(fault=fault)(graph, WORKLOAD, TARGET)
    assert what in caught.value.what and caught.value.where == "scale"
    assert to_python(graph) == text and scales(graph) == before
    assert graph.annotations == {} and graph.parameters == parameters
    # and it can still be rewritten
    assert Scale()(graph, WORKLOAD, TARGET)[0].status == "applied"


@pytest.mark.parametrize(
    ("seconds", "memory", "expected"), [(-1, 5, True), (0, -1, True), (0, 0, False), (1, -5, False)]
)
def test_profitable_is_faster_or_as_fast_and_smaller(seconds: float, memory: float, expected: bool) -> None:
    assert CostDelta(seconds, memory).profitable is expected
