"""What the cut stores in each kind of layer, what it costs, and that recomputing gives stock's numbers."""

from __future__ import annotations

import pytest

from graphwright.cost_model.workload import Workload
from graphwright.ir.errors import PassError
from graphwright.ir.graph import argument, op_name, value
from graphwright.passes.base import parse_pass
from graphwright.passes.cache_cut import Cut
from graphwright.passes.place_cache import PlaceCache
from graphwright.runtime.storage import slots_for, window_slack
from tests.architectures import WINDOW
from tests.rewrite.cached_programs import TARGET, WORKLOAD, largest_difference, program, rewrite

MULTI_HEAD = {"num_key_value_heads": 4}


def cuts(captured, name: str, **options: object) -> list[Cut]:
    sites = PlaceCache("minimum").find(captured(name, **options).canonical)
    return [site.info["minimum"] for site in sites]


# --- where the minimum cut lies ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_grouped_heads_store_keys_and_values(captured, name: str) -> None:
    found = cuts(captured, name)
    assert len(found) == 2
    assert all(cut.is_keys_and_values and cut.elements == 2 * 2 * 16 for cut in found)


@pytest.mark.parametrize(
    ("name", "options", "norm"),
    [("gpt2", {}, "layer_norm"), ("opt", {}, "layer_norm"), ("llama", MULTI_HEAD, "rms_norm")],
)
def test_full_heads_store_the_layer_input(captured, name: str, options: dict, norm: str) -> None:
    for cut in cuts(captured, name, **options):
        assert [op_name(node) for node in cut.stored] == [norm]
        assert cut.elements == 64 and cut.recomputed


def test_latent_attention_stores_the_latent_and_the_rotary_part(captured) -> None:
    for cut in cuts(captured, "deepseek_v3"):
        rank, rotary = 16, 8
        assert cut.elements == rank + rotary
        assert {value(node).shape[-1] for node in cut.stored} == {rank, rotary}
        assert "rotary" in {op_name(node) for node in cut.stored}  # stored after its rotation
        assert "rotary" not in {op_name(node) for node in cut.recomputed}


# --- the choice between cuts ---------------------------------------------------------------------


def kv_bytes(workload: Workload) -> int:
    """Of the tiny multi-head Llama: two layers, keys and values, 64 features of 4 bytes each."""
    return 2 * 2 * 64 * 4 * workload.batch * workload.capacity


def test_auto_keeps_keys_and_values_while_they_fit(captured) -> None:
    graph = captured("llama", **MULTI_HEAD).canonical
    settled = PlaceCache().resolve(graph, WORKLOAD, TARGET, memory=kv_bytes(WORKLOAD))
    assert str(settled) == "place_cache{cut=kv}"


def test_auto_takes_the_minimum_cut_when_they_do_not(captured) -> None:
    graph = captured("llama", **MULTI_HEAD).canonical
    settled = PlaceCache().resolve(graph, WORKLOAD, TARGET, memory=kv_bytes(WORKLOAD) - 1)
    assert str(settled) == "place_cache{cut=minimum}"


def test_the_workload_changes_the_answer(captured) -> None:
    graph = captured("llama", **MULTI_HEAD).canonical
    longer = Workload(batch=4, prompt=4 * WORKLOAD.prompt)
    limit = float(kv_bytes(WORKLOAD))
    answers = {PlaceCache().resolve(graph, w, TARGET, memory=limit) for w in (WORKLOAD, longer)}
    assert answers == {PlaceCache("kv"), PlaceCache("minimum")}


def test_grouped_heads_have_no_smaller_cut_to_fall_back_on(captured) -> None:
    settled = PlaceCache().resolve(captured("llama").canonical, WORKLOAD, TARGET, memory=1.0)
    assert settled == PlaceCache("kv")


def test_a_chosen_cut_is_not_argued_with(captured) -> None:
    chosen = PlaceCache("kv")
    assert chosen.resolve(captured("gpt2").canonical, WORKLOAD, TARGET, memory=1.0) is chosen


def test_the_reason_names_the_alternative_and_its_price(captured) -> None:
    _, records = rewrite(captured("llama", **MULTI_HEAD), "place_cache{cut=kv}")
    for record in records:
        assert record.status == "applied"
        assert "stores keys and values, 128 elements a token" in record.reason
        assert "minimum cut: 64" in record.reason and "us a step with recomputation" in record.reason
    _, grouped = rewrite(captured("llama"), "place_cache{cut=minimum}")
    assert all("the minimum cut is keys and values themselves" in r.reason for r in grouped)


