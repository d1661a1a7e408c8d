"""One cost rule per op.

A rule reads a :class:`~graphwright.cost_model.shapes.Call` and returns the
:class:`~graphwright.cost_model.cost.Cost` of one run of it. Matrix products count two operations per
multiply-add; the exponentials of a softmax are not counted.

``attention`` is priced as the decode step that it becomes: its T new tokens are appended to a cache that
holds C tokens, and attend to all of them. With C = 0 that is a prefill.
"""

from __future__ import annotations

from collections.abc import Callable

import sympy
import torch

from graphwright.cost_model.cost import ACTIVATIONS, CACHE, WEIGHTS, B, C, Cost, Expr, T
from graphwright.cost_model.held_tokens import visible_window
from graphwright.cost_model.listed_pages import Listing
from graphwright.cost_model.shapes import Call, dtype_name, kind_of, larger

Rule = Callable[[Call], Cost]

RULES: dict[str, Rule] = {}
#: Ops that a compiler joins with their neighbours: they start no kernel of their own.
FUSIBLE: set[str] = set()
#: How many kernels the reference body of a fusible op starts where nothing fuses it; 1 for others.
EAGER_KERNELS: dict[str, int] = {}


def cost_of(*names: str, fusible: bool = False, eager: int = 1) -> Callable[[Rule], Rule]:
    """Register a rule for semantic ops (``"attention"``) or other ops (``"aten.mm.default"``).

    Args:
        names: op names as :func:`graphwright.ir.graph.op_name` gives them.
        fusible: the op runs inside a fused kernel; launches and activation traffic are then counted per
            fused region by :func:`graphwright.cost_model.graph_cost.graph_cost`, not by the rule.
        eager: for those, how many kernels one starts where nothing is fused.
    """

    def register(rule: Rule) -> Rule:
        for name in names:
            RULES[name] = rule
            if fusible:
                FUSIBLE.add(name)
                EAGER_KERNELS[name] = eager
        return rule

    return register


def add_parts(*parts: dict[str, Expr]) -> dict[str, Expr]:
    """Bytes by kind, added."""
    merged: dict[str, Expr] = {}
    for part in parts:
        for kind, size in part.items():
            merged[kind] = merged.get(kind, sympy.Integer(0)) + size
    return merged


# --- matrix products -----------------------------------------------------------------------------


@cost_of("linear", "aten.linear.default")
def _linear(call: Call) -> Cost:
    flops = 2 * call.out_numel() * call.shape("weight")[1]
    input_name = "x" if _has(call, "x") else "input"
    read = call.reads(input_name, "weight", "bias")
    return Cost({call.dtype("weight"): flops}, read, call.writes(), 1)


@cost_of("linear_group")
def _linear_group(call: Call) -> Cost:
    rows = call.numel("x") / call.shape("x")[-1]
    weights = [node.meta["val"] for node in call.nodes("weights")]
    flops = 2 * rows * sympy.Add(*(call.shapes.numel(weight) for weight in weights))
    dtype = dtype_name(weights[0].dtype)
    return Cost({dtype: flops}, call.reads("x", "weights", "biases"), call.writes(), 1)


@cost_of("gated_mlp")
def _gated_mlp(call: Call) -> Cost:
    biases = ("gate_bias", "up_bias", "down_bias")
    return _feed_forward(call, ("gate", "up", "down"), biases)


@cost_of("mlp")
def _mlp(call: Call) -> Cost:
    return _feed_forward(call, ("up", "down"), ("up_bias", "down_bias"))


def _feed_forward(call: Call, weights: tuple[str, ...], biases: tuple[str, ...]) -> Cost:
    """Two launches: into the hidden width and back; the hidden activations pass between them."""
    rows = call.numel("x") / call.shape("x")[-1]
    flops = 2 * rows * sympy.Add(*(call.numel(name) for name in weights))
    hidden = {ACTIVATIONS: rows * call.shape("up")[0] * call.val("x").dtype.itemsize}
    read = add_parts(call.reads("x", *weights, *biases), hidden)
    return Cost({call.dtype("up"): flops}, read, add_parts(call.writes(), hidden), 2)


