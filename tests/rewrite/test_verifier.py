"""Every invariant has a graph that breaks it."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import nn

from graphwright.ir.canonicalize import canonicalize
from graphwright.ir.errors import VerificationError
from graphwright.ir.graph import Graph
from graphwright.ir.verifier import verify
from tests.rewrite.small_graphs import small_graph

aten = torch.ops.aten


@pytest.fixture
def graph() -> Graph:
    found = small_graph(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(2, 3, 8))
    canonicalize(found)
    verify(found, deep=True)
    return found


def broken(graph: Graph, invariant: str, *, deep: bool = False) -> str:
    with pytest.raises(VerificationError, match=f"invariant '{invariant}'") as caught:
        verify(graph, deep=deep)
    return str(caught.value)


def with_state(graph: Graph) -> tuple:
    """Add a cache, lengths and counts to a graph."""
    with graph.fake_mode:
        store, new = torch.empty(2, 1, 16, 8), torch.empty(2, 1, 3, 8)
        numbers = torch.empty(2, dtype=torch.int64)
    state = graph.add_placeholder("state", "layers.0.keys", store)
    extra = [
        graph.add_placeholder("input", name, value)
        for name, value in (("new", new), ("lengths", numbers), ("counts", numbers))
    ]
    return (state, *extra)


def test_order(graph: Graph) -> None:
    linear, relu = graph.calls("linear")[0], graph.calls("aten.relu.default")[0]
    relu.append(linear)
    broken(graph, "order")


def test_placeholders(graph: Graph) -> None:
    node = graph.placeholders()[0]
    node.meta["kind"] = "weight"
    assert node.name in broken(graph, "placeholders")


def test_placeholder_names_are_unique(graph: Graph) -> None:
    with graph.fake_mode:
        graph.add_placeholder("input", "x", torch.empty(2))
    broken(graph, "placeholders")


def test_missing_value(graph: Graph) -> None:
    del graph.calls("linear")[0].meta["val"]
    assert "linear" in broken(graph, "values")


@pytest.mark.parametrize("options", [{"dtype": torch.float64}, {"device": "meta"}, {}])
def test_stale_value(graph: Graph, options: dict) -> None:
    node = graph.calls("linear")[0]
    shape = node.meta["val"].shape if options else (2, 3, 9)
    with graph.fake_mode:
        node.meta["val"] = torch.empty(shape, **options)
    verify(graph)
    assert "stale" in broken(graph, "values", deep=True)


def test_mutation(graph: Graph) -> None:
    graph.emit(aten.relu_.default, graph.calls("linear")[0])
    broken(graph, "mutation")


def test_state_is_appended_before_it_is_read(graph: Graph) -> None:
    state, new, lengths, counts = with_state(graph)
    append = graph.emit("cache_append", state, new, lengths, counts)
    read = graph.emit(aten.neg.default, state)
    graph.output.args = ((*graph.output.args[0], read),)
    verify(graph, deep=True)
    read.append(append)
    assert "layers_0_keys" in broken(graph, "state")


def test_parameters(graph: Graph) -> None:
    graph.parameters["0.weight"] = graph.parameters["0.weight"].double()
    broken(graph, "parameters")
    del graph.parameters["0.weight"]
    broken(graph, "parameters")


def test_dangling_parameters(graph: Graph) -> None:
    graph.parameters["other"] = torch.zeros(1)
    assert "other" in broken(graph, "parameters")


def test_unread_parameters(graph: Graph) -> None:
    node = graph.calls("linear")[0]
    node.args = node.args[:2]
    assert "nothing reads" in broken(graph, "parameters")


def test_outputs(graph: Graph) -> None:
    graph.output.args = ((*graph.output.args[0], 3),)
    broken(graph, "outputs")


def test_vocabulary(graph: Graph) -> None:
    node = graph.calls("aten.relu.default")[0]
    node.target = torch.relu
    broken(graph, "vocabulary")


def test_arithmetic_on_sizes_is_allowed(graph: Graph) -> None:
    size = graph.emit(aten.sym_size.int, graph.placeholder("x"), 0)
    graph.emit(operator.mul, size, 2)
    verify(graph, deep=True)
