"""What the ``torch.compile`` backend remembers of each graph, and the reports made from it."""

from __future__ import annotations

import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx.node import Node

from graphwright.optimizer import machine
from graphwright.optimizer.report import Decision, Report, Status

BACKEND_PASS = "backend{name=graphwright}"


@dataclass
class GraphRecord:
    """One compiled graph: plain data and weak references, so that nothing is kept alive.

    Attributes:
        owner: what ``torch.compile`` was given: a module, a function, or None if it cannot be told.
        tensors: the parameters and other tensors of the graph's first compilation.
        site: what the graph is called in the report.
    """

    owner: weakref.ref[Any] | None
    tensors: list[weakref.ref[Any]]
    device: str
    signature: str
    decisions: list[Decision] = field(default_factory=list)
    ops: dict[str, int] = field(default_factory=dict)
    near_misses: list[str] = field(default_factory=list)
    kernels: list[dict[str, str]] = field(default_factory=list)
    code_before: str = ""
    code_after: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    def decide(
        self, pass_name: str, status: Status, reason: str, *, site: str = "", fidelity: str = "exact"
    ) -> None:
        """Add a decision about this graph."""
        self.decisions.append(Decision(pass_name, site, status, reason, None, None, fidelity))

    def alive(self) -> bool:
        """Whether someone could still ask for this graph."""
        return self.owner is None or self.owner() is not None

    def belongs_to(self, wanted: Any) -> bool:
        """Whether the graph is part of a module or function; without an owner, shared parameters decide."""
        if self.owner is not None:
            return self.owner() is wanted
        if not isinstance(wanted, torch.nn.Module):
            return False
        own = {id(t) for t in (*wanted.parameters(), *wanted.buffers())}
        return any(id(tensor) in own for ref in self.tensors if (tensor := ref()) is not None)


_RECORDS: list[GraphRecord] = []
_LOCK = threading.Lock()


def remember(record: GraphRecord) -> None:
    """Keep a record until what it was compiled for is gone."""
    with _LOCK:
        _RECORDS[:] = [r for r in _RECORDS if r.alive()]
        _RECORDS.append(record)


def forget() -> None:
    """Drop all records."""
    with _LOCK:
        _RECORDS.clear()


def recall(owner: Any) -> list[GraphRecord]:
    """The records of a module or function, in the order of compilation."""
    with _LOCK:
        return [r for r in _RECORDS if r.belongs_to(owner)]


def open_record(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> GraphRecord:
    """A record for the graph that dynamo hands over now."""
    tensors = [t for t in example_inputs if isinstance(t, torch.Tensor)]
    owner = _current_owner()
    device = ", ".join(sorted({str(t.device) for t in tensors})) or "cpu"
    return GraphRecord(
        owner=None if owner is None else weakref.ref(owner),
        tensors=[weakref.ref(t) for t in tensors if isinstance(t, torch.nn.Parameter)],
        device=device,
        signature=_signature(gm),
    )


def _signature(gm: torch.fx.GraphModule) -> str:
    """The inputs that are not parameters, in a few words: tells a prefill from a decode step."""
    shown = []
    for node in gm.graph.find_nodes(op="placeholder"):
        fake = node.meta.get("example_value")
        if isinstance(fake, torch.Tensor) and not isinstance(fake, torch.nn.Parameter):
            sizes = ", ".join(map(str, fake.shape))
            shown.append(f"{str(fake.dtype).removeprefix('torch.')}[{sizes}]")
    return " ".join(shown[:1]) or "no tensor inputs"


# --- who is being compiled ------------------------------------------------------------------------


def owner_of(compiled: Any) -> Any:
    """The module or function that ``torch.compile`` was given, from what it returned or from itself."""
    seen: set[int] = set()
    current = compiled
    while id(current) not in seen:
        seen.add(id(current))
        current = _inner(current)
    return current


def _inner(current: Any) -> Any:
    if isinstance(current, torch._dynamo.OptimizedModule):
        return current._orig_mod
    if isinstance(current, torch.nn.Module):
        return current
    original = getattr(current, "_torchdynamo_orig_callable", None)
    if original is not None:
        return original
    bound = getattr(current, "__self__", None)
    if isinstance(bound, torch.nn.Module):
        return bound
    # dynamo puts a function of its own around modules of torch.nn.
    wrapped = getattr(current, "__wrapped__", None)
    return wrapped if isinstance(wrapped, torch.nn.Module) else current


def _current_owner() -> Any:
    """Whose call made dynamo compile: the innermost compiled function on the stack, unwrapped."""
    for function in _compiled_functions():
        owner = owner_of(function)
        try:
            weakref.ref(owner)
        except TypeError:
            return None
        return owner
    return None


def _compiled_functions() -> Iterator[Callable[..., Any]]:
    frame = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "compile_wrapper" and code.co_filename.endswith("eval_frame.py"):
            function = frame.f_locals.get("fn")
            if callable(function):
                yield function
        frame = frame.f_back  # type: ignore[assignment]


# --- the report -----------------------------------------------------------------------------------


def merged_report(owner: Any, records: list[GraphRecord]) -> Report:
    """One report for all graphs of a module or function; sites say which graph."""
    report = Report(
        model=_describe(owner),
        target=records[0].device,
        workload={},
        versions=machine.versions(),
    )
    ops: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    for number, record in enumerate(records):
        graph = f"graph {number}"
        for d in record.decisions:
            site = f"{graph}, {d.site}" if d.site else f"{graph} ({record.signature})"
            report.decisions.append(
                Decision(d.pass_name, site, d.status, d.reason, d.predicted, d.measured, d.fidelity)
            )
        report.near_misses += [f"{graph}: {text}" for text in record.near_misses]
        report.kernels += [{**kernel, "graph": graph} for kernel in record.kernels]
        ops.update(record.ops)
        seconds.update(record.seconds)
    report.ops = dict(ops)
    report.measured = {"seconds": dict(seconds)}
    report.code_before = _joined(records, "code_before")
    report.code_after = _joined(records, "code_after")
    return report


def _joined(records: Iterable[GraphRecord], name: str) -> str:
    parts = [
        f"# graph {i} ({r.signature})\n{getattr(r, name)}" for i, r in enumerate(records) if getattr(r, name)
    ]
    return "\n\n".join(parts)


def _describe(owner: Any) -> str:
    if not isinstance(owner, torch.nn.Module):
        return getattr(owner, "__qualname__", type(owner).__name__)
    parameters = list(owner.parameters())
    count = sum(p.numel() for p in parameters)
    dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})) or "no parameters"
    kind = getattr(getattr(owner, "config", None), "model_type", None)
    name = type(owner).__name__ + (f" ({kind})" if kind else "")
    size = f"{count / 1e6:,.1f} M" if count >= 1e6 else f"{count:,}"
    return f"{name}, {size} parameters, {dtypes}"


def near_miss_of(nodes: list[Node]) -> list[str]:
    """One line for attention over a static cache, which stays the library's."""
    if not nodes:
        return []
    return [
        f"attention at {nodes[0].name} and {len(nodes) - 1} more: the mask is a tensor, so that it is causal "
        "is not in the graph; the library's attention stays"
        if len(nodes) > 1
        else f"attention at {nodes[0].name}: the mask is a tensor; the library's attention stays"
    ]
