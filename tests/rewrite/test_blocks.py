"""The decoder's blocks, and that leaving one out is what it is in the stock model.

That they are found in every architecture: ``test_depth.py``, which has all of them at three layers.
"""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import nn

from graphwright.ir.blocks import PARTS, Block, Blocks, find_blocks, live_nodes, skip_blocks
from graphwright.ir.graph import Graph, ancestors, layer_number, op_name
from graphwright.ir.verifier import verify
from tests.architectures import VOCAB
from tests.rewrite.cached_programs import rewrite
from tests.rewrite.small_graphs import run

LAYERS = 3
KV = "place_cache{cut=kv}"


def skipped(graph: Graph, *wanted: tuple[int, str]) -> Graph:
    """A copy of a graph without these blocks."""
    copy = graph.copy()
    skip_blocks(copy, [block for block in find_blocks(copy).found if (block.layer, block.part) in wanted])
    copy.drop_unused_placeholders()
    verify(copy, deep=True)
    return copy


# --- what is found ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "cut"), [("llama", "kv"), ("gpt_neox", "kv"), ("gpt2", "minimum")])
def test_the_same_blocks_with_a_cache(captured, name: str, cut: str) -> None:
    plain = find_blocks(captured(name, layers=LAYERS).canonical)
    graph, _ = rewrite(captured(name, layers=LAYERS), f"place_cache{{cut={cut}}}")
    assert spelled(find_blocks(graph)) == spelled(plain)


def spelled(blocks: Blocks) -> list[tuple[str, ...]]:
    return [(b.name, b.entry.name, b.exit.name, str(b.contribution)) for b in blocks.found]


# --- what is computed ------------------------------------------------------------------------------


class Nothing(nn.Module):
    """Adds nothing to the stream, in the form of the module that it replaces."""

    def __init__(self, tuple_of: int) -> None:
        super().__init__()
        self.tuple_of = tuple_of

    def forward(self, hidden_states: torch.Tensor, *args: Any, **options: Any) -> Any:
        nothing = torch.zeros_like(hidden_states)
        return (nothing, *[None] * (self.tuple_of - 1)) if self.tuple_of else nothing


class Through(nn.Module):
    """A layer that hands on what it reads."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        return hidden_states


#: Where the layers are, and the names of their halves.
NAMES = {
    "llama": ("model.layers", "self_attn", "mlp"),
    "gpt2": ("transformer.h", "attn", "mlp"),
    "gpt_neox": ("gpt_neox.layers", "attention", "mlp"),
    "gemma2": ("model.layers", "self_attn", "mlp"),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_skipped_block_is_an_identity_of_the_stock_model(captured, name: str, part: str) -> None:
    found = captured(name, layers=LAYERS)
    where, attention, mlp = NAMES[name]
    layers = operator.attrgetter(where)(found.model)
    ids = torch.randint(3, VOCAB, (2, 21))
    if part == "whole":
        owner, key, stand_in = layers, "1", Through()
    else:
        owner, key = layers[1], attention if part == "attention" else mlp
        stand_in = Nothing(2 if part == "attention" else 0)
    with torch.no_grad():
        full = found.model(ids, use_cache=False).logits
        original = owner._modules[key]
        owner._modules[key] = stand_in
        try:
            expected = found.model(ids, use_cache=False).logits
        finally:
            owner._modules[key] = original
    assert (full - expected).abs().max() > 1e-3
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    (actual,) = run(skipped(found.canonical, (1, part)), ids, positions)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


# --- leaving out -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
def test_neighbours_in_any_order(captured, reverse: bool) -> None:
    """Blocks of one look at the graph, whose ends are others' beginnings."""
    graph = captured("llama", layers=LAYERS).canonical.copy()
    blocks = find_blocks(graph).of("whole")[:2]
    skip_blocks(graph, blocks[::-1] if reverse else blocks)
    graph.drop_unused_placeholders()
    verify(graph)
    assert {layer_number(name) for name in graph.parameters} - {None} == {2}
    assert spelled(Blocks((find_blocks(graph).of("whole")[0],)))[0][1] == blocks[0].entry.name


