"""Lowering for the ``torch.compile`` backend: kernels where they win, plain arithmetic elsewhere.

Inductor compiles what comes out of here, so an op without a kernel is written out for it to fuse.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
from torch.fx.node import Node

from graphwright.ir.graph import Graph, argument, op_name, value
from graphwright.ir.layout import same_size
from graphwright.kernels.registry import REFERENCE, select
from graphwright.optimizer.backend_graph import NotExpressible
from graphwright.runtime.lowering.compile import EXPANDED, expand_bodies
from graphwright.runtime.lowering.kernels import (
    KernelUse,
    expand_feed_forward,
    group_linears,
    select_kernels,
)

aten = torch.ops.aten

# Up to here our linear kernels stream each weight once; beyond they call the library themselves.
KERNEL_ROWS = 64
MANY_ROWS = f"always more than {KERNEL_ROWS} rows, where the library is as fast and Inductor can fuse"
# Ops that are always written out: the plain ones, and attention that no library call expresses.
_BODIES = (*EXPANDED, "attention")


@dataclass
class Lowered:
    """What came of lowering.

    Attributes:
        module: for Inductor; placeholders are those of the graph.
        kernels: which implementation runs what, and how often.
        library: reasons for which linears were left to Inductor, with how many.
    """

    module: torch.fx.GraphModule
    kernels: list[KernelUse]
    library: Counter[str] = field(default_factory=Counter)


def lower_for_inductor(graph: Graph, device: torch.device) -> Lowered:
    """Choose kernels for a copy of a canonical graph and write the other ops out.

    Args:
        device: where it runs; decides the kernels.
    """
    graph = graph.copy()
    expand_feed_forward(graph)
    library = _leave_to_library(graph, device)
    _attention_to_library(graph)
    group_linears(graph)
    kernels = [
        use for use in select_kernels(graph, device) if use.op not in _BODIES or use.provider != REFERENCE
    ]
    module = torch.fx.GraphModule(torch.nn.Module(), graph.fx)
    return Lowered(expand_bodies(module, _BODIES), kernels, library)


def rows(x: torch.Tensor) -> tuple[int, int | None]:
    """The least and the greatest number of rows ``[..., K]`` can have; None if it is not bounded."""
    count: Any = 1
    for size in x.shape[:-1]:
        count = count * size
    if not isinstance(count, torch.SymInt):
        return count, count
    bounds = count.node.shape_env.bound_sympy(count.node.expr)
    least = int(bounds.lower) if bounds.lower.is_finite and bounds.lower.is_Integer else 0
    finite = bounds.upper.is_Integer and bounds.upper < 2**31
    return least, int(bounds.upper) if finite else None


def _leave_to_library(graph: Graph, device: torch.device) -> Counter[str]:
    """Turn the linears that our kernels do not take, or would not speed up, into the library's."""
    reasons: Counter[str] = Counter()
    for node in graph.calls("linear"):
        arguments = {name: argument(node, name) for name in ("x", "weight", "bias")}
        reason = _library_reason(arguments, device)
        if reason is not None:
            reasons[reason] += 1
            present = [a for a in arguments.values() if a is not None]
            graph.replace(node, graph.emit(aten.linear.default, *present, before=node))
            graph.fx.erase_node(node)
    return reasons


def _library_reason(arguments: dict[str, Node | None], device: torch.device) -> str | None:
    x = arguments["x"]
    assert x is not None
    least, _ = rows(value(x))
    if least > KERNEL_ROWS:
        return MANY_ROWS
    fakes = {name: None if node is None else value(node) for name, node in arguments.items()}
    kernel = select("linear", device, **fakes)
    return kernel.reason if kernel.provider == REFERENCE else None


def _attention_to_library(graph: Graph) -> None:
    """Plain causal attention as the library's fused call, with the same result layout."""
    for node in graph.calls("attention"):
        q, k, v = (argument(node, name) for name in ("q", "k", "v"))
        if not same_size(value(q).shape[2], value(k).shape[2]):
            raise NotExpressible(f"{node.name} is over other tokens than its queries, as from a cache")
        if argument(node, "window") or argument(node, "softcap") or argument(node, "sinks") is not None:
            continue
        grouped = value(q).shape[1] != value(k).shape[1]
        out = graph.emit(
            aten.scaled_dot_product_attention.default,
            q, k, v, None, 0.0, True,
            before=node, scale=argument(node, "scale"), enable_gqa=grouped,
        )  # fmt: skip
        turned = graph.emit(aten.transpose.int, out, 1, 2, before=node)
        result = graph.emit(aten.contiguous.default, turned, before=node)
        graph.replace(node, result)
        graph.fx.erase_node(node)


def masked_attention(graph: Graph) -> list[Node]:
    """Library attention whose mask is a tensor, as over a static cache: it stays as it is."""
    name = "aten.scaled_dot_product_attention.default"
    return [n for n in graph.nodes if op_name(n) == name and argument(n, "attn_mask") is not None]
