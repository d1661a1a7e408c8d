"""Raises RMS norms: Llama's, Gemma's with its offset, and those that scale in float32."""

from __future__ import annotations

import torch
from torch.fx.node import Node

from graphwright.ir.canonicalize.registry import raiser
from graphwright.ir.canonicalize.rewriter import Rewriter
from graphwright.ir.graph import value
from graphwright.ir.layout import same_size, same_type
from graphwright.ir.matcher import (
    Match,
    add,
    call,
    capture,
    casts,
    either,
    find,
    inverse_root,
    is_a,
    match_at,
    mean_last,
    mul,
    scalar,
    square,
)

_X = casts(capture("x"))
_MEAN_SQUARE = add(mean_last(square(_X)), scalar("eps"))
_NORMED = either(mul(_X, inverse_root(_MEAN_SQUARE)), call("div", _X, call("sqrt", _MEAN_SQUARE)))
_WEIGHT = casts(capture("weight"))
_SCALE = either(casts(add(_WEIGHT, scalar("offset"))), _WEIGHT)
PATTERN = casts(mul(casts(_NORMED), _SCALE))


@raiser("rms_norm", after=("cleanup",))
def rms_norm(rewriter: Rewriter) -> None:
    """Raise ``x / rms(x) * (offset + weight)`` into ``rms_norm``."""
    refused: set[Node] = set()
    for match in find(rewriter.graph, PATTERN, _faithful):
        reason = match.refusal()
        if reason is not None:
            rewriter.near_miss("rms_norm", match.root, reason)
            refused |= match.nodes
            continue
        options = {}
        if match.get("offset"):
            options["offset"] = match["offset"]
        if _scales_in_float(match):
            options["weight_in_float"] = True
        rewriter.replace(match.root, "rms_norm", match["x"], match["weight"], match["eps"], **options)
    rewriter.graph.eliminate_dead_code()
    for node in rewriter.graph.nodes:
        core = match_at(node, _CORE) if node.op == "call_function" and node not in refused else None
        if core is not None:
            rewriter.near_miss("rms_norm", node, _why_not(core))


def _faithful(match: Match) -> bool:
    """Whether ``rms_norm`` with these arguments rounds where the graph does."""
    x, weight = value(match["x"]), value(match["weight"])
    if x.dtype == torch.float64 or not same_type(value(match.root), x):
        return False
    if weight.dim() != 1 or not same_size(weight.shape[0], x.shape[-1]):
        return False
    statistics = next(node for node in match.nodes if is_a(node, "mean_last"))
    if value(statistics).dtype != torch.float32:
        return False
    if match.get("offset") is None:
        return True
    shifted = next(node for node in match.nodes if _adds(node, match["offset"]))
    return value(shifted).dtype == (torch.float32 if _scales_in_float(match) else weight.dtype)


def _adds(node: Node, number: float) -> bool:
    """Whether a node adds this number to a vector (and not to the mean square)."""
    return is_a(node, "add") and value(node).dim() == 1 and number in (node.args[0], node.args[1])


def _scales_in_float(match: Match) -> bool:
    """Whether the product with the weight is rounded to ``x``'s dtype only afterwards."""
    if value(match["x"]).dtype == torch.float32:
        return False  # nothing to round: both meanings are the same, keep the default
    return is_a(match.root, "cast")


_CORE = inverse_root(_MEAN_SQUARE)


def _why_not(core: Match) -> str:
    """What keeps ``rsqrt(mean(x^2) + eps)`` from being a part of an RMS norm."""
    x = value(core["x"])
    statistics = next(node for node in core.nodes if is_a(node, "mean_last"))
    if value(statistics).dtype != torch.float32:
        return f"the mean of squares is in {value(statistics).dtype}, not in float32"
    normed = [user for user in core.root.users if is_a(user, "mul") and core["x"] in _inputs(user)]
    if not normed:
        return "rsqrt(mean(x^2)) that does not scale x itself"
    scaled = [user for node in normed for user in _readers(node) if is_a(user, "mul")]
    if not scaled:
        return "rsqrt(mean(x^2)) without a weight multiplication"
    return (
        f"the scale in {scaled[0].name} is not a vector of {x.shape[-1]} weights, "
        "or is rounded where rms_norm does not round"
    )


def _inputs(node: Node) -> list[Node]:
    """What a node reads, and what lies below the casts of that."""
    found = []
    for source in node.all_input_nodes:
        found.append(source)
        while is_a(source, "cast"):
            source = source.all_input_nodes[0]
            found.append(source)
    return found


def _readers(node: Node) -> list[Node]:
    """Who reads a node, casts looked through."""
    found: list[Node] = []
    for user in node.users:
        found.extend(_readers(user) if is_a(user, "cast") else [user])
    return found
