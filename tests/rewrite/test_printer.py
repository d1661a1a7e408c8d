"""The printed source: readable, and the same program. All architectures: test_every_architecture.py."""

from __future__ import annotations

import torch
from torch import nn

from graphwright.ir.canonicalize import canonicalize
from graphwright.ir.printer import to_python
from tests.rewrite.small_graphs import run, small_graph


class Awkward(nn.Module):
    """Arguments of every kind: infinities, dtypes, lists, devices, results that are tuples, sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.proj(x).masked_fill(x > 0, float("-inf")).to(torch.float64)
        top, at = hidden.topk(3, dim=-1)
        full = torch.full((x.shape[0] * 2, 1), 2.0, dtype=torch.float64, device=x.device)
        return torch.cat([top.softmax(-1).flatten(0, 1), at.flatten(0, 1).double()], -1).sum() + full


def printed(module: nn.Module, *inputs: torch.Tensor) -> tuple[str, torch.Tensor, torch.Tensor]:
    graph = small_graph(module, *inputs)
    canonicalize(graph)
    source = to_python(graph)
    namespace: dict = {}
    exec(source, namespace)
    with torch.no_grad():
        return source, namespace["forward"](*inputs, graph.parameters, {})[0], run(graph, *inputs)[0]


def test_awkward_arguments() -> None:
    source, again, expected = printed(Awkward(), torch.randn(2, 3, 8))
    assert torch.equal(again, expected)
    assert "float('-inf')" in source and "torch.float64" in source and " * 2" in source


def test_reads_like_a_function() -> None:
    source, _, _ = printed(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(2, 3, 8))
    assert "def forward(\n    x: Tensor,  # float32[" in source
    assert "# parameters['0.weight']: float32[8, 8]" in source
    assert (
        "linear = torch.ops.graphwright.linear.default(x, parameters['0.weight'], parameters['0.bias'])"
        in source
    )
    assert "del " not in source and source.rstrip().endswith("return (relu,)")


def test_architectures_are_grouped_by_module(captured) -> None:
    source = to_python(captured("llama").canonical)
    assert "input_ids: Tensor,  # int64[B, T]" in source
    assert "    # model.layers.1.mlp\n    gated_mlp_1 = " in source
    assert "# float32[B, T, 64]" in source
