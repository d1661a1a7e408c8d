"""Capture: a transformers model in, one ATen graph with dynamic batch and sequence out.

The model is never touched: a *twin* shares its tensors and gets its own configuration, in which
attention and expert layers are routed to graphwright's ops by transformers' public registries. What
attention means (scale, window, softcap, sinks) therefore arrives as arguments and is never guessed
from masks.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
import torch._dynamo.config
import torch.fx
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface

from graphwright.ir.errors import CaptureError, UnsupportedModelError
from graphwright.ir.graph import Graph, sanitize
from graphwright.optimizer.export import export_aten

IMPLEMENTATION = "graphwright"
_SERIAL = itertools.count()
# Two rows and five tokens: any numbers that dynamo does not specialize (0 and 1) would do.
_EXAMPLE_BATCH, _EXAMPLE_TOKENS = 2, 5


def capture(model: PreTrainedModel) -> Graph:
    """Capture ``logits = model(input_ids, position_ids)`` as one graph.

    Args:
        model: a decoder-only transformers model, on one device (``meta`` too).

    Returns:
        A graph with inputs ``input_ids`` and ``positions`` (both ``[B, T]`` int64, B and T symbolic)
        and one output, the logits ``[B, T, V]``. Attention is the op ``graphwright::attention``.

    Raises:
        CaptureError: dynamo could not make one graph of it; names the source line.
        UnsupportedModelError: the model computes something that the ops cannot express.
    """
    register_implementations()
    twin = _twin(model)
    exported: dict[str, Any] = {}

    def keep(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        exported.update(_export(gm, example_inputs))
        return lambda *args: _empty_outputs(gm)

    _run_dynamo(twin, keep)
    return _to_graph(exported, twin)


def register_implementations() -> None:
    """Make ``graphwright`` known as an attention, mask and experts implementation (idempotent)."""
    AttentionInterface.register(IMPLEMENTATION, _attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
    try:
        from transformers.integrations.moe import ExpertsInterface
    except ImportError:  # older transformers write their experts out; they are captured as they are
        return
    ExpertsInterface.register(IMPLEMENTATION, _experts_forward)


# --- what the twin's layers call -----------------------------------------------------------------


def _attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature: query ``[B, H, T, D]``, key and value ``[B, G, T, D]``."""
    if attention_mask is not None:
        raise RuntimeError("graphwright: this attention builds a mask of its own")
    if key.shape[2] != query.shape[2]:
        raise RuntimeError("graphwright: this attention takes the keys of one call, not those of a cache")
    if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        raise RuntimeError("graphwright: this attention is not causal")
    if kwargs.get("position_bias") is not None:
        raise RuntimeError("graphwright: this attention adds a position bias")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = torch.ops.graphwright.attention(
        query, key, value, scale, sliding_window or 0, softcap or 0.0, s_aux
    )
    return out, None


def _no_mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> None:
    """Masks are implied by the attention op: causal, with the window that it is given."""
    given = attention_mask is not None and not torch.compiler.is_compiling()
    if given and attention_mask is not None and not bool(attention_mask.all()):
        raise RuntimeError("graphwright: a model prepared for capture takes no padding")
    return None


def _experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """transformers' experts signature: hidden ``[M, K]``, index and weights ``[M, C]``."""
    biased = self.has_bias
    transposed = self.is_transposed
    first = self.gate_up_proj if self.has_gate else self.up_proj
    first_bias = (self.gate_up_proj_bias if self.has_gate else self.up_proj_bias) if biased else None
    routed = torch.ops.graphwright.routed_linear
    hidden = routed(hidden_states.unsqueeze(1), top_k_index, first, first_bias, transposed)
    hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
    last_bias = self.down_proj_bias if biased else None
    out = routed(hidden, top_k_index, self.down_proj, last_bias, transposed)
    out = out * top_k_weights.unsqueeze(-1)
    return out.sum(dim=1).to(hidden_states.dtype)


