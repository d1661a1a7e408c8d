"""Whether the last piece can run on chosen rows only (the head over one row instead of a prompt)."""

from __future__ import annotations

from torch.fx.node import Node

from graphwright.ir.graph import Graph, is_impure, op_name, value
from graphwright.runtime.lowering.kernels import semantic_name
from graphwright.runtime.lowering.split import Piece

_ROW_WISE = {"rms_norm", "layer_norm", "linear", "linear_group", "getitem"}
_ROW_WISE_ATEN = {
    "add", "sub", "mul", "div", "neg", "pow", "rsqrt", "tanh", "sigmoid", "_to_copy", "to", "type_as",
    "clone", "silu", "gelu", "relu", "clamp", "linear", "alias", "contiguous",
}  # fmt: skip


def row_wise_input(graph: Graph, piece: Piece) -> Node | None:
    """The one ``[B, T, F]`` input that a row-wise piece works on; None if the piece is not row-wise."""
    tokens = str(value(graph.placeholder("input_ids")).shape[1])
    by_token = [n for n in piece.inputs if tokens in [str(s) for s in value(n).shape]]
    if len(by_token) != 1 or value(by_token[0]).dim() != 3:
        return None
    row_wise = all(_is_row_wise(n) for n in piece.module.graph.nodes if n.op == "call_function")
    return by_token[0] if row_wise else None


def _is_row_wise(node: Node) -> bool:
    if is_impure(node):
        return False
    name = semantic_name(node) or op_name(node) or ""
    if name in _ROW_WISE:
        return True
    return name.startswith("aten.") and name.split(".")[1] in _ROW_WISE_ATEN
