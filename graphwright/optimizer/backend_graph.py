"""Between dynamo's graph modules and :class:`~graphwright.ir.graph.Graph`, both ways.

On the way in, a graph that writes to its inputs becomes functional, and each written input remembers
its new value. On the way out, the new values are copied into the inputs at the end, which Inductor
turns back into writes in place. What an output shares memory with is part of what a graph computes:
it is compared with dynamo's own account, and kept.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch._functorch.aot_autograd import aot_export_module
from torch.fx.experimental.symbolic_shapes import guard_scalar
from torch.fx.node import Node
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from graphwright.ir.errors import UnsupportedModelError
from graphwright.ir.graph import Graph, is_impure, is_tensor, op_name, value
from graphwright.ir.layout import same_layout, same_type
from graphwright.optimizer.export import export_aten, needs_whole_export

aten = torch.ops.aten
# Arguments of export's ops that decide nothing; asserted by dynamo's guards already.
_ASSERTIONS = "_assert_tensor_metadata"
# These change what an input is, not what it holds.
_METADATA_WRITES = frozenset(
    f"{name}_"
    for name in (
        *("t", "transpose", "swapaxes", "swapdims", "squeeze", "unsqueeze", "resize", "resize_as", "set"),
        *("as_strided", "detach", "requires_grad", "rename", "share_memory"),
    )
)
_ROOT_MODULES = frozenset({"torch", "operator", "_operator", "math", "builtins", "einops"})
# Nothing depends on these: no values, no gradients where none are needed.
_IDLE = frozenset({"_log_api_usage_once", "_set_grad_enabled"})


class NotExpressible(UnsupportedModelError):
    """A graph that Inductor can run and our route cannot; it falls back with this reason."""


@dataclass
class Imported:
    """A dynamo graph as ours.

    Attributes:
        graph: its outputs are the graph's outputs, then the new values of the written inputs.
        source: dynamo's graph.
        written: names of the inputs that are written, in the order of the graph's last outputs.
        constants: tensors that stand in the graph itself, by placeholder name.
    """

    graph: Graph
    source: torch.fx.GraphModule
    written: list[str]
    constants: dict[str, torch.Tensor]


def refusal(gm: torch.fx.GraphModule) -> str | None:
    """Why a dynamo graph cannot take our route; None if nothing is known against it."""
    for node in gm.graph.nodes:
        reason = None
        if node.op in ("get_attr", "call_module"):
            reason = f"it holds {node.target}, a submodule or a constant of its own"
        elif node.op == "call_method" and node.target in _METADATA_WRITES:
            reason = f"{node.target} changes a tensor's shape in place"
        elif node.op == "call_function":
            reason = _call_refusal(node)
        if reason:
            return reason
    return None


def _call_refusal(node: Node) -> str | None:
    target: Any = node.target
    name = getattr(target, "__name__", str(target))
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"{name} is a higher-order operator"
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return (
            None if node.users or _is_mutable(target) else f"nothing reads {name}, which may have an effect"
        )
    if "autocast" in name:
        return "it changes autocast inside"
    root = (getattr(target, "__module__", None) or "torch").split(".")[0]
    if root not in _ROOT_MODULES:
        return f"{target.__module__}.{name} is not an op of torch"
    if not node.users and name not in _IDLE and node.is_impure() and not _writes(node):
        return f"{name} has an effect and no result"
    return None


def _inputs_refusal(example_inputs: list[Any]) -> str | None:
    tensors = [t for t in example_inputs if isinstance(t, torch.Tensor)]
    for kind in {"cpu", *(t.device.type for t in tensors)}:
        if torch.is_autocast_enabled(kind):
            return "autocast is on around it"
    for t in tensors:
        if t.layout is not torch.strided or is_traceable_wrapper_subclass(t):
            return f"an input is a {type(t).__name__} of layout {t.layout}"
    return None


def _is_mutable(target: Any) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    return any(getattr(target, overload)._schema.is_mutable for overload in target.overloads())


# --- in -------------------------------------------------------------------------------------------


def import_graph(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Imported:
    """dynamo's graph as functional ATen with composite ops kept.

    Raises:
        NotExpressible: the graph has something that our route cannot carry.
    """
    reason = refusal(gm) or _inputs_refusal(example_inputs)
    if reason is not None:
        raise NotExpressible(reason)
    module, written = _exported(_with_constant_settings(gm))
    names = gm.meta.get("dynamo_flat_name_to_original_fqn", {})
    graph = torch.fx.Graph()
    mapping: dict[Node, Node] = {}
    parameters: dict[str, torch.Tensor] = {}
    constants: dict[str, torch.Tensor] = {}
    originals = gm.graph.find_nodes(op="placeholder")
    for old, original, example in zip(
        module.graph.find_nodes(op="placeholder"), originals, example_inputs, strict=True
    ):
        new = mapping[old] = graph.placeholder(original.name)
        new.meta.update(val=original.meta["example_value"], kind="input", name=original.name)
        if isinstance(example, torch.nn.Parameter) and original.name not in written:
            new.meta["kind"] = "parameter"
            name = _parameter_name(original, names)
            new.meta["name"] = original.name if name in parameters else name
            parameters[new.meta["name"]] = example
    for old in module.graph.find_nodes(op="get_attr"):
        new = mapping[old] = graph.placeholder(str(old.target))
        constants[str(old.target)] = tensor = getattr(module, str(old.target))
        new.meta.update(val=_fake(tensor, originals), kind="input", name=str(old.target))
    for old in module.graph.nodes:
        if old in mapping or _ASSERTIONS in str(old.target):
            continue
        mapping[old] = graph.node_copy(old, mapping.__getitem__)
        mapping[old].meta = dict(old.meta)
    # The new values of written inputs come first in an export, last in ours.
    results = list(graph.output_node().args[0])  # type: ignore[arg-type]
    graph.output_node().args = ((*results[len(written) :], *results[: len(written)]),)
    if len(results) - len(written) != len(_results(gm.graph)):
        raise NotExpressible("the number of its outputs changes when it is exported")
    ours = Graph(graph, parameters, _fake_mode(originals))
    ours.eliminate_dead_code()
    return Imported(ours, gm, written, constants)


def _with_constant_settings(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A graph in which the numbers that modules hold (an epsilon, a scale) are constants, guarded as such.

    With ``dynamic=True`` dynamo makes inputs of them, as it does with numbers that callers pass; those
    change from call to call and stay Inductor's business.
    """
    constants: dict[Node, Any] = {}
    for node in gm.graph.find_nodes(op="call_method", target="item"):
        source = node.args[0]
        if not (isinstance(source, Node) and source.op == "placeholder"):
            continue
        if not _is_module_setting(source):
            raise NotExpressible(f"the number {source.name} is an input of the graph")
        number = node.meta["example_value"]
        constants[node] = guard_scalar(number) if isinstance(number, torch.SymFloat) else number
    if not constants:
        return gm
    graph = torch.fx.Graph()
    mapping: dict[Node, Any] = dict(constants)
    for node in gm.graph.nodes:
        if node not in constants:
            mapping[node] = graph.node_copy(node, mapping.__getitem__)
    return torch.fx.GraphModule(gm, graph)


