"""Compute once what depends on parameters alone."""

from __future__ import annotations

import torch
from torch.fx.node import Node, map_arg

from graphwright.ir.graph import Graph, is_impure, is_tensor, op_name, value

_MATRIX_ARGUMENTS = {"linear": (1,), "routed_linear": (2,)}


def fold_parameters(graph: Graph) -> int:
    """Replace parameter expressions (slices, transposes, scaled copies) by parameters.

    Slices of rows stay views of the user's weights. A transposed matrix that a linear reads is copied
    once into the row-major layout that kernels stream.

    Returns:
        Bytes of new storage.
    """
    known: dict[Node, torch.Tensor] = {
        n: graph.parameters[n.meta["name"]] for n in graph.placeholders("parameter")
    }
    owned = {t.untyped_storage().data_ptr() for t in known.values()}
    fresh = 0
    for node in list(graph.nodes):
        if not _foldable(node, known):
            continue
        args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
        with torch.no_grad():
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        if not result.is_contiguous() and _feeds_matrix(node):
            result = result.contiguous()
        known[node] = result
    for node, tensor in known.items():
        if node.op == "placeholder" or all(user in known for user in node.users):
            continue
        name = f"folded.{node.name}"
        placeholder = graph.add_placeholder("parameter", name, value(node))
        with graph.fake_mode:
            placeholder.meta["val"] = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
            )
        graph.parameters[name] = tensor
        graph.replace(node, placeholder)
        if tensor.untyped_storage().data_ptr() not in owned:
            fresh += tensor.untyped_storage().nbytes()
    graph.eliminate_dead_code()
    graph.drop_unused_placeholders()
    return fresh


def _foldable(node: Node, known: dict[Node, torch.Tensor]) -> bool:
    if node.op != "call_function" or is_impure(node) or not is_tensor(node):
        return False
    inputs = node.all_input_nodes
    return bool(inputs) and all(n in known for n in inputs)


def _feeds_matrix(node: Node) -> bool:
    """Whether a linear (perhaps through more folding) takes this as its matrix."""
    return any(
        len(user.args) > i and user.args[i] is node
        for user in node.users
        for i in _MATRIX_ARGUMENTS.get(op_name(user) or "", ())
    )