class _PassThroughCache(Cache):
    """A cache that stores nothing: capture sees the step's own keys and values."""

    def __init__(self) -> None:
        self.layers: list[Any] = []

    def update(self, key_states, value_states, *args, **kwargs):  # type: ignore[no-untyped-def]
        return key_states, value_states

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return 0

    def get_mask_sizes(self, query: Any, *args: Any, **kwargs: Any) -> tuple[int, int]:
        return (query if isinstance(query, int | torch.SymInt) else query.shape[0]), 0

    def get_max_cache_shape(self, *args: Any, **kwargs: Any) -> int:
        return -1


# --- dynamo --------------------------------------------------------------------------------------


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the module tree that shares every tensor with ``model`` and owns its configuration."""
    shared = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    twin = copy.deepcopy(model, shared)  # type: ignore[arg-type]
    twin.eval()
    for module in twin.modules():
        config = getattr(module, "config", None)
        if config is None:
            continue
        for nested in (config, getattr(config, "text_config", None)):
            if nested is not None:
                nested._attn_implementation = IMPLEMENTATION
                nested._experts_implementation = IMPLEMENTATION
    return twin


def _run_dynamo(twin: PreTrainedModel, backend: Callable[..., Any]) -> None:
    def step(input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return twin(
            input_ids=input_ids,
            position_ids=position_ids,
            past_key_values=_PassThroughCache(),
            use_cache=True,
            return_dict=False,
        )[0]

    if "position_ids" not in inspect.signature(type(twin).forward).parameters:
        raise UnsupportedModelError(
            "the model's forward takes no position_ids, so rows of different lengths cannot be told apart",
            where=type(twin).__name__,
            hint="use a model whose forward accepts position_ids (all current decoder-only ones do)",
        )
    # A code object of its own, so that dynamo's per-code recompile limit never hits the tenth model
    # and the user's own compiled functions are left alone (no torch._dynamo.reset()).
    code = step.__code__.replace(co_name=f"graphwright_step_{next(_SERIAL)}")
    fresh = types.FunctionType(code, step.__globals__, code.co_name, None, step.__closure__)
    device = next(twin.parameters()).device
    ids = torch.zeros(_EXAMPLE_BATCH, _EXAMPLE_TOKENS, dtype=torch.int64, device=device)
    positions = torch.arange(_EXAMPLE_TOKENS, device=device).repeat(_EXAMPLE_BATCH, 1)
    for tensor in (ids, positions):
        torch._dynamo.mark_dynamic(tensor, 0)
        torch._dynamo.mark_dynamic(tensor, 1)
    options = torch._dynamo.config.patch(specialize_float=True, assume_static_by_default=True)
    try:
        with torch.no_grad(), options:
            torch.compile(fresh, backend=backend, fullgraph=True)(ids, positions)
    except Exception as error:
        raise _capture_error(error, twin) from error


def _capture_error(error: Exception, twin: PreTrainedModel) -> CaptureError:
    """dynamo's failure, with the user's source line in front."""
    stack = getattr(error, "real_stack", None)
    where = type(twin).__name__
    if stack:
        frame = stack[-1]
        where = f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}"
    message = str(error).strip()
    own = [line for line in message.splitlines() if "graphwright: " in line]
    first = own[0].split("graphwright: ", 1)[1].rstrip("')\"") if own else message.splitlines()[0]
    return CaptureError(
        f"the model could not be captured as one graph: {first}",
        where=where,
        hint="graphwright needs a forward without graph breaks; see the chained error for dynamo's account",
    )


def _empty_outputs(gm: torch.fx.GraphModule) -> tuple[torch.Tensor, ...]:
    """Stand-ins for the outputs: capture needs the graph, not a run of the model."""
    outputs = gm.graph.output_node().args[0]
    assert isinstance(outputs, tuple | list)
    return tuple(torch.empty(0) for _ in outputs)


def _export(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> dict[str, Any]:
    """dynamo's graph as functional ATen with composite ops kept, plus what its placeholders were."""
    names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    return {"module": export_aten(gm), "tensors": example_inputs, "names": names}


