"""Measuring the machine at hand, once: the figures are kept in the user's cache folder.

One file for each device and number of threads, written whole or not at all. Two processes that measure
at once would disturb each other, so the second waits for the first and reads its result.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from graphwright.cost_model.host import (
    CACHE_VARIABLE,
    cache_folder,
    cpu_name,
    last_level_cache,
    locked,
    replace_file,
    system_memory,
)
from graphwright.cost_model.measure import (
    BUFFER_BYTES,
    MIB,
    Clock,
    Curve,
    Kernels,
    activation_rate,
    attention_curve,
    linear_curve,
    linear_rates,
    matmul_rate,
    read_rates,
    small_op_seconds,
)
from graphwright.cost_model.target import Target, freeze_curves
from graphwright.ir.errors import InputError

__all__ = [
    "CACHE_VARIABLE",
    "Kernels",
    "Measured",
    "apply_measured",
    "cached_measured",
    "cpu_name",
    "measure",
    "store",
]

_VERSION = 4
_ASSUMED_CACHE = 32 * MIB
_DTYPES = (torch.float32, torch.bfloat16)

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Measured:
    """What was measured on one device.

    Args:
        device: its name, and for a CPU ``threads`` of torch at the time (0 for others).
        bandwidth: bytes per second read from a buffer of ``buffer_bytes``.
        flops: operations per second of square matrix products, by dtype name; the faster of the
            library's and the program's own.
        launch_overhead: seconds that a launch adds to a step.
        buffer_bytes: the buffer; a last-level cache that is larger keeps part of it.
        bandwidths: ``[bytes, bytes per second]`` of smaller buffers too, the largest last: a step that
            reads little reads it from caches.
        curves: by kernel and dtype (``linear.bfloat16``), ``[operations per byte, seconds per byte]``.
        launches: likewise, seconds that a launch takes beyond its bytes and ``launch_overhead``.
        activation_rates: by dtype, bytes per second of the arithmetic between kernels.
        kernel_rates: ``[bytes, bytes per second]`` at which linears read growing numbers of weights.
    """

    device: str
    threads: int
    bandwidth: float
    flops: dict[str, float]
    launch_overhead: float
    buffer_bytes: int
    bandwidths: list[list[float]] = field(default_factory=list)
    curves: dict[str, Curve] = field(default_factory=dict)
    launches: dict[str, float] = field(default_factory=dict)
    activation_rates: dict[str, float] = field(default_factory=dict)
    kernel_rates: list[list[float]] = field(default_factory=list)

    def figures(self) -> Iterator[float]:
        """Every number; a usable measurement has only finite ones above zero."""
        yield from (self.bandwidth, self.launch_overhead, *self.flops.values(), *self.launches.values())
        yield from self.activation_rates.values()
        for curve in (self.bandwidths, self.kernel_rates, *self.curves.values()):
            for point in curve:
                yield from point


def measure(
    kernels: Kernels | None = None,
    device: torch.device | None = None,
    progress: Progress | None = None,
    seconds: float = 6.0,
    *,
    refresh: bool = False,
) -> Measured:
    """This machine's figures, measured once and then read from the cache folder.

    Args:
        kernels: what programs run here; without them, only what the library does is measured.
        device: the CPU by default.
        progress: called with what is being measured and the fraction done.
        seconds: about how long to measure for (filling the buffers comes on top).
        refresh: measure again although figures exist.

    Raises:
        InputError: ``seconds`` is not a finite number above zero.
    """
    if not (seconds > 0 and math.isfinite(seconds)):
        raise InputError(f"seconds must be above zero, not {seconds!r}", where="measure(seconds=...)")
    device = device or torch.device("cpu")
    tell = progress or (lambda step, done: None)
    with locked(_path(device).with_suffix(".lock")):
        measured = None if refresh else cached_measured(device)
        if measured is None or (kernels is not None and not measured.curves):
            measured = _measure(kernels, device, tell, seconds)
            store(measured, device)
    tell("done", 1.0)
    return measured


def cached_measured(device: torch.device | None = None) -> Measured | None:
    """The stored figures of a device (the CPU at this number of threads by default); None if damaged."""
    try:
        data = json.loads(_path(device or torch.device("cpu")).read_text(encoding="utf-8"))
        if data.pop("version") != _VERSION:
            return None
        found = Measured(**data)
        usable = all(math.isfinite(number) and number > 0 for number in found.figures())
        return found if usable and found.flops and found.bandwidths else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def stored_at(device: torch.device | None = None) -> Path:
    """The file that holds (or would hold) a device's figures."""
    return _path(device or torch.device("cpu"))


