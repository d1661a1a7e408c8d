"""Graphs of small hand-written modules: what capture does for transformers models, for anything."""

from __future__ import annotations

import torch
import torch.fx
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from graphwright.ir.graph import Graph


def small_graph(module: torch.nn.Module, *inputs: torch.Tensor, dynamic: bool = True) -> Graph:
    """Trace ``module(*inputs)``; the inputs are called x, x_1, ... and their leading dims are symbolic.

    Args:
        dynamic: whether all dimensions but the last of the inputs are symbolic.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fakes = [
        mode.from_tensor(x, symbolic_context=_symbolic(x))
        if dynamic
        else mode.from_tensor(x, static_shapes=True)
        for x in inputs
    ]
    wrapped = _Tuple(module).eval()
    with torch.no_grad():
        exported, signature = aot_export_module(wrapped, fakes, trace_joint=False, pre_dispatch=True)
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    prefixed = list(signature.parameters) + list(signature.buffers)
    names = [name.removeprefix("module.") for name in prefixed]
    graph = exported.graph
    parameters: dict[str, torch.Tensor] = {}
    for position, node in enumerate(n for n in graph.nodes if n.op == "placeholder"):
        if position < len(names):
            name = names[position]
            parameters[name] = tensors[name].detach()
            node.meta.update(kind="parameter", name=name)
        else:
            serial = position - len(names)
            node.meta.update(kind="input", name=f"x_{serial}" if serial else "x")
            node.name = node.meta["name"]
    for node in list(graph.nodes):
        if "_assert_tensor_metadata" in str(node.target):
            graph.erase_node(node)
    calls = [node.meta["val"] for node in graph.nodes if node.op == "call_function"]
    fake_mode = next(fake.fake_mode for fake in calls if isinstance(fake, torch.Tensor))
    result = Graph(graph, parameters, fake_mode)
    result.eliminate_dead_code()
    return result


class _Tuple(torch.nn.Module):
    """Returns a tuple: what export asks of a graph."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = self.module(*inputs)
        return results if isinstance(results, tuple) else (results,)


def _symbolic(x: torch.Tensor) -> StatelessSymbolicContext:
    sizes = [DimDynamic.DYNAMIC] * (x.dim() - 1) + [DimDynamic.STATIC]
    return StatelessSymbolicContext(dynamic_sizes=sizes)


def run(graph: Graph, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Interpret a graph on real tensors; ``inputs`` in the order of its input placeholders."""
    given = iter(inputs)
    arguments = [
        next(given) if node.meta["kind"] == "input" else graph.parameters[node.meta["name"]]
        for node in graph.placeholders()
    ]
    with torch.no_grad():
        return tuple(torch.fx.GraphModule({}, graph.fx)(*arguments))
