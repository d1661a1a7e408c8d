"""Chains of lossy passes: how many there are, and that they are rewritten where layers differ only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import graphwright as gw
from graphwright.cost_model.target import resolve_target
from graphwright.optimizer.driver import capture_step
from graphwright.optimizer.planner import Request, menu
from graphwright.optimizer.planner.alternatives import find_alternatives, place_in_chain
from graphwright.optimizer.quality import Sensitivity
from graphwright.passes import base
from graphwright.passes.compile_layers import CompileLayers
from graphwright.passes.place_cache import PlaceCache
from graphwright.passes.quantize_cache import QuantizeCache
from graphwright.passes.sparsify_attention import SparsifyAttention
from tests.architectures import tiny_model

WORKLOAD = gw.Workload(batch=4, prompt=1500, generate=64)


def measured(graph: Any, passes: Any) -> dict[tuple[str, str], Sensitivity]:
    return {(s.name, str(p)): Sensitivity(0.001, 0.001) for p in passes for s in p.find(graph)}


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    known = (PlaceCache, CompileLayers, QuantizeCache, SparsifyAttention)
    monkeypatch.setattr(base, "_REGISTRY", {p.name: p for p in known})


def request() -> Request:
    budget = gw.Budget(kl=1.0)
    return Request(resolve_target("h100"), WORKLOAD, budget, 2048, measure_loss=measured)


@pytest.fixture(scope="module")
def graph() -> Any:
    """Four layers, of which those in the middle are alike."""
    found = capture_step(tiny_model("llama", device="meta", layers=4))[0]
    found.annotations["compile"] = False
    return found


def test_a_second_lossy_pass_comes_in_one_form(graph: Any) -> None:
    """And every chain with one is rewritten in one of all layers that are alike, in the same one."""
    found = [a for a in find_alternatives(graph, request()) if a.layers]
    lossy = [tuple(p.name for p in a.lossy) for a in found]
    assert lossy.count(("quantize_cache",)) == 4
    assert lossy.count(("sparsify_attention",)) == 3
    assert lossy.count(("quantize_cache", "sparsify_attention")) == 4
    assert len(found) == 12
    assert {a.lossy[1] for a in found if len(a.lossy) == 2} == {SparsifyAttention.variants()[1]}
    for a in found:
        assert a.layers == {0, 1, 2, 3}
        if a.lossy:
            assert dict(a.alike) == {0: 0, 1: 1, 2: 1, 3: 3}
        assert len(a.graph.calls("choose_pages")) == 3 * ("sparsify_attention" in a.name)
        if len(a.lossy) == 2:
            assert sorted(r.site for r in a.records if r.status == "applied") == [
                f"model.layers.{layer}.self_attn" for layer in range(4)
            ]


def test_a_program_has_its_passes_in_the_order_of_chains(graph: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that are packed and read by pages are so in this order, whatever the first layer has."""
    monkeypatch.setattr(QuantizeCache, "variants", classmethod(lambda cls: [cls(bits=4)]))
    found = menu.make_menu(graph, request())
    pages = next(a for a in found.usable if [p.name for p in a.lossy] == ["sparsify_attention"])
    both = next(a for a in found.usable if len(a.lossy) == 2)
    best = found.choose()

    sites = {f"layer {layer}": both.name for layer in range(4)} | {"layer 0": pages.name}
    names = [p.name for p in found.passes_of(replace(best, sites=sites))]
    assert names.index("quantize_cache") < names.index("sparsify_attention")
    assert (
        place_in_chain(PlaceCache()) < place_in_chain(QuantizeCache()) < place_in_chain(SparsifyAttention())
    )
