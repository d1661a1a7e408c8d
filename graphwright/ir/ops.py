"""The semantic ops: what a decoder-only language model is made of.

Each op is a ``torch.library`` op in the namespace ``graphwright``. Its plain PyTorch body is its
meaning, its fallback and the oracle that every kernel is tested against. Kernels register for an op
in :mod:`graphwright.kernels.registry` and must match its schema.

Shapes use these letters: B batch, T tokens in the step, H query heads, G key/value heads, D key
head dimension, E value head dimension, S slots of a cache, K input features, N output features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from graphwright.ir.page_lists import listed_tokens

NAMESPACE = "graphwright"

_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


@dataclass(frozen=True)
class SemanticOp:
    """One op of the IR: its name, schema, reference body and one line of documentation."""

    name: str
    schema: str
    reference: Callable[..., object]
    summary: str

    @property
    def overload(self) -> torch._ops.OpOverload:
        """The ``OpOverload`` that appears as the target of graph nodes."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default


SEMANTIC_OPS: dict[str, SemanticOp] = {}


def semantic_op(schema: str, *, fake: Callable[..., object]) -> Callable[[Callable], Callable]:
    """Define a semantic op from its reference body.

    Args:
        schema: the ``torch.library`` schema without namespace, e.g. ``"f(Tensor x) -> Tensor"``.
        fake: shape function; runs on fake tensors and must give the strides of the real result.
    """

    def define(body: Callable) -> Callable:
        name = schema.split("(", 1)[0]
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, body, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
        summary = (body.__doc__ or "").strip().splitlines()[0]
        SEMANTIC_OPS[name] = SemanticOp(name, schema, body, summary)
        return body

    return define


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


# --- normalization, position, projections --------------------------------------------------------


@semantic_op(
    "rms_norm(Tensor x, Tensor weight, float eps, float offset=0.0, bool weight_in_float=False) -> Tensor",
    fake=lambda x, weight, eps, offset=0.0, weight_in_float=False: torch.empty_like(
        x, memory_format=torch.contiguous_format
    ),
)
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0, weight_in_float: bool = False
) -> torch.Tensor:
    """Root-mean-square norm over the last dimension: ``x / rms(x) * (offset + weight)``.

    The statistics are in float32. ``weight_in_float`` multiplies before rounding back to ``x``'s
    dtype (Gemma, OLMo2, GPT-OSS); otherwise after (Llama). Source: Zhang and Sennrich 2019.
    """
    xf = x.float()
    normed = xf * torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + eps)
    if weight_in_float:
        scale = weight.float() if offset == 0.0 else offset + weight.float()
        return (normed * scale).to(x.dtype).contiguous()
    scale = weight if offset == 0.0 else offset + weight
    return (scale * normed.to(x.dtype)).to(x.dtype).contiguous()


@semantic_op(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    fake=lambda x, weight, bias, eps: torch.empty_like(x, memory_format=torch.contiguous_format),
)
def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """Layer norm over the last dimension. Source: Ba, Kiros and Hinton 2016."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps).contiguous()


@semantic_op(
    "rotary(Tensor x, Tensor cos, Tensor sin, str layout='half') -> Tensor",
    fake=lambda x, cos, sin, layout="half": torch.empty_like(x, memory_format=torch.contiguous_format),
)
def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: str = "half") -> torch.Tensor:
    """Rotary position embedding of all of ``x``'s last dimension. Source: Su et al. 2021.

    Args:
        x: ``[B, H, T, R]``, already cut to the rotated dimensions.
        cos, sin: broadcastable to ``x`` with last dimension R or R/2.
        layout: how pairs lie in the input and the output: ``half`` (i, i + R/2; Llama),
            ``interleaved`` (2i, 2i + 1; GLM), ``interleaved_to_half`` (pairs read interleaved,
            written as halves; DeepSeek).
    """
    rank = x.shape[-1]
    if layout == "half":
        first, second = x[..., : rank // 2], x[..., rank // 2 :]
    else:
        first, second = x[..., 0::2], x[..., 1::2]
    if cos.shape[-1] == rank:  # full width: the same numbers as the textbook x*cos + rotate(x)*sin
        if layout == "interleaved":
            turned = torch.stack((-second, first), dim=-1).flatten(-2)
        else:
            turned = torch.cat((-second, first), dim=-1)
            if layout == "interleaved_to_half":
                x = torch.cat((first, second), dim=-1)
        return (x * cos + turned * sin).to(x.dtype).contiguous()
    low, high = first * cos - second * sin, second * cos + first * sin
    if layout == "interleaved":
        return torch.stack((low, high), dim=-1).flatten(-2).to(x.dtype)
    return torch.cat((low, high), dim=-1).to(x.dtype)


def _linear_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@semantic_op("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", fake=_linear_fake)
def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x [..., K] @ weight[N, K].T + bias[N]``."""
    return F.linear(x, weight, bias).contiguous()