# --- from exported ATen to a Graph ---------------------------------------------------------------


def _to_graph(exported: dict[str, Any], twin: PreTrainedModel) -> Graph:
    """Name the placeholders, replace size inputs by ``sym_size`` and drop metadata assertions."""
    module: torch.fx.GraphModule = exported["module"]
    source = [n for n in module.graph.nodes if n.op == "placeholder"]
    owners = {id(t): name for name, t in itertools.chain(_named_tensors(twin))}
    ids, positions = (_user_input(exported, source, name) for name in ("input_ids", "position_ids"))

    fresh = torch.fx.Graph()
    mapping: dict[torch.fx.Node, torch.fx.Node] = {}
    parameters: dict[str, torch.Tensor] = {}

    def placeholder(old: torch.fx.Node, kind: str, name: str) -> None:
        node = fresh.placeholder(sanitize(name))
        node.meta.update(old.meta, kind=kind, name=name)
        mapping[old] = node

    placeholder(ids, "input", "input_ids")
    placeholder(positions, "input", "positions")
    for old, tensor in zip(source, exported["tensors"], strict=True):
        if old in mapping or not isinstance(old.meta["val"], torch.Tensor):
            continue
        name = owners.get(id(tensor)) or f"constant.{len(parameters)}"
        parameters[name] = tensor.detach()
        placeholder(old, "parameter", name)
    for old in module.graph.nodes:
        if old.op == "get_attr":
            name = f"constant.{old.target}"
            parameters[name] = getattr(module, old.target)
            placeholder(old, "parameter", name)

    batch, tokens = ids.meta["val"].shape
    sizes = {}
    for dim, size in enumerate((batch, tokens)):
        node = fresh.call_function(torch.ops.aten.sym_size.int, (mapping[ids], dim))
        node.meta["val"] = size
        sizes[size.node.expr] = node
    for old in source:
        if old not in mapping:
            mapping[old] = _size_node(old, sizes)
    for old in module.graph.nodes:
        if old in mapping or _is_assertion(old):
            continue
        node = fresh.node_copy(old, lambda n: mapping[n])
        node.meta = dict(old.meta)
        mapping[old] = node
    output = fresh.output_node()
    logits = output.args[0]
    output.args = ((logits[0],),) if isinstance(logits, tuple | list) else ((logits,),)
    graph = Graph(fresh, parameters, ids.meta["val"].fake_mode)
    graph.eliminate_dead_code()
    graph.drop_unused_placeholders()
    return graph


def _named_tensors(twin: PreTrainedModel):  # type: ignore[no-untyped-def]
    yield from twin.named_parameters(remove_duplicate=False)
    yield from twin.named_buffers(remove_duplicate=False)


def _user_input(exported: dict[str, Any], source: list[torch.fx.Node], name: str) -> torch.fx.Node:
    for node, original in zip(source, exported["names"], strict=True):
        if isinstance(node.meta["val"], torch.Tensor) and original.strip("_") in (f"l_{name}", f"L_{name}"):
            return node
    raise CaptureError(
        f"the model's forward never reads {name}",
        hint="graphwright needs input_ids and position_ids to be used",
    )


def _size_node(old: torch.fx.Node, sizes: dict[Any, torch.fx.Node]) -> torch.fx.Node:
    size = old.meta["val"]
    if isinstance(size, torch.SymInt) and size.node.expr in sizes:
        return sizes[size.node.expr]
    raise CaptureError(f"the graph depends on a number that is neither batch nor tokens: {old.name} = {size}")


def _is_assertion(node: torch.fx.Node) -> bool:
    return node.op == "call_function" and "_assert_tensor_metadata" in str(node.target)
