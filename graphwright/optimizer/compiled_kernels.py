"""The Triton kernels of a program for a GPU that is not here: found on meta tensors, compiled ahead of time.

The rewritten graph is lowered for the target's device and its steps run on the meta device with the
workload's sizes. Wherever Triton has a kernel that takes the arguments, its Python side runs inside of
:func:`graphwright.kernels.triton.launch.recording`: it computes nothing and leaves the launches that the
target would make.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from graphwright.cost_model.target import Target
from graphwright.cost_model.workload import Workload
from graphwright.ir.errors import InputError
from graphwright.ir.graph import Graph, value
from graphwright.ir.ops import SEMANTIC_OPS
from graphwright.kernels.registry import REFERENCE, assuming_available, kernels
from graphwright.kernels.triton.ahead import Compiled, CompileError, compile_launches, triton_version
from graphwright.kernels.triton.devices import DeviceFacts, device_facts, planned_device, planning_for
from graphwright.kernels.triton.launch import Launch, recording
from graphwright.kernels.triton.variant import describe
from graphwright.optimizer.planner import Request
from graphwright.optimizer.progress import Progress
from graphwright.optimizer.report import Decision, Status
from graphwright.optimizer.validate import check_target_device
from graphwright.runtime.lowering import LoweredStep, LoweringOptions, lower
from graphwright.runtime.program import Program
from graphwright.runtime.storage import PREFILL_CHUNK

PROVIDER = "triton"
_META = torch.device("meta")


@dataclass(frozen=True)
class StepSize:
    """A step that the program will take.

    Attributes:
        name: ``decode``, ``verify`` or ``prefill``.
        tokens: of each row.
        tree: whether the tokens are a tree.
    """

    name: str
    tokens: int
    tree: bool = False


@dataclass
class Found:
    """One variant that a program launches.

    Attributes:
        launch: the first of its launches.
        uses: launches by op and step, ``("append_attention", "decode")``.
    """

    launch: Launch
    uses: Counter[tuple[str, str]] = field(default_factory=Counter)


@dataclass(frozen=True)
class CompiledKernels:
    """A program's kernels for a target, or why there are none.

    Attributes:
        target: the target's name.
        arch: its architecture.
        triton: the version that compiled.
        kernels: what was compiled.
        uses: of each, what it is for: ``append_attention x 16 (decode)``.
        note: why there are none; empty if there are.
    """

    target: str
    arch: str
    triton: str = ""
    kernels: tuple[Compiled, ...] = ()
    uses: tuple[str, ...] = ()
    note: str = ""

    def decisions(self) -> list[Decision]:
        """What has no kernel on the target, or one that does not compile."""
        wrong = [f"{made.label}: {made.error}" for made in self.kernels if made.error is not None]
        reasons = [*([self.note] if self.note else []), *wrong]
        return [Decision("compile kernels", "", Status.FALLBACK, r, None, None, "exact") for r in reasons]

    def to_report(self) -> dict[str, Any]:
        """As the report shows it."""
        rows = [
            {
                "label": made.label,
                "ops": uses,
                "registers": made.registers,
                "spill_bytes": made.spills,
                "shared_bytes": made.shared,
                "num_warps": made.num_warps,
                "binary_bytes": len(made.binary),
                "error": made.error or "",
            }
            for made, uses in zip(self.kernels, self.uses, strict=True)
        ]
        return {
            "target": self.target, "arch": self.arch, "triton": self.triton, "note": self.note,
            "kernels": rows,
        }  # fmt: skip


def compile_kernels(
    model: PreTrainedModel, graph: Graph, request: Request, progress: Progress
) -> CompiledKernels | None:
    """The kernels of a program that is planned for a GPU; None for CPUs.

    On that very GPU they come from Triton's cache mostly, and the report shows what runs in which form.
    """
    target = request.target
    if target.kind == "cpu":
        return None
    facts = None if check_target_device(model, target) else device_facts(model.device)
    with progress.step(f"compiling kernels for {target.name}"):
        return compile_for(graph, model.config, target, request.workload, facts)


def compile_for(
    graph: Graph, config: Any, target: Target, workload: Workload, facts: DeviceFacts | None = None
) -> CompiledKernels:
    """Compile what the program of a graph would launch on a target.

    Args:
        graph: the rewritten graph; stays as it is.
        config: the model's configuration.
        target: a GPU.
        workload: gives batch and context.
        facts: of the device, where it is at hand; else those that are known of the target.

    Returns:
        The kernels, or the reason why there are none: whatever is wrong here, the program runs without.
    """
    try:
        version = triton_version()
        meta, step = _lowered(graph)
        with _planned(target) if facts is None else planning_for(facts):
            found = find_launches(meta, step, config, workload)
        made = compile_launches([f.launch for f in found], target.arch)
    except CompileError as error:
        note = f"{error.what}: {error.hint}" if error.hint else error.what
        return CompiledKernels(target.name, target.arch, note=note)
    except Exception as error:  # an op that does not run on meta tensors must not cost the program
        note = f"the steps cannot be traced without the device: {str(error).splitlines()[0][:200]}"
        return CompiledKernels(target.name, target.arch, note=note)
    note = _without_kernels(step, target)
    kernels, uses = _merged(made, found)
    return CompiledKernels(target.name, target.arch, version, kernels, uses, note)


def _merged(made: Sequence[Compiled], found: Sequence[Found]) -> tuple[tuple[Compiled, ...], tuple[str, ...]]:
    """Each binary once, with all that it is for: launches may differ in what their kernel does not see."""
    by_key: dict[str, tuple[Compiled, Counter[tuple[str, str]]]] = {}
    for index, (kernel, launch) in enumerate(zip(made, found, strict=True)):
        _, uses = by_key.setdefault(kernel.key or f"failed {index}", (kernel, Counter()))
        uses.update(launch.uses)
    return tuple(kernel for kernel, _ in by_key.values()), tuple(_uses(uses) for _, uses in by_key.values())


def _without_kernels(step: LoweredStep, target: Target) -> str:
    """Which ops of a program have no kernel on the target, and why."""
    lines = [
        f"{use.op} x {use.sites} ({use.reason.split(f'{PROVIDER}: ')[-1]})"
        for use in step.kernels
        if use.provider == REFERENCE
    ]
    return f"on {target.name} these run their reference body: {'; '.join(lines)}" if lines else ""


def _uses(uses: Mapping[tuple[str, str], int]) -> str:
    by_op: dict[tuple[str, int], list[str]] = {}
    for (op, step), count in uses.items():
        by_op.setdefault((op, count), []).append(step)
    return "; ".join(f"{op} x {count} ({', '.join(steps)})" for (op, count), steps in by_op.items())


def step_sizes(graph: Graph) -> list[StepSize]:
    """The steps that a program of this graph takes: one token, the draft's, and a chunk of the prompt."""
    chunk = graph.annotations.get("prefill_chunk", PREFILL_CHUNK)
    sizes = [StepSize("decode", 1), StepSize("prefill", chunk)]
    chosen = graph.annotations.get("speculation")
    if chosen is not None:
        sizes.insert(1, StepSize("verify", int(chosen["tokens"]) + 1))
    return sizes