@semantic_op(
    "linear_group(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor[]",
    fake=lambda x, weights, biases: [_linear_fake(x, w) for w in weights],
)
def linear_group(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> list[torch.Tensor]:
    """Several linears that read the same input, in one launch: ``x [..., K]``, weights ``[N_i, K]``."""
    return [F.linear(x, w, b).contiguous() for w, b in zip(weights, biases, strict=True)]


@semantic_op(
    "gated_mlp(Tensor x, Tensor gate, Tensor up, Tensor down, Tensor? gate_bias=None, Tensor? up_bias=None, "
    "Tensor? down_bias=None, str activation='silu') -> Tensor",
    fake=lambda x, gate, up, down, *rest, **kw: _linear_fake(x, down),
)
def gated_mlp(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    gate_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    activation: str = "silu",
) -> torch.Tensor:
    """Gated feed-forward: ``down(act(gate(x)) * up(x))``, gate and up ``[N, K]``, down ``[K, N]``.

    Source: Shazeer 2020, "GLU Variants Improve Transformer".
    """
    hidden = ACTIVATIONS[activation](F.linear(x, gate, gate_bias)) * F.linear(x, up, up_bias)
    return F.linear(hidden, down, down_bias).contiguous()


@semantic_op(
    "mlp(Tensor x, Tensor up, Tensor down, Tensor? up_bias=None, Tensor? down_bias=None, "
    "str activation='gelu') -> Tensor",
    fake=lambda x, up, down, *rest, **kw: _linear_fake(x, down),
)
def mlp(
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    activation: str = "gelu",
) -> torch.Tensor:
    """Plain feed-forward: ``down(act(up(x)))``, up ``[N, K]``, down ``[K, N]``."""
    return F.linear(ACTIVATIONS[activation](F.linear(x, up, up_bias)), down, down_bias).contiguous()


def _routed_linear_fake(x, index, weight, bias=None, transposed=False):  # type: ignore[no-untyped-def]
    return x.new_empty((index.shape[0], index.shape[1], weight.shape[2] if transposed else weight.shape[1]))


@semantic_op(
    "routed_linear(Tensor x, Tensor index, Tensor weight, Tensor? bias=None, bool transposed=False) "
    "-> Tensor",
    fake=_routed_linear_fake,
)
def routed_linear(
    x: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    transposed: bool = False,
) -> torch.Tensor:
    """Mixture-of-experts projection: each (token, choice) goes through the expert that it was routed to.

    Args:
        x: ``[M, 1 or C, K]``, M tokens, C choices a token.
        index: ``[M, C]`` expert numbers, int64.
        weight: ``[X, N, K]``, X experts; ``[X, K, N]`` if ``transposed``.
        bias: ``[X, N]`` or None.

    Returns:
        ``[M, C, N]``.
    """
    tokens, choices = index.shape
    inputs = x.expand(tokens, choices, x.shape[-1]).reshape(tokens * choices, x.shape[-1])
    experts = index.reshape(-1)
    out = x.new_empty((tokens * choices, weight.shape[2] if transposed else weight.shape[1]))
    for expert in experts.unique().tolist():
        rows = (experts == expert).nonzero().squeeze(1)
        matrix = weight[expert].t() if transposed else weight[expert]
        out[rows] = F.linear(inputs[rows], matrix, None if bias is None else bias[expert])
    return out.view(tokens, choices, out.shape[-1])


# --- attention -----------------------------------------------------------------------------------


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Masked softmax attention in float32; ``visible [B, T, S]`` or ``[B, T, G, S]``: which keys are seen."""
    batch, heads, tokens, _ = q.shape
    groups = k.shape[1]
    grouped = q.float().view(batch, groups, heads // groups, tokens, -1)
    scores = torch.einsum("bghtd,bgsd->bghts", grouped, k.float()) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    seen = visible[:, None] if visible.dim() == 3 else visible.transpose(1, 2)  # [B, 1 or G, T, S]
    scores = scores.masked_fill(~seen[:, :, None], float("-inf"))
    top = scores.amax(-1, keepdim=True)
    sink = None if sinks is None else sinks.float().view(1, groups, heads // groups, 1, 1)
    if sink is not None:
        top = torch.maximum(top, sink)
    top = torch.where(top == float("-inf"), 0.0, top)  # a query that sees nothing gives zeros
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - top)
    weights = weights / torch.where(total == 0, 1.0, total)
    out = torch.einsum("bghts,bgse->btghe", weights, v.float())
    return out.reshape(batch, tokens, heads, v.shape[-1]).to(q.dtype).contiguous()


def _attention_fake(q, k, v, *rest, **kw):  # type: ignore[no-untyped-def]
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))


@semantic_op(
    "attention(Tensor q, Tensor k, Tensor v, float scale, int window=0, float softcap=0.0, "
    "Tensor? sinks=None) -> Tensor",
    fake=_attention_fake,
)
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal self-attention over the tokens of one call, no cache.

    Args:
        q: ``[B, H, T, D]``; k: ``[B, G, T, D]``; v: ``[B, G, T, E]``, H a multiple of G.
        scale: factor on the scores.
        window: tokens a query sees, itself included; 0 means all.
        softcap: ``softcap * tanh(score / softcap)`` on the scores; 0 means none (Gemma2).
        sinks: ``[H]`` logits that take part in the softmax and carry no value (GPT-OSS).

    Returns:
        ``[B, T, H, E]``, contiguous.
    """
    tokens = q.shape[2]
    at = torch.arange(tokens, device=q.device)
    visible = at[None, :] <= at[:, None]
    if window:
        visible = visible & (at[None, :] > at[:, None] - window)
    return _attend(q, k, v, visible.expand(q.shape[0], -1, -1), scale, softcap, sinks)


# --- state ---------------------------------------------------------------------------------------


@semantic_op(
    "cache_append(Tensor(a!) store, Tensor new, Tensor lengths, Tensor counts) -> ()",
    fake=lambda store, new, lengths, counts: None,
)
def cache_append(store: torch.Tensor, new: torch.Tensor, lengths: torch.Tensor, counts: torch.Tensor) -> None:
    """Write the step's tokens into a cache; token t of row b goes to slot ``(lengths[b] + t) % S``.

    Args:
        store: ``[B, G, S, D]``, mutated.
        new: ``[B, G, T, D]``; rows t >= counts[b] are padding and are not written.
        lengths: ``[B]`` int64, committed tokens before the step.
        counts: ``[B]`` int64, valid tokens of the step.
    """
    slots = store.shape[2]
    for row, (length, count) in enumerate(zip(lengths.tolist(), counts.tolist(), strict=True)):
        at = (length + torch.arange(count, device=store.device)) % slots
        store[row].index_copy_(1, at, new[row, :, :count].to(store.dtype))


def cache_visibility(
    positions: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    tree: torch.Tensor,
    slots: int,
    window: int,
) -> torch.Tensor:
    """Which cache slots each query of a step sees: ``[B, T, S]`` bool. See :func:`cache_attention`."""
    tokens = positions.shape[1]
    slot = torch.arange(slots, device=positions.device)
    total = (lengths + counts)[:, None]  # tokens in the cache after the append
    # The newest token that slot s can hold has number p = total-1 - ((total-1 - s) mod S).
    number = total - 1 - torch.remainder(total - 1 - slot[None, :], slots)  # [B, S]
    held = number >= 0
    in_step = held & (number >= lengths[:, None])
    column = (number - lengths[:, None]).clamp(0, tokens - 1)
    at = torch.where(in_step, positions.gather(1, column), number)  # logical position [B, S]
    row = torch.arange(tokens, device=positions.device)
    if tree.shape[1]:
        bit = (tree[:, :, None] >> column[:, None, :].clamp(max=63)) & 1
        seen_in_step = bit.bool()
    else:
        seen_in_step = column[:, None, :] <= row[None, :, None]
    visible = held[:, None] & torch.where(in_step[:, None], seen_in_step, True)
    if window:
        visible = visible & (at[:, None, :] > positions[:, :, None] - window)
    return visible & (row[None, :] < counts[:, None])[:, :, None]


def _cache_attention_fake(q, keys, values, *rest, **kw):  # type: ignore[no-untyped-def]
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], values.shape[3]))