def expected_experts(experts: Expr, choices: Expr, tokens: Expr) -> Expr:
    """How many different experts some tokens are expected to choose.

    Each token takes ``choices`` different ones of ``experts``, uniformly and independently of the other
    tokens: X * (1 - (1 - choices/X)^tokens). Source: MoESD (Huang et al. 2025), section 3.
    """
    return experts * (1 - (1 - sympy.Rational(1) * choices / experts) ** tokens)


@cost_of("routed_linear")
def _routed_linear(call: Call) -> Cost:
    tokens, choices = call.shape("index")
    experts, rows, columns = call.shape("weight")
    active = expected_experts(experts, choices, tokens)
    itemsize = call.val("weight").dtype.itemsize
    read = add_parts(call.reads("x", "index"), {WEIGHTS: active * rows * columns * itemsize})
    for bias in call.nodes("bias"):
        size = call.shapes.nbytes(bias.meta["val"]) / experts
        read = add_parts(read, {WEIGHTS: active * size})
    return Cost({call.dtype("weight"): 2 * tokens * choices * rows * columns}, read, call.writes(), 1)


@cost_of(
    "aten.mm.default", "aten.bmm.default", "aten.addmm.default", "aten.baddbmm.default", "aten.matmul.default"
)
def _matrix_product(call: Call) -> Cost:
    names = [spec.name for spec in _schema(call).arguments]
    left = next(name for name in ("mat1", "batch1", "self") if name in names)
    inner = call.shape(left)[-1]
    operands = [name for name in names if name in ("self", "mat1", "mat2", "batch1", "batch2", "other")]
    return Cost({call.dtype(left): 2 * call.out_numel() * inner}, call.reads(*operands), call.writes(), 1)


# --- attention and its cache ---------------------------------------------------------------------


def seen_tokens(window: int, listing: Listing | None = None) -> Expr:
    """Query-key pairs of one head and sequence: token t of the step sees C + t + 1, at most the window."""
    pairs = C + (T + 1) / 2
    seen = T * (sympy.Min(pairs, window) if window else pairs)
    return seen - listing.unseen_tokens if listing else seen


def read_tokens(window: int, listing: Listing | None = None) -> Expr:
    """Cache slots that a step reads, for one sequence: its own T and what lies before them."""
    read = T + (sympy.Min(C, window - 1) if window else C)
    return read - listing.unread_tokens if listing else read


def attend(call: Call, keys: str, values: str, *, is_cache: bool = False) -> Cost:
    """Attention of T tokens over the keys and values in arguments of these names.

    They are read as cache where they are state (or will be: ``is_cache``), and as activations where a
    cheaper store was expanded into them.
    """
    window = visible_window(call.node, call.arg("window"))
    read: dict[str, Expr] = {}
    for name in (keys, values):
        kind = CACHE if is_cache else kind_of(call.arg(name))
        slots = B * read_tokens(window, call.listing)
        read = add_parts(read, {kind: slots * slot_bytes(call, call.val(name))})
    return attention_arithmetic(call, call.shape(values)[3]) + Cost(read=read)


def attention_arithmetic(call: Call, width: Expr) -> Cost:
    """Attention whose values have so many features, without reading keys and values."""
    _, heads, _, depth = call.shape("q")
    window = visible_window(call.node, call.arg("window"))
    flops = 2 * B * heads * (depth + width) * seen_tokens(window, call.listing)
    return Cost({call.dtype("q"): flops}, call.reads("q", "sinks"), call.writes(), 1)


def slot_bytes(call: Call, *stores: torch.Tensor) -> Expr:
    """Bytes that one token of one sequence takes in stores ``[B, G, slots, D]``."""
    sizes = [(call.shapes.shape(store), store.dtype.itemsize) for store in stores]
    return sympy.Add(*(shape[1] * shape[3] * itemsize for shape, itemsize in sizes))