def find_launches(graph: Graph, step: LoweredStep, config: Any, workload: Workload) -> list[Found]:
    """The distinct launches of a program, in the order of its steps, packing last.

    Args:
        graph: on the meta device.
        step: the graph as it is lowered for the target.
    """
    found: dict[str, Found] = {}
    for size in step_sizes(graph):
        for op, launch in _launches(graph, step, config, workload, size):
            key = json.dumps(describe(launch), sort_keys=True)
            found.setdefault(key, Found(launch)).uses[op, size.name] += 1
    for launch in _packing(graph, step, config, workload):
        key = json.dumps(describe(launch), sort_keys=True)
        found.setdefault(key, Found(launch)).uses["pack pages", "commit"] += 1
    return list(found.values())


def _packing(graph: Graph, step: LoweredStep, config: Any, workload: Workload) -> list[Launch]:
    """What packs one page of each store that is packed."""
    from graphwright.kernels.triton.encode import encode_obstacle, encode_pages  # needs Triton

    stores = _program(graph, step, config).allocate(workload.batch, workload.capacity).stores
    pages = torch.empty(workload.batch, dtype=torch.int64, device=_META)
    with recording() as launches:
        for layout in step.packed:
            if encode_obstacle(str(layout.codec), layout.shape) is None:
                store = layout.store(stores)
                tensors = [store.packed, store.tail, store.first, *store.buffers]
                encode_pages(tensors, store.constants, str(layout.codec), layout.page, pages, pages)
    return launches


