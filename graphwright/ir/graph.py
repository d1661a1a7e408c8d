"""The graph that every pass reads and rewrites.

A :class:`Graph` is a ``torch.fx.Graph`` at ATen level with a few guarantees (see *Invariants* in
docs/architecture.md): it is functional except for ops whose schema says which argument they mutate,
every node carries a fake tensor in ``meta["val"]``, and every placeholder says what it is in
``meta["kind"]`` and ``meta["name"]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.node import Argument, Node, map_arg

from graphwright.ir.ops import NAMESPACE, SEMANTIC_OPS

Kind = Literal["input", "parameter", "state"]


class Graph:
    """A captured step of a decoder-only language model.

    Args:
        fx: the nodes; placeholders carry ``meta["kind"]`` and ``meta["name"]``.
        parameters: qualified name to tensor, for every placeholder of kind ``parameter``. The
            tensors are the user's own (never copied, never written).
        fake_mode: the mode that ``meta["val"]`` tensors belong to.

    Attributes:
        annotations: program-wide choices that are not nodes, such as the drafter; plain data.
        samples: where calibrated passes get their data from: given a graph with a cache, what each of
            its stores holds after the calibration text, ``[B, G, tokens, D]`` by name; None without text.
    """

    def __init__(
        self, fx: torch.fx.Graph, parameters: dict[str, torch.Tensor], fake_mode: FakeTensorMode
    ) -> None:
        self.fx = fx
        self.parameters = parameters
        self.fake_mode = fake_mode
        self.annotations: dict[str, Any] = {}
        self.samples: Callable[[Graph], Mapping[str, torch.Tensor]] | None = None

    # --- reading ---------------------------------------------------------------------------------

    @property
    def nodes(self) -> Iterable[Node]:
        """All nodes in execution order."""
        return self.fx.nodes

    @property
    def output(self) -> Node:
        """The output node."""
        return self.fx.output_node()

    def placeholders(self, kind: Kind | None = None) -> list[Node]:
        """Placeholders in order, all or of one kind."""
        found = [n for n in self.fx.nodes if n.op == "placeholder"]
        return [n for n in found if kind is None or n.meta["kind"] == kind]

    def placeholder(self, name: str) -> Node:
        """The placeholder with this ``meta["name"]``; KeyError if there is none."""
        for node in self.placeholders():
            if node.meta["name"] == name:
                return node
        raise KeyError(name)

    def calls(self, *names: str) -> list[Node]:
        """Calls of semantic ops (``"attention"``) or of other ops (``"aten.add.Tensor"``), in order."""
        wanted = set(names)
        return [n for n in self.fx.nodes if n.op == "call_function" and op_name(n) in wanted]

    def counts(self) -> dict[str, int]:
        """How many calls of each semantic op the graph holds."""
        found = dict.fromkeys(SEMANTIC_OPS, 0)
        for node in self.fx.nodes:
            name = op_name(node)
            if name in found:
                found[name] += 1
        return {name: count for name, count in found.items() if count}

    # --- writing ---------------------------------------------------------------------------------

    def emit(
        self,
        target: Callable[..., Any] | str,
        *args: Argument,
        before: Node | None = None,
        after: Node | None = None,
        name: str | None = None,
        **kwargs: Argument,
    ) -> Node:
        """Add a call and fill in its metadata from its arguments.

        Args:
            target: an ``OpOverload``, a Python operator, or the name of a semantic op.
            before, after: where to put it (default: at the end, before the output).
        """
        resolved = SEMANTIC_OPS[target].overload if isinstance(target, str) else target
        if after is not None:
            context = self.fx.inserting_after(after)
        else:
            context = self.fx.inserting_before(before if before is not None else self.output)
        with context:
            node = self.fx.call_function(resolved, args, dict(kwargs))
        if name:
            node.name = self.fx._graph_namespace.create_name(name, node)
        node.meta["val"] = self.infer(node)
        anchor = before if before is not None else after
        if anchor is not None and "nn_module_stack" in anchor.meta:
            node.meta["nn_module_stack"] = anchor.meta["nn_module_stack"]
        return node

    def infer(self, node: Node) -> Any:
        """The fake value of a call, from the fake values of its arguments."""
        target = node.target
        assert callable(target)
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with self.fake_mode, torch.no_grad():
            return target(*args, **kwargs)

    def add_placeholder(self, kind: Kind, name: str, value: torch.Tensor) -> Node:
        """Add a placeholder after the others; ``value`` is a fake tensor."""
        last = None
        for node in self.fx.nodes:
            if node.op != "placeholder":
                break
            last = node
        context = self.fx.inserting_after(last) if last is not None else self.fx.inserting_before(None)
        with context:
            node = self.fx.placeholder(sanitize(name))
        node.meta.update(kind=kind, name=name, val=value)
        return node

    def add_parameter(self, name: str, tensor: torch.Tensor) -> Node:
        """Add a tensor that a pass made, as a parameter."""
        with self.fake_mode:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        self.parameters[name] = tensor
        return self.add_placeholder("parameter", name, fake)

    @property
    def has_weights(self) -> bool:
        """Whether there are tensors to compute with; a graph on the meta device is only planned."""
        return any(t.device.type != "meta" for t in self.parameters.values())

    def replace(self, old: Node, new: Node) -> None:
        """Send every use of ``old`` to ``new``."""
        old.replace_all_uses_with(new)

    def sampled(self) -> Callable[[Node], torch.Tensor | None]:
        """What stores of this graph as it is now hold after the calibration text, when first asked for.

        A pass asks in ``find`` and reads in ``apply``, when other sites may be rewritten already.
        """
        found: dict[str, torch.Tensor] = {}
        source = self.samples
        untouched = self.copy() if source is not None else None
        names = {node: node.meta["name"] for node in self.placeholders("state")}  # passes rename stores

        def content(store: Node) -> torch.Tensor | None:
            if source is None or untouched is None:
                return None
            if not found:
                found.update(source(untouched))
            return found.get(names[store])

        return content

    def eliminate_dead_code(self) -> None:
        """Drop calls that nothing reads; calls that mutate an argument stay."""
        self.fx.eliminate_dead_code(is_impure_node=is_impure)

    def copy(self) -> Graph:
        """An independent copy (nodes and metadata; parameters are shared)."""
        fresh = torch.fx.Graph()
        mapping: dict[Node, Node] = {}
        outputs = fresh.graph_copy(self.fx, mapping)
        fresh.output(outputs)
        for old, new in mapping.items():
            new.meta = dict(old.meta)
        fresh.output_node().meta = dict(self.output.meta)
        duplicate = Graph(fresh, dict(self.parameters), self.fake_mode)
        duplicate.annotations = dict(self.annotations)
        duplicate.samples = self.samples
        return duplicate

    def restore(self, snapshot: Graph) -> None:
        """Become what ``snapshot`` (a :meth:`copy`) was."""
        self.fx, self.parameters = snapshot.fx, snapshot.parameters
        self.annotations = snapshot.annotations

    def drop_unused_placeholders(self) -> None:
        """Remove parameters and states that no call reads; inputs stay, they are the signature."""
        for node in self.placeholders():
            if node.meta["kind"] != "input" and not node.users:
                self.fx.erase_node(node)
                self.parameters.pop(node.meta["name"], None)


# --- helpers -----------------------------------------------------------------------------------------


def op_name(node: Node) -> str | None:
    """``"attention"`` for semantic ops, ``"aten.add.Tensor"`` for others, None for non-calls."""
    if node.op != "call_function":
        return None
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        if target.namespace == NAMESPACE:
            return target._schema.name.split("::")[1]
        return str(target)
    return getattr(target, "__name__", str(target))


def is_impure(node: Node) -> bool:
    """Whether a node must stay although nothing reads it."""
    if node.op in ("placeholder", "output"):
        return True
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def argument(node: Node, name: str) -> Any:
    """The argument of an op call by its schema name, with the schema's default if it was left out."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    for position, spec in enumerate(target._schema.arguments):
        if spec.name == name:
            if position < len(node.args):
                return node.args[position]
            if name in node.kwargs:
                return node.kwargs[name]
            return spec.default_value
    raise KeyError(f"{target} has no argument {name!r}")