def _is_module_setting(placeholder: Node) -> bool:
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    origin = getattr(source, "guard_source", None)
    origin = origin() if callable(origin) else origin  # a method before torch 2.12
    return "NN_MODULE" in getattr(origin, "name", "")


def _exported(gm: torch.fx.GraphModule) -> tuple[torch.fx.GraphModule, list[str]]:
    """Functional ATen, and the names of the written inputs in the order of the leading outputs."""
    if not any(_writes(node) for node in gm.graph.nodes):
        # Call by call, which is quick; what a call alone does not show (a constant) is found below.
        with contextlib.suppress(RuntimeError, ValueError):
            return export_aten(gm), []
    originals = gm.graph.find_nodes(op="placeholder")
    with torch.no_grad():
        module, signature = aot_export_module(
            gm, [n.meta["example_value"] for n in originals], trace_joint=False, pre_dispatch=True
        )
    arguments = zip(module.graph.find_nodes(op="placeholder"), originals, strict=True)
    by_name = {argument.name: original for argument, original in arguments}
    targets = {**signature.user_inputs_to_mutate, **signature.buffers_to_mutate}
    results = _results(module.graph)
    leading = results[: len(results) - len(_results(gm.graph))]
    written = [by_name[targets[r.name]] for r in leading if r.name in targets]
    if len(set(written)) != len(leading):
        raise NotExpressible("two written inputs get the same value")
    for a, b in itertools.product(written, originals):
        if a is not b and _share(a.meta["example_value"], b.meta["example_value"]):
            raise NotExpressible(f"it writes to {a.name}, which shares its memory with {b.name}")
    return module, [o.name for o in written]


def _writes(node: Node) -> bool:
    """Whether a call of dynamo's graph may write in place, to an input or to a temporary."""
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        return _is_mutable(node.target)
    # These write to their running statistics without saying so in their name.
    return needs_whole_export(node) or getattr(node.target, "__name__", "") in ("batch_norm", "instance_norm")


def _parameter_name(original: Node, names: dict[str, str]) -> str:
    """``model.layers.0.mlp.up_proj.weight`` for ``l_self_modules_model_modules_layers_modules_0_...``."""
    name = original.name.removeprefix("l_self_").removesuffix("_")
    for spelled in (original.name, name):
        if spelled in names:
            return names[spelled]
    return name.replace("modules_", "").replace("parameters_", "")


def _fake_mode(originals: list[Node]) -> Any:
    for node in originals:
        if isinstance(node.meta["example_value"], torch.Tensor):
            return node.meta["example_value"].fake_mode
    raise NotExpressible("no input is a tensor")


def _fake(tensor: torch.Tensor, originals: list[Node]) -> torch.Tensor:
    return _fake_mode(originals).from_tensor(tensor, static_shapes=True)


def _results(graph: torch.fx.Graph) -> list[Any]:
    results = graph.output_node().args[0]
    return list(results) if isinstance(results, tuple | list) else [results]


