"""Seconds from costs: the larger of compute and memory time, op by op, plus launches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from graphwright.cost_model.cost import Cost, Number, Values
from graphwright.cost_model.graph_cost import GraphCost
from graphwright.cost_model.target import Target, seconds_per_byte

# The measured figure that says how close to its peaks a group of ops comes.
_FIGURE = {
    "linear_group": "linear", "gated_mlp": "linear", "mlp": "linear", "lm_head": "linear",
    "routed_linear": "linear", "cache_attention": "attention", "append_attention": "attention",
    "packed_attention": "attention", "prefix_attention": "attention",
    "prefill_attention": "attention",
}  # fmt: skip
# Prefill steps that are priced one by one; more are priced at this many evenly spaced contexts.
_SAMPLES = 64


@dataclass(frozen=True)
class Prediction:
    """How long something takes on a target, and why.

    Args:
        seconds: the sum over groups of ops of the larger of compute and memory time, plus launches.
        compute_seconds, memory_seconds, launch_seconds: each of them summed on its own.
        flops, bytes_read, bytes_written, launches: what was priced; bytes are of weights and cache.
        by_op: seconds by group of ops, launches included.
    """

    seconds: float
    compute_seconds: float
    memory_seconds: float
    launch_seconds: float
    flops: float = 0.0
    bytes_read: float = 0.0
    bytes_written: float = 0.0
    launches: float = 0.0
    by_op: Mapping[str, float] = field(default_factory=dict)

    @property
    def bound(self) -> str:
        """What takes the most time: ``memory``, ``compute`` or ``launches``."""
        parts = {
            "memory": self.memory_seconds,
            "compute": self.compute_seconds,
            "launches": self.launch_seconds,
        }
        return max(parts, key=lambda name: parts[name])

    def __add__(self, other: Prediction) -> Prediction:
        names = dict.fromkeys((*self.by_op, *other.by_op))
        by_op = {name: self.by_op.get(name, 0.0) + other.by_op.get(name, 0.0) for name in names}
        numbers = {name: getattr(self, name) + getattr(other, name) for name in _NUMBERS}
        return Prediction(**numbers, by_op=by_op)

    def __mul__(self, factor: float) -> Prediction:
        scaled = {name: seconds * factor for name, seconds in self.by_op.items()}
        numbers = {name: getattr(self, name) * factor for name in _NUMBERS}
        return Prediction(**numbers, by_op=scaled)

    __rmul__ = __mul__


_NUMBERS = (
    "seconds", "compute_seconds", "memory_seconds", "launch_seconds",
    "flops", "bytes_read", "bytes_written", "launches",
)  # fmt: skip


def predict(
    cost: Cost | GraphCost,
    target: Target,
    *,
    batch: Number = 1,
    context: Number = 0,
    tokens: Number = 1,
    phase: str = "verify",
    step_bytes: float | None = None,
    op: str = "op",
) -> Prediction:
    """Time of one step.

    Args:
        cost: of a graph, priced group by group, or of one op.
        target: the machine.
        batch: sequences in the step.
        context: tokens per sequence in the cache before the step.
        tokens: new tokens per sequence.
        phase: for graphs, as in :meth:`GraphCost.phase`; ``prefill`` takes logits of the last token only.
        step_bytes: what the whole step reads, which decides how much of it caches hold from step to step
            (:meth:`Target.read_rate`). By default a graph is a whole step, and a cost is a part of one
            that is too large for caches.
        op: for a cost, the op that it is of (``cache_attention``), to use what was measured of its kernel.
    """
    if isinstance(cost, GraphCost):
        return _predict_groups(cost.phase(phase), target, batch, context, tokens, step_bytes)
    values = cost.at(batch=batch, context=context, tokens=tokens)
    return _predict_one(op, values, _Step(target, step_bytes, main_dtype([values])))


def predict_prefill(
    cost: GraphCost, target: Target, *, batch: int, prompt: int, chunk: int, context: int = 0
) -> Prediction:
    """Time of a prompt that runs in steps of at most ``chunk`` tokens; logits for the last token only.

    Args:
        cost: the graph's cost.
        target: the machine.
        batch, prompt: sequences, and tokens of each.
        chunk: the most tokens per sequence in one step.
        context: tokens that the cache holds already.
    """
    # Only the last step computes logits.
    groups = cost.phase("prefill")
    body = {name: group for name, group in groups.items() if name != "lm_head"}
    head = {name: group for name, group in groups.items() if name == "lm_head"}
    full, rest = divmod(prompt, chunk)
    samples = min(full, _SAMPLES)
    total = Prediction(0.0, 0.0, 0.0, 0.0)
    for index in range(samples):
        start = (index + 0.5) * full / samples - 0.5  # the mean of the steps that this one stands for
        step = _predict_groups(body, target, batch, context + start * chunk, chunk)
        total = total + step * (full / samples)
    if rest:
        total = total + _predict_groups(body, target, batch, context + full * chunk, rest)
    return total + _predict_groups(head, target, batch, context, 1)


def _predict_groups(
    groups: Mapping[str, Cost],
    target: Target,
    batch: Number,
    context: Number,
    tokens: Number,
    step_bytes: float | None = None,
) -> Prediction:
    numbers = {name: cost.at(batch=batch, context=context, tokens=tokens) for name, cost in groups.items()}
    if step_bytes is None:
        step_bytes = sum(values.bytes_read for values in numbers.values())
    step = _Step(target, step_bytes, main_dtype(numbers.values()))
    total = Prediction(0.0, 0.0, 0.0, 0.0)
    for name, values in numbers.items():
        total = total + _predict_one(name, values, step)
    return total


@dataclass(frozen=True)
class _Step:
    """The step that a group of ops is a part of: where it runs, what all of it reads, its main dtype."""

    target: Target
    bytes: float | None
    dtype: str

    @property
    def read_rate(self) -> float:
        return self.target.bandwidth if self.bytes is None else self.target.read_rate(self.bytes)

    @property
    def cache_speedup(self) -> float:
        return 1.0 if self.bytes is None else self.target.cache_speedup(self.bytes)


def main_dtype(parts: Iterable[Values]) -> str:
    """The dtype of most of the arithmetic: that of the matrix products."""
    flops: dict[str, float] = {}
    for values in parts:
        for dtype, count in values.flops.items():
            flops[dtype] = flops.get(dtype, 0.0) + count
    return max(flops, key=lambda dtype: flops[dtype], default="float32")


def _predict_one(name: str, values: Values, step: _Step) -> Prediction:
    target = step.target
    kernel = f"{_FIGURE.get(name, name)}.{main_dtype([values])}"
    moved = values.bytes_read + values.bytes_written
    if kernel in target.curves and moved:
        memory, compute, launch = _on_curve(kernel, values, moved, step)
        seconds = memory + compute + launch
    else:
        compute, memory, launch = _below_peaks(name, values, step)
        seconds = max(compute, memory) + launch
    return Prediction(
        seconds, compute, memory, launch, values.total_flops, values.bytes_read, values.bytes_written,
        values.launches, {name: seconds},
    )  # fmt: skip


def _on_curve(kernel: str, values: Values, moved: float, step: _Step) -> tuple[float, float, float]:
    """Memory, compute and launch seconds of a measured kernel; compute is what it adds to reading."""
    curve = step.target.curves[kernel]
    reading = curve[0][1]
    arithmetic = seconds_per_byte(curve, values.total_flops / moved) - reading
    # Curves are measured on what no cache holds; a small step reads faster, its launches included.
    speedup = step.cache_speedup
    launch = step.target.launch_overhead + step.target.launches.get(kernel, 0.0) / speedup
    return moved * reading / speedup, moved * arithmetic, values.launches * launch


def _below_peaks(name: str, values: Values, step: _Step) -> tuple[float, float, float]:
    """Compute, memory and launch seconds from peaks, and the fractions of them that were measured."""
    target = step.target
    figure = _FIGURE.get(name, name)
    compute = sum(flops / target.flops_rate(dtype) for dtype, flops in values.flops.items())
    compute /= target.efficiency(f"{figure}_flops")
    bandwidth = step.read_rate * target.efficiency("bandwidth_fraction")
    memory = off_chip_bytes(values, target) / (bandwidth * target.efficiency(f"{figure}_bandwidth"))
    if step.dtype in target.activation_rates:
        memory += values.activation_bytes / target.activation_rates[step.dtype]
    return compute, memory, values.launches * target.launch_overhead


def off_chip_bytes(values: Values, target: Target) -> float:
    """Bytes that go to memory: weights and cache, and activations that the on-chip cache cannot hold.

    Activations are judged by what one kernel handles on average.
    """
    moved = values.bytes_read + values.bytes_written
    handled = values.activation_bytes / max(values.launches, 1.0)
    return moved + (values.activation_bytes if handled > target.on_chip_cache else 0.0)


def roofline(values: Values, target: Target) -> dict[str, float]:
    """Where a cost lies on a target's roofline.

    Returns:
        ``intensity`` (operations per byte), ``ridge`` (the intensity where compute and memory time are
        equal), ``attainable_flops_per_second`` and ``attainable_bytes_per_second``.
    """
    moved = max(off_chip_bytes(values, target), 1.0)
    compute = sum(flops / target.flops_rate(dtype) for dtype, flops in values.flops.items())
    seconds = max(compute, moved / target.bandwidth)
    rate = values.total_flops / compute if compute else target.flops_rate("float32")
    return {
        "intensity": values.total_flops / moved,
        "ridge": rate / target.bandwidth,
        "attainable_flops_per_second": values.total_flops / seconds,
        "attainable_bytes_per_second": moved / seconds,
    }
