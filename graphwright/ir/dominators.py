"""Which nodes every path from the token ids to another node passes through."""

from __future__ import annotations

import networkx as nx
from torch.fx.node import Node

from graphwright.ir.graph import Graph, is_impure, op_name

# Sizes are no data: what only reads a size does not depend on the tokens.
_SIZE_OPS = {"aten.sym_size.int", "mul", "add", "floordiv", "sub"}


def token_flow(graph: Graph) -> nx.DiGraph:
    """What depends on ``input_ids``, as edges from each node to those that read it.

    What is written to a state flows on to the calls after it that read the state.
    """
    flow = nx.DiGraph()
    flow.add_node(graph.placeholder("input_ids"))
    writers: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        if node.op != "call_function" or op_name(node) in _SIZE_OPS:
            continue
        for read in node.all_input_nodes:
            for previous in (read, *writers.get(read, ())):
                if previous in flow:
                    flow.add_edge(previous, node)
        if node in flow and is_impure(node):
            for state in node.all_input_nodes:
                if state.meta.get("kind") == "state":
                    writers.setdefault(state, []).append(node)
    return flow


def token_dominators(graph: Graph) -> tuple[dict[Node, Node], dict[Node, int]]:
    """Immediate dominators of everything that depends on ``input_ids``, and the execution order."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    return nx.immediate_dominators(token_flow(graph), graph.placeholder("input_ids")), order