# --- out ------------------------------------------------------------------------------------------


def export_graph(imported: Imported, module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The rewritten graph with the signature of dynamo's graph, ready for Inductor.

    Args:
        imported: what ``module`` was made from.
        module: the rewritten graph; placeholders carry the names of the imported ones.
    """
    source = imported.source
    graph = torch.fx.Graph()
    root = torch.nn.Module()
    inputs: dict[str, Node] = {}
    for original in source.graph.find_nodes(op="placeholder"):
        node = inputs[original.name] = graph.placeholder(original.name, type_expr=original.type)
        node.meta = dict(original.meta)
        if hasattr(original, "_dynamo_source"):
            node._dynamo_source = original._dynamo_source  # type: ignore[attr-defined]
    mapping: dict[Node, Node] = {}
    for old in module.graph.nodes:
        if old.op == "placeholder" and old.target in imported.constants:
            root.register_buffer(old.target, imported.constants[old.target])
            mapping[old] = graph.get_attr(old.target)
        elif old.op == "placeholder":
            mapping[old] = inputs[old.target]
        elif old.op == "call_function":
            mapping[old] = graph.node_copy(old, mapping.__getitem__)
            kept = ("nn_module_stack", "stack_trace")
            mapping[old].meta = {key: old.meta[key] for key in kept if key in old.meta}
    results = [mapping[r] if isinstance(r, Node) else r for r in _results(module.graph)]
    count = len(results) - len(imported.written)
    for name, fresh in zip(imported.written, results[count:], strict=True):
        graph.call_function(aten.copy_.default, (inputs[name], fresh))
    graph.output(tuple(results[:count]))
    rebuilt = torch.fx.GraphModule(root, graph)
    rebuilt.meta = dict(source.meta)
    graph.lint()
    return rebuilt


# --- what shares memory with what -----------------------------------------------------------------


def keep_aliases(imported: Imported) -> None:
    """Make the outputs share memory exactly where they do in eager execution.

    Raises:
        NotExpressible: an output is a view of something that the rewritten graph computes anew.
    """
    graph, originals = imported.graph, imported.source.graph.find_nodes(op="placeholder")
    inputs = {n.target: n for n in graph.placeholders()}
    eager = _results(imported.source.graph)
    results = _results(graph.fx)
    seen: list[tuple[Node, Node]] = []  # (eager, ours) of the outputs before
    for i, original in enumerate(eager):
        if not (isinstance(original, Node) and isinstance(original.meta.get("example_value"), torch.Tensor)):
            continue
        base = _base(results[i])
        wanted = [o for o in originals if _share(o.meta["example_value"], original.meta["example_value"])]
        has = base.op == "placeholder" and base.target not in imported.constants
        if has and not wanted:
            results[i] = _cloned(graph, results[i])
        elif wanted and wanted[0].name in imported.written:
            same = same_layout(wanted[0].meta["example_value"], original.meta["example_value"])
            if not same:
                raise NotExpressible(f"the output {original.name} is a view of the written {wanted[0].name}")
            results[i] = inputs[wanted[0].name]
        elif wanted and base is not inputs.get(wanted[0].name):
            raise NotExpressible(f"the output {original.name} would no longer be a view of {wanted[0].name}")
        for other, ours in seen:
            shared = _share(other.meta["example_value"], original.meta["example_value"])
            if shared and _base(ours) is not _base(results[i]):
                raise NotExpressible(
                    f"the outputs {other.name} and {original.name} would no longer share memory"
                )
            if not shared and _base(ours) is _base(results[i]):
                results[i] = _cloned(graph, results[i])
        seen.append((original, results[i]))
    graph.output.args = (tuple(results),)


def _cloned(graph: Graph, node: Node) -> Node:
    return graph.emit(aten.clone.default, node)


def _share(a: Any, b: Any) -> bool:
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return False
    try:
        return StorageWeakRef(a.untyped_storage()) == StorageWeakRef(b.untyped_storage())
    except (NotImplementedError, RuntimeError):  # sparse and other tensors without one storage
        return a is b


def _base(node: Node) -> Node:
    """What a node is a view of, itself if of nothing."""
    return next(n for n in _chain(node) if _viewed(n) is None)


def _chain(node: Node) -> Iterator[Node]:
    current: Node | None = node
    while current is not None:
        yield current
        current = _viewed(current)


def _viewed(node: Node) -> Node | None:
    """The argument that a call's result may be a view of."""
    target = node.target
    source = node.args[0] if node.args else None
    if not isinstance(source, Node):
        return None
    if target is operator.getitem:  # of a call with several results
        return _viewed(source)
    if not isinstance(target, torch._ops.OpOverload) or is_impure(node):
        return None
    if op_name(node) == "aten.dropout.default":
        return None if node.args[2] else source
    aliases = target._schema.arguments[0].alias_info is not None
    if aliases and is_tensor(node) and is_tensor(source) and not same_type(value(node), value(source)):
        # A conversion that changes the dtype copies; a view keeps it.
        return source if value(node).dtype == value(source).dtype else None
    return source if aliases else None