@semantic_op(
    "cache_attention(Tensor q, Tensor keys, Tensor values, Tensor positions, Tensor lengths, Tensor counts, "
    "Tensor tree, float scale, int window=0, float softcap=0.0, Tensor? sinks=None, Tensor? pages=None, "
    "Tensor? chosen=None, int page=0, int first=0) -> Tensor",
    fake=_cache_attention_fake,
)
def cache_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    tree: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    pages: torch.Tensor | None = None,
    chosen: torch.Tensor | None = None,
    page: int = 0,
    first: int = 0,
) -> torch.Tensor:
    """Attention of a step's tokens over a cache that already holds them (append runs first).

    Args:
        q: ``[B, H, T, D]``.
        keys: ``[B, G, S, D]``; values: ``[B, G, S, E]``. Token p lives in slot ``p % S``; S is at
            least the window plus the step for layers with a window, and the capacity otherwise.
        positions: ``[B, T]`` int64, the position of each query (``lengths[b] + depth`` in a tree).
        lengths: ``[B]`` committed tokens before the step; counts: ``[B]`` valid tokens of the step.
        tree: ``[B, T]`` int64; bit j of ``tree[b, t]`` says token t sees token j of the step (itself
            included), for T <= 63. ``[B, 0]`` means a chain: token t sees tokens 0..t of the step.
        scale, window, softcap, sinks: as in :func:`attention`.
        pages: ``[B, T, G, N]`` int32 numbers of the pages that each query reads of each key/value head;
            only for stores without a window. See :mod:`graphwright.ir.sparse_ops`.
        chosen: ``[B, T, G]`` int32, how many of them; -1: everything.
        page, first: tokens of a page, and before the first page, which everyone reads.

    Returns:
        ``[B, T, H, E]``, contiguous; zeros for padding rows t >= counts[b].
    """
    visible = cache_visibility(positions, lengths, counts, tree, keys.shape[2], window)
    if pages is not None and chosen is not None:
        visible = visible[:, :, None] & listed_tokens(pages, chosen, page, first, lengths, keys.shape[2])
    out = _attend(q, keys, values, visible, scale, softcap, sinks)
    valid = torch.arange(q.shape[2], device=q.device)[None, :] < counts[:, None]
    return out * valid[:, :, None, None].to(out.dtype)