def _lowered(graph: Graph) -> tuple[Graph, LoweredStep]:
    """The graph on the meta device, and as it is lowered where the provider's device is."""
    meta = _on_meta(graph)
    with assuming_available(PROVIDER):
        return meta, lower(meta, torch.device("cuda"), LoweringOptions(compile=False))


def _on_meta(graph: Graph) -> Graph:
    """A copy that reads no weights and makes no tensors elsewhere."""
    graph = graph.copy()
    for name, tensor in graph.parameters.items():
        graph.parameters[name] = _meta(tensor)
    for node in graph.nodes:
        if node.op == "call_function":
            node.args, node.kwargs = tree_map_only(torch.device, lambda _: _META, (node.args, node.kwargs))
    return graph


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_META)


def _launches(
    graph: Graph, step: LoweredStep, config: Any, workload: Workload, size: StepSize
) -> list[tuple[str, Launch]]:
    """What one step launches, each with the op that it is for."""
    values = _inputs(graph, step, config, workload, size)
    with torch.no_grad(), _Recorder() as recorder:
        for index, (call, ins, outs) in enumerate(step.calls):
            if index == step.tail and size.name == "prefill":  # only each row's last token goes on
                assert step.tail_slot is not None
                values[step.tail_slot] = values[step.tail_slot][:, :1].contiguous()
            results = call(*[values[i] for i in ins])
            for out, result in zip(outs, results, strict=True):
                values[out] = result
    return recorder.found


def _planned(target: Target) -> Any:
    """Configurations are those of the target where it is known to them."""
    for name in (target.name, target.arch):
        try:
            return planning_for(planned_device(name))
        except InputError:
            continue
    return nullcontext()


def _inputs(graph: Graph, step: LoweredStep, config: Any, workload: Workload, size: StepSize) -> list[Any]:
    """The slots' content before a step: meta tensors of the workload's sizes."""
    batch, tokens = workload.batch, size.tokens
    stores = _program(graph, step, config).allocate(batch, workload.capacity).stores
    if not step.states:
        tokens = workload.capacity
    whole = torch.empty(batch, tokens, dtype=torch.int64, device=_META)
    rows = torch.empty(batch, dtype=torch.int64, device=_META)
    tree = whole if size.tree else whole[:, :0]
    named = {"input_ids": whole, "positions": whole, "lengths": rows, "counts": rows, "tree": tree}
    values = list(step.slots)
    for name, slot in step.inputs.items():
        values[slot] = named[name]
    for name, slot in step.states.items():
        values[slot] = stores[name]
    return values


def _program(graph: Graph, step: LoweredStep, config: Any) -> Program:
    logits = graph.output.args[0]
    first = logits[0] if isinstance(logits, tuple | list) else logits
    return Program(
        step, config=config, device=_META, dtype=value(first).dtype,
        vocab_size=int(value(first).shape[-1]), max_positions=None,
    )  # fmt: skip


class _Recorder(TorchDispatchMode):
    """Runs the Python side of Triton's kernels in the place of the ops that they take."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, Launch]] = []
        self._kernels = {k.op_name: k for k in kernels() if k.provider == PROVIDER}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.split("::")[1]
        is_semantic = func.namespace.startswith("graphwright") and name in SEMANTIC_OPS
        kernel = self._kernels.get(name) if is_semantic else None
        if kernel is None or kernel.supports(**_by_name(func, args, kwargs)) is not None:
            return func(*args, **kwargs)
        assert kernel.body is not None
        with recording() as launches:  # on meta tensors the op itself is its shape function
            result = kernel.body(*args, **kwargs)
        self.found += [(name, launch) for launch in launches]
        return result


def _by_name(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
    defaults = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
    return {**defaults, **given, **kwargs}
