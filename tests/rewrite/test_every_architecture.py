"""All nineteen architectures at two layers: op counts, the same numbers, invariants, printing."""

from __future__ import annotations

import pytest
import torch

from graphwright.ir.graph import module_path
from graphwright.ir.printer import to_python
from graphwright.ir.verifier import verify
from tests.architectures import ARCHITECTURES, VOCAB
from tests.rewrite.expected import EXPECTED
from tests.rewrite.small_graphs import run

ROWS, TOKENS = 3, 40  # neither is a size that capture saw; longer than the windows


def _inputs() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (ROWS, TOKENS))
    return ids, torch.arange(TOKENS).repeat(ROWS, 1)


def test_the_table_names_every_architecture() -> None:
    assert set(EXPECTED) == set(ARCHITECTURES)
    assert len(ARCHITECTURES) == 19


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_counts(captured, name: str) -> None:
    found = captured(name)
    assert found.report.counts == EXPECTED[name](2)
    assert found.canonical.counts() == found.report.counts
    assert found.report.near_misses == []


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_computes_the_same(captured, name: str) -> None:
    found = captured(name)
    ids, positions = _inputs()
    with torch.no_grad():
        stock = found.model(input_ids=ids, position_ids=positions, use_cache=False).logits
    before = run(found.raw, ids, positions)[0]
    after = run(found.canonical, ids, positions)[0]
    # A few units in the last place of the largest logit: attention sums in another order than stock.
    assert (after - stock).abs().max() <= 2e-6 * max(1.0, float(stock.abs().max()))
    if name != "gpt2":  # gelu is written out there: the op rounds less often
        assert torch.equal(before, after)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_invariants_hold(captured, name: str) -> None:
    verify(captured(name).canonical, deep=True)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nothing_consumed_is_left(captured, name: str) -> None:
    graph = captured(name).canonical
    for node in graph.nodes:
        assert node.users or node.op == "output" or node.meta.get("kind") == "input"
    left = graph.calls("aten.linear.default", "aten.addmm.default", "aten.layer_norm.default")
    left += graph.calls("aten.rsqrt.default", "aten.dropout.default", "aten.neg.default")
    left += graph.calls("aten.split.Tensor", "aten.split_with_sizes.default", "aten.slice_scatter.default")
    assert left == []


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ops_know_their_module(captured, name: str) -> None:
    graph = captured(name).canonical
    for node in graph.calls("attention", "rms_norm", "layer_norm", "rotary", "gated_mlp", "mlp"):
        assert module_path(node), node
    for node in graph.calls("gated_mlp", "mlp"):
        if name != "opt":  # its decoder layer holds fc1 and fc2 itself
            assert ".mlp" in module_path(node) and "proj" not in module_path(node)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_printed_source_runs(captured, name: str) -> None:
    graph = captured(name).canonical
    ids, positions = _inputs()
    namespace: dict = {}
    exec(compile(to_python(graph), f"<{name}>", "exec"), namespace)
    with torch.no_grad():
        printed = namespace["forward"](ids, positions, graph.parameters, {})
    assert isinstance(printed, tuple) and len(printed) == 1
    assert torch.equal(printed[0], run(graph, ids, positions)[0])
