"""Compute once what depends on parameters alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.fx.node import Node, map_arg

from graphwright.ir.graph import Graph, is_impure, is_tensor, op_name, value

_MATRIX_ARGUMENTS = {"linear": (1,), "routed_linear": (2,)}


@dataclass
class Folded:
    """Values of parameter expressions, so that graphs over the same parameters hold each of them once.

    An expression is a call with the identities of the tensors that go in; these are kept, so that none of
    them gives its identity to another tensor.
    """

    _values: dict[tuple[str, str, bool], tuple[torch.Tensor, list[torch.Tensor]]] = field(
        default_factory=dict
    )

    def value(self, node: Node, known: dict[Node, torch.Tensor]) -> tuple[torch.Tensor, bool]:
        """What a call gives on known tensors, and whether it was computed just now."""
        call = repr(map_arg((node.args, node.kwargs), lambda n: f"#{id(known[n])}"))
        key = (str(node.target), call, _feeds_matrix(node))
        if key in self._values:
            return self._values[key][0], False
        result = _compute(node, known)
        self._values[key] = result, [known[n] for n in node.all_input_nodes]
        return result, True


def fold_parameters(graph: Graph, folded: Folded | None = None) -> int:
    """Replace parameter expressions (slices, transposes, scaled copies) by parameters.

    Slices of rows stay views of the user's weights. A transposed matrix that a linear reads is copied
    once into the row-major layout that kernels stream.

    Args:
        folded: what other graphs over the same parameters folded; takes what this one does.

    Returns:
        Bytes of new storage.
    """
    folded = Folded() if folded is None else folded
    known: dict[Node, torch.Tensor] = {
        n: graph.parameters[n.meta["name"]] for n in graph.placeholders("parameter")
    }
    owned = {t.untyped_storage().data_ptr() for t in known.values()}
    computed: set[Node] = set()
    fresh = 0
    for node in list(graph.nodes):
        if not _foldable(node, known):
            continue
        known[node], is_new = folded.value(node, known)
        if is_new:
            computed.add(node)
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
        if node in computed and tensor.untyped_storage().data_ptr() not in owned:
            fresh += tensor.untyped_storage().nbytes()
    graph.eliminate_dead_code()
    graph.drop_unused_placeholders()
    return fresh


def _foldable(node: Node, known: dict[Node, torch.Tensor]) -> bool:
    if node.op != "call_function" or is_impure(node) or not is_tensor(node):
        return False
    inputs = node.all_input_nodes
    return bool(inputs) and all(n in known for n in inputs)


def _compute(node: Node, known: dict[Node, torch.Tensor]) -> torch.Tensor:
    args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
    with torch.no_grad():
        result: torch.Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    return result.contiguous() if _feeds_matrix(node) else result


def _feeds_matrix(node: Node) -> bool:
    """Whether a linear (perhaps through more folding) takes this as its matrix."""
    return any(
        len(user.args) > i and user.args[i] is node
        for user in node.users
        for i in _MATRIX_ARGUMENTS.get(op_name(user) or "", ())
    )