def test_recomputing_a_window_costs_no_more_for_a_longer_context(captured) -> None:
    graph = captured("gemma2", **MULTI_HEAD).canonical
    long, longer = Workload(prompt=100_000), Workload(prompt=200_000)
    place = PlaceCache("minimum")
    sliding, full = sorted(place.find(graph), key=lambda site: argument(site.nodes[0], "window") == 0)
    assert argument(sliding.nodes[0], "window") == WINDOW and argument(full.nodes[0], "window") == 0

    def seconds(site, workload: Workload) -> float:
        return -place.gain(site, workload, TARGET).seconds_per_token

    assert seconds(sliding, longer) == pytest.approx(seconds(sliding, long))
    assert seconds(full, longer) > 1.5 * seconds(full, long)


# --- the rewritten graph -------------------------------------------------------------------------


def test_op_counts_with_keys_and_values(captured) -> None:
    before = captured("llama").canonical.counts()
    graph, _ = rewrite(captured("llama"), "place_cache{cut=kv}")
    expected = before | {"cache_append": 4, "cache_attention": 2}
    del expected["attention"]
    assert graph.counts() == expected
    assert [n.meta["name"] for n in graph.placeholders("input")] == [
        "input_ids",
        "positions",
        "lengths",
        "counts",
        "tree",
    ]
    names = {n.meta["name"] for n in graph.placeholders("state")}
    assert names == {f"model.layers.{i}.self_attn.{role}" for i in (0, 1) for role in ("keys", "values")}


def test_op_counts_with_recomputation(captured) -> None:
    before = captured("llama", **MULTI_HEAD).canonical.counts()
    graph, _ = rewrite(captured("llama", **MULTI_HEAD), "place_cache{cut=minimum}")
    # Keys and values move from the step's tokens to the slots: as many ops as before, and the positions once.
    expected = before | {"cache_append": 2, "cache_attention": 2, "slot_positions": 1}
    del expected["attention"]
    assert graph.counts() == expected


def test_windows_are_marked_and_stored_as_rings(captured) -> None:
    graph, _ = rewrite(captured("gemma2"), "place_cache{cut=kv}")
    windows = {n.meta["name"]: n.meta["window"] for n in graph.placeholders("state")}
    assert set(windows.values()) == {0, WINDOW}
    state = program(captured("gemma2").model, graph).allocate(1, 200)
    ring = WINDOW + window_slack(WINDOW)
    assert ring < 200 == slots_for(200, 0)
    for name, store in state.stores.items():
        assert store.shape[2] == (ring if windows[name] else 200)


@pytest.mark.parametrize("cut", ["kv", "minimum"])
def test_a_ring_that_has_come_round_gives_stock_logits(captured, cut: str) -> None:
    """Recomputed keys are rotated by the position of the token that a slot holds now."""
    model = captured("gemma2", **MULTI_HEAD)
    graph, _ = rewrite(model, f"place_cache{{cut={cut}}}")
    ring = WINDOW + window_slack(WINDOW)
    assert (len(graph.calls("slot_positions")) > 0) == (cut == "minimum")
    steps = (8, 3, 1, 9)
    assert largest_difference(model.model, program(model.model, graph), (ring + 20, 40, 2), steps) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "opt", "deepseek_v3"])
def test_recomputation_gives_stock_logits(captured, name: str) -> None:
    graph, records = rewrite(captured(name), "place_cache{cut=minimum}")
    assert all("recomputes keys and values" in record.reason for record in records)
    assert largest_difference(captured(name).model, program(captured(name).model, graph)) < 1e-5


def test_the_minimum_cut_halves_the_cache_of_full_heads(captured) -> None:
    sizes = {}
    for cut in ("kv", "minimum"):
        graph, _ = rewrite(captured("gpt2"), f"place_cache{{cut={cut}}}")
        sizes[cut] = program(captured("gpt2").model, graph).allocate(2, 50).nbytes()
    assert sizes["minimum"] * 2 == sizes["kv"]


def test_an_unknown_cut_is_refused() -> None:
    with pytest.raises(PassError, match="no cut 'middle'"):
        parse_pass("place_cache{cut=middle}")
