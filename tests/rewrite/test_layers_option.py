"""``layers=``: how it is written, what refuses it, and that other layers are left to another pass."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import graphwright as gw
from graphwright.ir.errors import PassError
from graphwright.ir.graph import Graph, value
from graphwright.passes.base import Site, parse_layers, parse_pass, registered_passes, spell_layers
from graphwright.passes.compile_layers import CompileLayers
from graphwright.passes.place_cache import PlaceCache
from tests.architectures import VOCAB
from tests.rewrite.cached_programs import largest_difference, program, rewrite

MIXED = ("place_cache{cut=kv,layers=0}", "place_cache{cut=minimum,layers=1}")


def widths(graph: Graph) -> dict[str, list[int]]:
    """Elements that each layer's stores keep of a token."""
    found: dict[str, list[int]] = {}
    for store in graph.placeholders("state"):
        _, heads, _, features = value(store).shape
        found.setdefault(store.meta["name"].rsplit(".", 1)[0], []).append(int(heads * features))
    return found


# --- how it is written ---------------------------------------------------------------------------


@given(st.sets(st.integers(0, 130), min_size=1))
def test_layers_parse_back_from_what_they_print(layers: set[int]) -> None:
    assert parse_layers(spell_layers(layers)) == layers
    chosen = PlaceCache("kv", layers=spell_layers(layers))
    assert parse_pass(str(chosen)) == chosen


@pytest.mark.parametrize(
    ("text", "layers"),
    [("0", {0}), ("0-3", {0, 1, 2, 3}), ("0-1+7", {0, 1, 7}), ("5-5", {5}), ("2+0-2", {0, 1, 2})],
)
def test_ranges_include_both_ends(text: str, layers: set[int]) -> None:
    assert parse_layers(text) == layers


def test_no_layers_means_all() -> None:
    assert parse_layers("") is None
    assert str(PlaceCache("kv", layers="")) == "place_cache{cut=kv}"


def test_runs_are_joined_when_printed() -> None:
    assert spell_layers([7, 0, 2, 1, 9, 8, 1]) == "0-2+7-9"
    assert str(PlaceCache("kv", layers="0-3+7")) == "place_cache{cut=kv,layers=0-3+7}"


@pytest.mark.parametrize("text", ["3-1", "a", "1-", "-1", "1,2", "0++2", "1.5", "0-2-4", "+"])
def test_bad_layers_are_refused(text: str) -> None:
    with pytest.raises(PassError) as caught:
        parse_layers(text)
    assert "names no layers" in caught.value.what and caught.value.hint == "write layers=0-3+7"


@pytest.mark.parametrize("text", ["place_cache{layers=3-1}", "place_cache{cut=kv,layers=first}"])
def test_a_pass_string_with_bad_layers_is_refused(text: str) -> None:
    with pytest.raises(PassError, match="names no layers"):
        parse_pass(text)


def test_passes_for_the_whole_program_have_no_layers() -> None:
    whole = [cls for cls in registered_passes().values() if cls.scope == "program"]
    assert CompileLayers in whole
    for cls in whole:
        with pytest.raises(PassError, match="no option 'layers'") as caught:
            parse_pass(f"{cls.name}{{layers=0}}")
        assert "layers" not in str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "layer"),
    [("model.layers.11.self_attn", 11), ("transformer.h.0.attn", 0), ("lm_head", None), ("program", None)],
)
def test_a_site_knows_its_layer(name: str, layer: int | None) -> None:
    assert Site(name).layer == layer


# --- where it applies ----------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["0", "1", "0-1"])
def test_only_the_named_layers_are_rewritten(captured, layers: str) -> None:
    graph, records = rewrite(captured("gpt2"), f"place_cache{{cut=kv,layers={layers}}}")
    wanted = parse_layers(layers)
    assert {parse_pass(r.pass_string).layers for r in records} == {layers}
    assert {Site(r.site).layer for r in records if r.status == "applied"} == wanted
    assert len(graph.calls("cache_attention")) == len(wanted) == 2 - len(graph.calls("attention"))


def test_layers_that_do_not_exist_are_no_sites(captured) -> None:
    _, records = rewrite(captured("gpt2"), "place_cache{cut=kv,layers=7-9}")
    assert [(r.site, r.status) for r in records] == [("program", "not found")]


@pytest.mark.parametrize("order", [MIXED, MIXED[::-1]])
def test_each_layer_stores_what_its_own_pass_says(captured, order: tuple[str, str]) -> None:
    """Keys and values (64 + 64 elements) in layer 0, the layer's input (64) in layer 1; logits as stock's."""
    gpt2 = captured("gpt2")
    graph, records = rewrite(gpt2, *order)
    assert [r.status for r in records] == ["applied", "applied"]
    assert widths(graph) == {"transformer.h.0.attn": [64, 64], "transformer.h.1.attn": [64]}
    assert largest_difference(gpt2.model, program(gpt2.model, graph)) < 1e-5


def test_a_chain_follows_its_placement_layer_by_layer(captured) -> None:
    """Projections are absorbed in the one layer that asks for it, and expanded in the other."""
    deepseek = captured("deepseek_v3")
    graph, records = rewrite(deepseek, "place_cache{cut=minimum}", "absorb_projections{layers=1}")
    absorbed = [Site(r.site).layer for r in records if r.pass_string.startswith("absorb")]
    assert absorbed == [1]
    assert largest_difference(deepseek.model, program(deepseek.model, graph)) < 1e-4


def test_optimize_takes_layers(captured) -> None:
    """The same through the public call: the stores, the plan, and the output."""
    model = captured("gpt2").model
    fast = gw.optimize(model, "cpu", workload=gw.Workload(prompt=32, generate=8), passes=MIXED)
    assert fast.plan.passes == MIXED
    assert widths(fast.graph) == {"transformer.h.0.attn": [64, 64], "transformer.h.1.attn": [64]}
    assert fast.program.allocate(1, 10).nbytes() == 10 * (128 + 64) * 4
    ids = torch.randint(3, VOCAB, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(fast.score(ids, step=7), model(ids).logits, atol=1e-5, rtol=1e-4)


def test_layers_left_without_a_cache_are_an_error(captured) -> None:
    """A program whose layers see different pasts would be wrong."""
    model, workload = captured("gpt2").model, gw.Workload(prompt=32, generate=8)
    with pytest.raises(PassError, match=r"no cache.*transformer\.h\.1\.attn"):
        gw.optimize(model, "cpu", workload=workload, passes=MIXED[:1])