def append(call: Call, new: tuple[str, ...], token_bytes: Expr) -> Cost:
    """Writing T new tokens into the cache."""
    return Cost(read=call.reads(*new), written={CACHE: B * T * token_bytes}, launches=1)


@cost_of("attention")
def _attention(call: Call) -> Cost:
    appended = append(call, ("k", "v"), slot_bytes(call, call.val("k"), call.val("v")))
    return appended + attend(call, "k", "v", is_cache=True) - Cost(launches=1)


@cost_of("append_attention")
def _append_attention(call: Call) -> Cost:
    """Append and attention in one launch."""
    appended = append(call, ("k", "v"), slot_bytes(call, call.val("keys"), call.val("values")))
    return appended + attend(call, "keys", "values") - Cost(launches=1)


@cost_of("rotary_append")
def _rotary_append(call: Call) -> Cost:
    """Append in the launch that rotates queries and keys: two products and a sum an element."""
    appended = append(call, ("k", "v"), slot_bytes(call, call.val("keys"), call.val("values")))
    flops = 3 * (call.numel("q") + call.numel("k"))
    return appended + Cost({call.dtype("q"): flops}, call.reads("q", "cos", "sin"), call.writes())


@cost_of("slot_positions", fusible=True, eager=4)
def _slot_positions(call: Call) -> Cost:
    """Integer arithmetic on numbers that are at hand."""
    return Cost()


# --- what a compiler fuses -----------------------------------------------------------------------


@cost_of("rms_norm", fusible=True, eager=8)
def _rms_norm(call: Call) -> Cost:
    """Square, sum, scale, weight: four operations an element, in float32."""
    return Cost({"float32": 4 * call.out_numel()}, _held(call))


@cost_of("layer_norm", "aten.layer_norm.default", "aten.native_layer_norm.default", fusible=True)
def _layer_norm(call: Call) -> Cost:
    """Mean, variance, scale, weight, bias: seven operations an element, in float32."""
    elements = call.shapes.numel(call.outputs[0])
    return Cost({"float32": 7 * elements}, _held(call))


@cost_of("rotary", fusible=True, eager=7)
def _rotary(call: Call) -> Cost:
    """Two products and a sum an element."""
    return Cost({call.dtype("x"): 3 * call.out_numel()}, _held(call))


@cost_of("aten.embedding.default")
def _embedding(call: Call) -> Cost:
    """One row of the table per token; the rest of the table is not read."""
    rows = call.out_numel() * call.outputs[0].dtype.itemsize
    return Cost(read=add_parts(call.reads("indices"), {WEIGHTS: rows}), written=call.writes(), launches=1)


def elementwise(call: Call) -> Cost:
    """Any other op: one operation for each element of its largest operand or result."""
    elements = call.out_numel() if call.outputs else sympy.Integer(0)
    for node in call.node.all_input_nodes:
        val = node.meta.get("val")
        if isinstance(val, torch.Tensor) and kind_of(node) == ACTIVATIONS:
            elements = larger(elements, call.shapes.numel(val))
    dtype = call.outputs[0].dtype if call.outputs else torch.int64
    flops = {dtype_name(dtype): elements} if dtype.is_floating_point else {}
    return Cost(flops, _held(call))


def _held(call: Call) -> dict[str, Expr]:
    """What a fused op reads of weights and cache; an operand is never read beyond the result's size."""
    parts: dict[str, Expr] = {}
    for node in call.node.all_input_nodes:
        val, kind = node.meta.get("val"), kind_of(node)
        if isinstance(val, torch.Tensor) and kind != ACTIVATIONS:
            parts[kind] = parts.get(kind, sympy.Integer(0)) + call.shapes.nbytes(val)
    return parts


def _schema(call: Call) -> torch._C.FunctionSchema:
    target = call.node.target
    assert isinstance(target, torch._ops.OpOverload)
    return target._schema


def _has(call: Call, name: str) -> bool:
    return any(spec.name == name for spec in _schema(call).arguments)