def apply_measured(target: Target, measured: Measured | None) -> Target:
    """The target as this machine: what the system reports, and what was measured.

    Peaks of a data sheet stay as they are; a CPU has none, so there the measured figures take their place.
    Figures that were not measured stay as the target file assumes them, and ``sources`` says so.
    """
    here = _reported(target) if target.kind == "cpu" else target
    if measured is None:
        return here
    on = f"{measured.device}, {measured.threads} threads" if measured.threads else measured.device
    note = f"measured on {on}"
    reads = f"{note}: reading {measured.buffer_bytes // MIB} MiB"
    cache = last_level_cache() if target.kind == "cpu" else 0
    if cache >= measured.buffer_bytes // 2:
        reads += f"; the last-level cache of {cache // MIB} MiB may hold part of it"
    sources = {**here.sources, "launch_overhead": f"{note}: a launch inside a program"}
    for name in (*measured.curves, *measured.activation_rates):
        sources[f"measured.{name}"] = note
    here = replace(
        here, launch_overhead=measured.launch_overhead, curves=freeze_curves(measured.curves),
        launches=measured.launches, activation_rates=measured.activation_rates,
        kernel_rates=tuple((size, rate) for size, rate in measured.kernel_rates), sources=sources,
    )  # fmt: skip
    if target.kind != "cpu":
        fraction = min(1.0, measured.bandwidth / target.bandwidth)
        return replace(here, measured={**target.measured, "bandwidth_fraction": fraction})
    kept = {name: text for name, text in sources.items() if not name.startswith("peak_flops")}
    peaks = {f"peak_flops.{dtype}": f"{note}: the fastest matrix product" for dtype in measured.flops}
    return replace(
        here, bandwidth=measured.bandwidth, peak_flops=measured.flops,
        bandwidths=tuple((size, rate) for size, rate in measured.bandwidths),
        sources={**kept, "bandwidth": reads, **peaks},
    )  # fmt: skip


def _reported(target: Target) -> Target:
    cache = last_level_cache()
    known = "reported by the system" if cache else "assumed: the system does not report its caches"
    sources = {**target.sources, "memory": "reported by the system", "on_chip_cache": known}
    return replace(
        target, title=cpu_name(), threads=torch.get_num_threads(), memory_bytes=system_memory(),
        on_chip_cache=cache or _ASSUMED_CACHE, sources=sources,
    )  # fmt: skip


# --- what is measured ----------------------------------------------------------------------------


@torch.no_grad()
def _measure(kernels: Kernels | None, device: torch.device, tell: Progress, seconds: float) -> Measured:
    clock = Clock(device, seconds / 60)
    tell("read bandwidth", 0.0)
    memory = system_memory() if device.type == "cpu" else torch.cuda.mem_get_info(device)[1]
    size = min(BUFFER_BYTES, memory // 16)
    bandwidths = read_rates(size, clock)
    tell("matrix product", 0.2)
    flops = {"float32": matmul_rate(torch.float32, clock)}
    if device.type != "cpu":  # on CPUs the program's own kernel says it; the library's may crash
        flops["bfloat16"] = matmul_rate(torch.bfloat16, clock)
    curves: dict[str, Curve] = {}
    launches: dict[str, float] = {}
    activations: dict[str, float] = {}
    rates: list[list[float]] = []
    if kernels is not None:
        for index, dtype in enumerate(_DTYPES):
            name = str(dtype).removeprefix("torch.")
            tell(f"{name} linear", 0.25 + 0.3 * index)
            key = f"linear.{name}"
            launches[key], curves[key] = linear_curve(kernels.linear, dtype, clock, size)
            tell(f"{name} attention", 0.4 + 0.3 * index)
            key = f"attention.{name}"
            launches[key], curves[key] = attention_curve(kernels.attention, dtype, clock, size)
            reached = max(intensity / per_byte for intensity, per_byte in curves[f"linear.{name}"])
            flops[name] = max(flops.get(name, 0.0), reached)
            if device.type == "cpu":
                activations[name] = activation_rate(dtype, clock)
        rates = linear_rates(kernels.linear, clock, size)
    tell("launches", 0.9)
    launch = kernels.launch() if kernels is not None and kernels.launch else small_op_seconds(clock)
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return Measured(
        _device_name(device), threads, bandwidths[-1][1], flops, launch, size, bandwidths,
        curves, {name: max(s, 1e-9) for name, s in launches.items()}, activations, rates,
    )  # fmt: skip


# --- where it is kept ----------------------------------------------------------------------------


def _device_name(device: torch.device) -> str:
    return cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device)


def _path(device: torch.device) -> Path:
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    key = f"{_device_name(device)}|{threads}"
    return cache_folder() / f"{device.type}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def store(measured: Measured, device: torch.device | None = None) -> None:
    """Write all of it or nothing: another process may read, and this one may be interrupted.

    A cache folder that cannot be written only means that the next run measures again.
    """
    path = _path(device or torch.device("cpu"))
    content = json.dumps({"version": _VERSION, **asdict(measured)}, indent=2)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content.encode())
