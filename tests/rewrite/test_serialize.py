"""A graph survives the way through JSON, and text that is not such a graph is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from graphwright.ir.errors import PlanError
from graphwright.ir.graph import Graph, module_path
from graphwright.ir.printer import to_python
from graphwright.ir.serialize import dumps, graph_from_json, graph_to_json
from graphwright.ir.verifier import verify
from graphwright.passes.place_cache import PlaceCache
from graphwright.runtime.lowering import LoweringOptions, lower
from graphwright.runtime.program import Program

CPU = torch.device("cpu")
NAMES = ["llama", "gemma2", "deepseek_v3", "gpt2", "gpt_oss"]


def with_cache(graph: Graph, cut: str) -> Graph:
    """A copy of a canonical graph with its cache placed; ``none`` leaves it without one."""
    placed = graph.copy()
    if cut != "none":
        chosen = PlaceCache(cut)
        for site in chosen.find(placed):
            chosen.apply(site, placed)
        placed.eliminate_dead_code()
        placed.drop_unused_placeholders()
    return placed


def round_trip(graph: Graph) -> Graph:
    """Through text and back."""
    return graph_from_json(json.loads(dumps(graph_to_json(graph))), graph.parameters, CPU)


def run(graph: Graph, model: Any, compiled: bool = False) -> torch.Tensor:
    """Logits of a ragged prefill and of a step, through the runtime."""
    program = Program(
        lower(graph, CPU, LoweringOptions(compile=compiled)),
        config=model.config,
        device=CPU,
        dtype=torch.float32,
        vocab_size=model.config.vocab_size,
        max_positions=model.config.max_position_embeddings,
    )
    tokens = torch.arange(40).reshape(2, 20) % 90 + 3
    state = program.allocate(2, 32)
    first = program.prefill(state, tokens, torch.tensor([20, 7]))
    second = program.step(state, tokens[:, :3], torch.tensor([3, 2]))
    return torch.cat([first[:, None], second], dim=1)


@pytest.mark.parametrize("cut", ["none", "kv", "minimum"])
@pytest.mark.parametrize("name", NAMES)
def test_round_trip(captured: Callable[..., Any], name: str, cut: str) -> None:
    one = captured(name)
    graph = with_cache(one.canonical, cut)
    again = round_trip(graph)
    assert to_python(again) == to_python(graph)
    assert graph_to_json(again) == graph_to_json(graph)  # symbols, metadata and names are the same too
    assert [module_path(n) for n in again.nodes] == [module_path(n) for n in graph.nodes]
    assert all(again.parameters[name] is not None for name in graph.parameters)
    pointers = {name: t.data_ptr() for name, t in graph.parameters.items()}
    assert {name: t.data_ptr() for name, t in again.parameters.items()} == pointers
    verify(again, deep=True)
    assert torch.equal(run(again, one.model), run(graph, one.model))


def test_sizes_keep_their_identity(captured: Callable[..., Any]) -> None:
    again = round_trip(captured("llama").canonical)
    ids, positions = (again.placeholder(name).meta["val"] for name in ("input_ids", "positions"))
    assert ids.shape[0].node.expr == positions.shape[0].node.expr
    assert ids.shape[0].node.expr != ids.shape[1].node.expr
    free = {
        s for n in again.nodes if isinstance(n.meta.get("val"), torch.Tensor) for s in _symbols(n.meta["val"])
    }
    assert free == _symbols(ids)


def _symbols(fake: torch.Tensor) -> set[Any]:
    return {s for size in fake.shape if isinstance(size, torch.SymInt) for s in size.node.expr.free_symbols}


def test_a_read_graph_can_be_rewritten(captured: Callable[..., Any]) -> None:
    one = captured("llama")
    placed = with_cache(round_trip(one.canonical), "kv")
    verify(placed, deep=True)
    assert torch.equal(run(placed, one.model), run(with_cache(one.canonical, "kv"), one.model))


@pytest.mark.slow
def test_a_read_graph_compiles(captured: Callable[..., Any]) -> None:
    one = captured("llama")
    graph = with_cache(one.canonical, "kv")
    assert torch.equal(run(round_trip(graph), one.model, compiled=True), run(graph, one.model, compiled=True))


def test_annotations_are_kept(captured: Callable[..., Any]) -> None:
    graph = captured("llama").canonical.copy()
    graph.annotations["speculation"] = {"drafter": "ngram", "tokens": 8}
    assert round_trip(graph).annotations == graph.annotations
    graph.annotations["speculation"] = {"drafter": object()}
    with pytest.raises(PlanError, match="plain data"):
        graph_to_json(graph)


# --- arguments of every kind ---------------------------------------------------------------------


def test_arguments_of_every_kind(captured: Callable[..., Any]) -> None:
    graph = captured("llama").canonical.copy()
    aten = torch.ops.aten
    made = graph.emit(aten.full.default, [2, 3], float("-inf"), dtype=torch.float32, device=CPU)
    cast = graph.emit(aten.clone.default, made, memory_format=torch.contiguous_format)
    halves = graph.emit(aten.split.Tensor, cast, 1, 0)
    again = round_trip(_keep(graph, [cast, halves]))
    full = next(n for n in again.nodes if n.name == made.name)
    assert full.args == ([2, 3], float("-inf"))
    assert full.kwargs == {"dtype": torch.float32, "device": CPU}
    clone = next(n for n in again.nodes if n.name == cast.name)
    assert clone.kwargs == {"memory_format": torch.contiguous_format}
    split = next(n for n in again.nodes if n.name == halves.name)
    assert [tuple(t.shape) for t in split.meta["val"]] == [(1, 3), (1, 3)]


def _keep(graph: Graph, nodes: list[Any]) -> Graph:
    graph.output.args = ((graph.output.args[0][0], *nodes),)
    return graph


# --- text that is refused ------------------------------------------------------------------------


def _changed(document: dict[str, Any], edit: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    fresh = copy.deepcopy(document)
    edit(fresh)
    return fresh


def _call(document: dict[str, Any]) -> list[Any]:
    return next(row for row in document["nodes"] if row[0] == "call_function")


def _tensor(document: dict[str, Any]) -> list[Any]:
    return next(row["tensor"] for row in document["types"] if "tensor" in row)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "operator.attrgetter",
        "operator.__class__",
        "torch.load",
        "aten.from_file.default",
        "aten.no_such_op.default",
        "aten.add.__class__",
        "aten.__dict__.keys",
        "somebody.op.default",
        "add",
        "",
    ],
)
def test_unknown_targets_are_refused(captured: Callable[..., Any], target: str) -> None:
    one = captured("llama").canonical
    document = _changed(graph_to_json(one), lambda d: _call(d).__setitem__(1, target))
    with pytest.raises(PlanError) as error:
        graph_from_json(document, one.parameters, CPU)
    assert error.value.where == target


@pytest.mark.parametrize(
    "size",
    [
        "__import__('os').system('true')",
        "s44.__class__",
        "unknown",
        "s44 if s44 else s70",
        "[s44 for s44 in (1,)]",
        "9**9**9",
        "s44**s70",
        "(lambda: 1)()",
        "print(1)",
        "1.5",
        "s44+",
        "s44" + "+s44" * 1000,
        None,
        True,
    ],
)
def test_sizes_are_parsed_and_never_executed(captured: Callable[..., Any], size: Any) -> None:
    one = captured("llama").canonical
    document = _changed(graph_to_json(one), lambda d: _tensor(d)[1].__setitem__(0, size))
    with pytest.raises(PlanError):
        graph_from_json(document, one.parameters, CPU)


def test_size_arithmetic(captured: Callable[..., Any]) -> None:
    one = captured("llama").canonical
    batch, tokens = (str(s) for s in one.placeholder("input_ids").meta["val"].shape)
    text = f"Max(2*{batch} + {tokens}, 3)*({tokens} - 1)//2"
    document = graph_to_json(one)
    document["types"].append({"size": text})
    position = next(row for row in document["nodes"] if row[0] == "call_function")
    position[5]["val"] = len(document["types"]) - 1
    again = graph_from_json(document, one.parameters, CPU)
    size = next(n for n in again.nodes if n.name == position[4]).meta["val"]
    hints = {batch: document["symbols"][batch]["hint"], tokens: document["symbols"][tokens]["hint"]}
    assert size.node.hint == max(2 * hints[batch] + hints[tokens], 3) * (hints[tokens] - 1) // 2


EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "schema": lambda d: d.update(schema="graphwright.graph/99"),
    "no nodes": lambda d: d.pop("nodes"),
    "no symbols": lambda d: d.update(symbols={}),
    "cut off": lambda d: d.update(nodes=d["nodes"][:-3]),
    "a dangling reference": lambda d: _call(d).__setitem__(2, [{"node": "nothing"}]),
    "an unknown tag": lambda d: _call(d).__setitem__(2, [{"pickle": "x"}]),
    "two tags": lambda d: _call(d).__setitem__(2, [{"node": "x", "tuple": []}]),
    "not a dtype": lambda d: _tensor(d).__setitem__(0, "load"),
    "a repeated name": lambda d: d["nodes"].insert(0, d["nodes"][0]),
    "an unknown kind": lambda d: d["nodes"][0][5].update(kind="file"),
    "a get_attr": lambda d: d["nodes"][0].__setitem__(0, "get_attr"),
    "no such type": lambda d: d["nodes"][0][5].update(val=10**6),
    "a node of numbers": lambda d: d["nodes"].__setitem__(0, 7),
}


@pytest.mark.parametrize("edit", EDITS)
def test_damaged_documents_are_refused(captured: Callable[..., Any], edit: str) -> None:
    one = captured("llama").canonical
    with pytest.raises(PlanError) as error:
        graph_from_json(_changed(graph_to_json(one), EDITS[edit]), one.parameters, CPU)
    assert error.value.hint


def test_tensors_must_be_the_ones_the_graph_was_made_for(captured: Callable[..., Any]) -> None:
    one = captured("llama").canonical
    document = graph_to_json(one)
    name = next(iter(one.parameters))
    with pytest.raises(PlanError, match="does not have"):
        graph_from_json(document, {k: v for k, v in one.parameters.items() if k != name}, CPU)
    for other in (one.parameters[name].double(), one.parameters[name][:-1]):
        with pytest.raises(PlanError, match="the graph was made for"):
            graph_from_json(document, {**one.parameters, name: other}, CPU)


def test_graphs_that_cannot_be_saved_say_so(captured: Callable[..., Any]) -> None:
    graph = captured("llama").canonical.copy()
    node = graph.calls("linear")[0]
    node.target = torch.nn.functional.linear
    with pytest.raises(PlanError, match="cannot be saved"):
        graph_to_json(graph)