def value(node: Node) -> torch.Tensor:
    """The fake tensor of a node that produces one tensor."""
    fake = node.meta["val"]
    assert isinstance(fake, torch.Tensor), f"{node} does not produce one tensor"
    return fake


def is_tensor(node: Node) -> bool:
    """Whether a node produces one tensor."""
    return isinstance(node.meta.get("val"), FakeTensor | torch.Tensor)


def sanitize(name: str) -> str:
    """A qualified name as a Python identifier."""
    return "".join(c if c.isalnum() else "_" for c in name)


def module_path(node: Node) -> str:
    """The qualified name of the module that a node came from; ``""`` for the root."""
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for entry in stack.values():
        path = entry[0]
    return clean_module_path(path)


def layer_number(path: str) -> int | None:
    """The decoder layer that a module path, or a name made of one, points into; None outside of all."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def clean_module_path(path: str) -> str:
    """dynamo's spelling of a module (``L['twin'].model.layers[0]``) as ``model.layers.0``."""
    path = path.replace("L['self'].", "").replace("L['twin'].", "")
    if path.startswith("L["):
        path = path.split("].", 1)[1] if "]." in path else ""
    path = path.replace("._modules['", ".").replace("']", "").replace("[", ".").replace("]", "")
    return ".".join(part.strip("'\"") for part in path.split(".") if part and part != "_modules")


def ancestors(roots: Sequence[Node]) -> set[Node]:
    """Every node that ``roots`` depend on, themselves included."""
    seen: set[Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen


def is_appended(state: Node) -> bool:
    """Whether steps write to a state slot by slot: a plain store, the tail of a packed one, token ids."""
    return state.meta.get("store", {}).get("role", "tail") in ("tail", "tokens")


def shared_prefix(states: Iterable[Node]) -> int | None:
    """Tokens that all rows of a batch are promised to share; 0: whatever they do; None: nothing is shared."""
    parts = [state.meta.get("store", {}) for state in states]
    return next((part["tokens"] for part in parts if part.get("role") == "prefix"), None)


def stores_read(roots: Sequence[Node]) -> list[Node]:
    """The states whose content ``roots`` depend on (and not just their number of slots), each once."""
    seen: dict[Node, None] = {}
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in seen and op_name(node) != "aten.sym_size.int":
            seen[node] = None
            stack.extend(node.all_input_nodes)
    return [n for n in seen if n.op == "placeholder" and n.meta["kind"] == "state"]


def topological(nodes: Iterable[Node], graph: Graph) -> Iterator[Node]:
    """``nodes`` in execution order."""
    wanted = set(nodes)
    return (n for n in graph.nodes if n in wanted)
