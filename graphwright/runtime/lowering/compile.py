"""Compile a piece with Inductor, or run it as it is."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import Node

from graphwright.ir.graph import is_impure
from graphwright.ir.ops import SEMANTIC_OPS
from graphwright.runtime.lowering.kernels import semantic_name
from graphwright.runtime.lowering.split import Piece

Runner = Callable[..., Any]
# Plain arithmetic: opaque as custom ops, fused once their bodies are written out.
EXPANDED = ("rms_norm", "layer_norm", "rotary", "linear", "slot_positions", "bypass")
# One decode step is too little work to share between threads outside the kernels.
_OPTIONS: dict[str, Any] = {
    "cpp.threads": 1,
    "cpp.dynamic_threads": False,
    "size_asserts": False,  # the pieces are split from one graph whose metadata is verified
    "alignment_asserts": False,
    "force_pointwise_cat": True,  # rotary halves written in one loop
    "triton.cudagraphs": False,  # whole steps are recorded, whatever the caller's environment says
}


def run_as_is(piece: Piece) -> Runner:
    """The piece interpreted by generated Python, op by op."""
    piece.module.recompile()
    return piece.module.forward


def compile_piece(piece: Piece) -> Runner:
    """The piece compiled once for every batch and number of tokens.

    Goes to Inductor directly: the graph is functional but for ops that say what they mutate, so AOT
    autograd would add only a wrapper to every call. Inductor's cache on disk makes the next process
    load instead of compile.
    """
    # A second to import, which what is only planned need not spend.
    from torch._dispatch.python import enable_python_dispatcher
    from torch._inductor import config as inductor_config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.virtualized import V

    module = expand_bodies(piece.module)
    fakes = []
    for node in module.graph.find_nodes(op="placeholder"):
        fakes.append(_distinct(node.meta["val"]))
    mode = fakes[0].fake_mode
    with torch.no_grad(), mode, tracing(TracingContext(mode)), V.set_fake_mode(mode):
        # With the dispatcher in Python: torch 2.11 would fix symbolic sizes in some ops' C++ bodies.
        with enable_python_dispatcher():
            traced = make_fx(module, decomposition_table=select_decomp_table())(*fakes)
        traced.graph.eliminate_dead_code(is_impure_node=is_impure)
        with inductor_config.patch(_OPTIONS):
            compiled = compile_fx_inner(traced, fakes)
    return lambda *args: compiled(list(args))


def _distinct(fake: Any) -> Any:
    """A fake tensor of its own (a size as it is).

    Nodes may share one, and tracers take equal objects for one argument.
    """
    if not isinstance(fake, FakeTensor):
        return fake
    with fake.fake_mode:
        return torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=fake.device)


def expand_bodies(module: torch.fx.GraphModule, names: Collection[str] = EXPANDED) -> torch.fx.GraphModule:
    """A copy with the reference bodies of the named ops in the place of their calls.

    Calls that a kernel was selected for stay as they are. Nodes of arithmetic, placeholders and the
    output keep their order; ``get_attr`` nodes are not allowed.
    """
    graph = torch.fx.Graph()
    mapping: dict[Node, Any] = {}
    for node in module.graph.nodes:
        name = semantic_name(node)
        if name is not None and name in names and node.target is SEMANTIC_OPS[name].overload:
            mapping[node] = _paste_body(graph, node, mapping)
        elif node.op == "output":
            graph.output(torch.fx.node.map_arg(node.args[0], mapping.__getitem__))
        else:
            mapping[node] = graph.node_copy(node, mapping.__getitem__)
            mapping[node].meta = dict(node.meta)
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def _paste_body(graph: torch.fx.Graph, node: Node, mapping: dict[Node, Any]) -> Any:
    body = SEMANTIC_OPS[semantic_name(node) or ""].reference
    inputs = node.all_input_nodes

    def call(*values: Any) -> Any:
        known = dict(zip(inputs, values, strict=True))
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
        return body(*args, **kwargs)

    fakes = [_distinct(n.meta["val"]) for n in inputs]
    mode = next(f.fake_mode for f in fakes if isinstance(f, FakeTensor))
    with torch.no_grad(), mode:
        traced = make_fx(call, pre_dispatch=True)(*fakes)
    inner: dict[Node, Any] = {}
    sources = iter(inputs)
    for old in traced.graph.nodes:
        if old.op == "placeholder":
            inner[old] = mapping[next(sources)]
        elif old.op == "output":
            result = old.args[0]
            return inner[result[0] if isinstance(result, tuple | list) else result]
        else:
            inner[old] = graph.node_copy(old, inner.__getitem__)
            inner[old].meta = {"val": old.meta.get("val")}
    raise AssertionError("a traced body has an output")