@pytest.mark.parametrize("reverse", [False, True])
def test_both_addends(captured, reverse: bool) -> None:
    graph = captured("gpt_neox", layers=LAYERS).canonical.copy()
    halves = [b for b in find_blocks(graph).found if b.layer in (0, 1) and b.part != "whole"]
    seen: dict[Any, Any] = {}
    for block in halves[::-1] if reverse else halves:  # one after the other, as a pass does
        skip_blocks(graph, [block], seen)
    graph.drop_unused_placeholders()
    verify(graph)
    assert {layer_number(name) for name in graph.parameters} - {None} == {2}


def test_what_is_stored_goes_with_the_layer(captured) -> None:
    """Stores, queries that only an evictor reads, and the length of a layer that evicts."""
    evict = "evict_tokens{tokens=48,window=8}"
    graph, _ = rewrite(captured("llama", layers=LAYERS), KV, evict)
    states = {n.meta["name"] for n in graph.placeholders("state")}
    for part, layers in (("whole", {0, 2}), ("attention", {0, 2}), ("mlp", {0, 1, 2})):
        left = {n.meta["name"] for n in skipped(graph, (1, part)).placeholders("state")}
        assert left == {name for name in states if layer_number(name) in layers}
    assert len(states) == 4 * LAYERS


@pytest.mark.parametrize(
    "then", ["quantize_cache{codec=int,bits=8,page=16}", "sparsify_attention{keep=0.25}"]
)
def test_packed_and_selected_caches_go_with_the_layer(captured, then: str) -> None:
    graph, _ = rewrite(captured("llama", layers=LAYERS), KV, then)
    left = skipped(graph, (1, "whole"))
    layers = {layer_number(n.meta["name"]) for n in left.placeholders("state")}
    assert {0, 2} <= layers and 1 not in layers


def test_states_that_nothing_in_the_step_reads_stay(captured) -> None:
    """The stores of another layer that only the runtime reads are none of a skipped layer's."""
    graph, _ = rewrite(captured("llama", layers=LAYERS), KV, "evict_tokens{tokens=48,window=8}")
    rings = [n for n in graph.placeholders("state") if n.meta["name"].endswith(".queries")]
    assert not live_nodes(graph) & set(rings)
    assert len(skipped(graph, (2, "mlp")).calls("observe_queries")) == LAYERS


def test_live_nodes_follow_detours(captured) -> None:
    graph = captured("llama", layers=LAYERS).canonical
    block = next(b for b in find_blocks(graph).found if (b.layer, b.part) == (1, "whole"))
    everything, rest = live_nodes(graph), live_nodes(graph, dict([block.detour()]))
    assert everything == ancestors([graph.output])
    gone = everything - rest
    assert {layer_number(n.meta["name"]) for n in gone if n.op == "placeholder"} == {1}
    assert sum(op_name(n) == "attention" for n in gone) == 1
    assert block.entry in rest and block.exit in gone


# --- what is not a block ---------------------------------------------------------------------------


def test_halves_that_cannot_be_told_apart_have_a_reason(captured) -> None:
    """A layer whose feed-forward part is not added to what it reads, but takes its place."""
    graph = captured("llama", layers=LAYERS).canonical.copy()
    block: Block = next(b for b in find_blocks(graph).found if (b.layer, b.part) == (1, "mlp"))
    (contribution,) = [n for n in block.exit.all_input_nodes if n is not block.entry]
    block.exit.replace_all_uses_with(contribution)
    graph.eliminate_dead_code()
    found = find_blocks(graph)
    assert set(found.missing) == {(1, "mlp")}
    assert found.missing[1, "mlp"] == "it is no addend of the residual stream by itself"
    assert len(found.of("whole")) == LAYERS and len(found.of("mlp")) == LAYERS - 1


def test_a_layer_beside_the_stream_has_a_reason(captured) -> None:
    """Two layers side by side: neither is on every path."""
    graph = captured("llama", layers=LAYERS).canonical.copy()
    first, second, _ = find_blocks(graph).of("whole")
    for user in list(first.exit.users):
        user.replace_input_with(first.exit, first.entry)
    total = graph.emit(torch.ops.aten.add.Tensor, first.exit, second.exit, after=second.exit)
    del total.meta["nn_module_stack"]
    graph.replace(second.exit, total)
    total.args = (first.exit, second.exit)
    found = find_blocks(graph)
    assert {layer for layer, _ in found.missing} == {0, 1}
    assert "on every path" in found.missing[0, "whole"]
    assert found.layers == [0, 1, 2]