@semantic_op(
    "append_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor positions, "
    "Tensor lengths, Tensor counts, Tensor tree, float scale, int window=0, float softcap=0.0, "
    "Tensor? sinks=None) -> Tensor",
    fake=lambda q, k, v, keys, values, *rest, **kw: _cache_attention_fake(q, keys, values),
)
def append_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    tree: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`cache_append` of keys and values, then :func:`cache_attention`, in one launch."""
    cache_append(keys, k, lengths, counts)
    cache_append(values, v, lengths, counts)
    return cache_attention(q, keys, values, positions, lengths, counts, tree, scale, window, softcap, sinks)


@semantic_op(
    "rotary_append(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, "
    "Tensor lengths, Tensor counts, str layout='half') -> Tensor",
    fake=lambda q, *rest, **kw: torch.empty_like(q, memory_format=torch.contiguous_format),
)
def rotary_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    layout: str = "half",
) -> torch.Tensor:
    """:func:`rotary` of queries and keys, then :func:`cache_append` of keys and values, in one launch.

    Args:
        q: ``[B, H, T, D]``; k: ``[B, G, T, D]``; v: ``[B, G, T, E]``.
        cos, sin, layout: as in :func:`rotary`.
        keys, values, lengths, counts: as in :func:`append_attention`.

    Returns:
        The rotated queries, of padding rows too.
    """
    cache_append(keys, rotary(k, cos, sin, layout), lengths, counts)
    cache_append(values, v, lengths, counts)
    return rotary(q, cos, sin, layout)


@semantic_op(
    "slot_positions(Tensor lengths, Tensor counts, SymInt slots) -> Tensor",
    fake=lambda lengths, counts, slots: lengths.new_empty((lengths.shape[0], slots)),
)
def slot_positions(lengths: torch.Tensor, counts: torch.Tensor, slots: int) -> torch.Tensor:
    """The position of the token in each cache slot, 0 for empty slots: ``[B, S]`` int64.

    ``lengths`` and ``counts`` are ``[B]`` as in :func:`cache_append`; token p lives in slot p % S.
    """
    last = (lengths + counts)[:, None] - 1
    slot = torch.arange(slots, device=lengths.device)[None, :]
    return (last - torch.remainder(last - slot, slots)).clamp(min=0)
