"""All nineteen architectures at three layers, and dtypes, devices and windows that change what is found."""

from __future__ import annotations

import pytest
import torch

from graphwright.ir.blocks import PARTS, find_blocks, skip_blocks
from graphwright.ir.dominators import token_dominators
from graphwright.ir.graph import argument, layer_number, value
from graphwright.ir.verifier import verify
from tests.architectures import ARCHITECTURES, VOCAB, WINDOW
from tests.rewrite.expected import EXPECTED
from tests.rewrite.small_graphs import run

# Layers of both kinds in three layers; the configurations' own patterns repeat every six.
_BOTH = ["sliding_attention", "full_attention", "sliding_attention"]
_OPTIONS = {
    "gemma2": {"layer_types": _BOTH},
    "gemma3_text": {"layer_types": _BOTH},
    "gpt_oss": {"layer_types": _BOTH},
}


@pytest.fixture
def deep(captured):
    return lambda name: captured(name, layers=3, **_OPTIONS.get(name, {}))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_counts(deep, name: str) -> None:
    assert deep(name).report.counts == EXPECTED[name](3)
    assert deep(name).report.near_misses == []


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_of_every_layer(deep, name: str) -> None:
    """Layers begin where the one before ends, and their halves follow each other or stand side by side."""
    graph = deep(name).canonical
    found = find_blocks(graph)
    assert not found.missing
    assert [(b.layer, b.part) for b in found.found] == [(n, part) for n in range(3) for part in PARTS]
    whole, attention, mlp = (found.of(part) for part in PARTS)
    assert [b.exit for b in whole[:-1]] == [b.entry for b in whole[1:]]
    for one, first, second in zip(whole, attention, mlp, strict=True):
        if name == "gpt_neox":
            assert first.contribution is not None and second.contribution is not None
            assert (first.entry, first.exit) == (second.entry, second.exit) == (one.entry, one.exit)
        else:
            assert first.contribution is None and second.contribution is None
            assert (first.entry, first.exit, second.exit) == (one.entry, second.entry, one.exit)
    dominators, _ = token_dominators(graph)
    for block in found.found:
        node = graph.output.all_input_nodes[0]
        while node not in (block.exit, dominators.get(node)):
            node = dominators[node]
        assert node is block.exit and layer_number(block.path) == block.layer
        assert value(block.entry).shape == value(block.exit).shape


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_block_takes_its_weights_with_it(deep, name: str) -> None:
    gone = {}
    for part in PARTS:
        graph = deep(name).canonical.copy()
        skip_blocks(graph, [b for b in find_blocks(graph).of(part) if b.layer == 1])
        graph.drop_unused_placeholders()
        verify(graph)
        assert len(graph.calls("attention")) == (3 if part == "mlp" else 2)
        # Beside the layer's own, frequencies that no other layer uses may go.
        removed = set(deep(name).canonical.parameters) - set(graph.parameters)
        gone[part] = {parameter for parameter in removed if layer_number(parameter) is not None}
    assert gone["whole"] == {p for p in deep(name).canonical.parameters if layer_number(p) == 1}
    assert gone["attention"] and gone["mlp"] and not gone["attention"] & gone["mlp"]
    assert gone["attention"] | gone["mlp"] == gone["whole"]


@pytest.mark.parametrize(
    ("name", "windows", "softcap"),
    [
        ("llama", [0, 0, 0], 0.0),
        ("mistral", [WINDOW] * 3, 0.0),
        ("gemma2", [WINDOW, 0, WINDOW], 50.0),
        ("gemma3_text", [WINDOW, 0, WINDOW], 0.0),
        ("gpt_oss", [WINDOW, 0, WINDOW], 0.0),
    ],
)
def test_windows_and_softcap(deep, name: str, windows: list[int], softcap: float) -> None:
    sites = deep(name).canonical.calls("attention")
    assert [argument(node, "window") for node in sites] == windows
    assert {argument(node, "softcap") for node in sites} == {softcap}
    sinks = [argument(node, "sinks") for node in sites]
    if name == "gpt_oss":
        assert [s.meta["name"] for s in sinks] == [f"model.layers.{i}.self_attn.sinks" for i in range(3)]
    else:
        assert sinks == [None] * 3


def test_gemma_norms_have_an_offset(deep) -> None:
    norms = deep("gemma2").canonical.calls("rms_norm")
    assert {argument(node, "offset") for node in norms} == {1.0}


@pytest.mark.parametrize(
    ("name", "layout", "width"),
    [
        ("llama", "half", 16),
        ("gpt_neox", "half", 4),  # a quarter of the head is rotated
        ("gpt_oss", "half", 8),  # cos and sin of half the width
        ("glm4", "interleaved", 8),  # half of the head is rotated
        ("deepseek_v3", "interleaved_to_half", 4),  # 8 rotary dimensions, cos and sin of half the width
    ],
)
def test_rotary_layouts(deep, name: str, layout: str, width: int) -> None:
    graph = deep(name).canonical
    for node in graph.calls("rotary"):
        assert argument(node, "layout") == layout
        for table in ("cos", "sin"):
            shape = argument(node, table).meta["val"].shape
            assert shape[1] == 1 and shape[-1] == width


@pytest.mark.parametrize(
    ("name", "activation"),
    [("gpt2", "gelu_tanh"), ("gpt_neox", "gelu"), ("opt", "relu"), ("starcoder2", "gelu_tanh")],
)
def test_plain_activations(deep, name: str, activation: str) -> None:
    assert {argument(node, "activation") for node in deep(name).canonical.calls("mlp")} == {activation}


@pytest.mark.parametrize(
    ("name", "activation"), [("llama", "silu"), ("gemma2", "gelu_tanh"), ("glm4", "silu")]
)
def test_gated_activations(deep, name: str, activation: str) -> None:
    assert {argument(node, "activation") for node in deep(name).canonical.calls("gated_mlp")} == {activation}


def test_packed_gate_and_up_are_rows_of_the_weight(deep) -> None:
    for name in ("phi3", "glm4"):
        for node in deep(name).canonical.calls("gated_mlp"):
            gate, up = node.args[1:3]
            assert gate.args[1:] == (0, 0, 96) and up.args[1:] == (0, 96, 192)
            assert gate.args[0] is up.args[0] and gate.args[0].meta["name"].endswith("gate_up_proj.weight")


def test_deepseek_keys_become_a_cat(deep) -> None:
    graph = deep("deepseek_v3").canonical
    for node in graph.calls("attention"):
        keys = argument(node, "k")
        assert str(keys.target) == "aten.cat.default" and len(keys.args[0]) == 2
    assert graph.calls("aten.new_empty.default", "aten.copy.default") == []


@pytest.mark.parametrize(
    ("name", "in_float"),
    [("llama", False), ("gemma2", True), ("gpt_oss", True)],
)
def test_bfloat16_keeps_every_rounding(captured, name: str, in_float: bool) -> None:
    found = captured(name, torch.bfloat16)
    assert found.report.counts == EXPECTED[name](2)
    norms = found.canonical.calls("rms_norm")
    assert {argument(node, "weight_in_float") for node in norms} == {in_float}
    ids = torch.randint(3, VOCAB, (2, 11))
    positions = torch.arange(11).repeat(2, 1)
    assert torch.equal(run(found.raw, ids, positions)[0], run(found.canonical, ids, positions)[0])
    verify(found.canonical, deep=True)


def test_meta_device(captured) -> None:
    found = captured("llama", device="meta")
    assert found.report.counts == EXPECTED["llama"](2)
    assert {t.device.type for t in found.canonical.parameters.values()} == {"meta"}
    verify(found.canonical, deep=True)
