"""Machines as data: peaks from data sheets with their source, measured figures apart.

A target is a TOML file in ``targets/``. Peaks are dense; figures that assume structured sparsity do not
belong here. ``cpu`` is the machine at hand and is measured (:mod:`graphwright.cost_model.calibrate`).
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from graphwright.ir.errors import InputError, UnknownTargetError

#: ``(operations per byte, seconds per byte)``, ascending.
Curve = tuple[tuple[float, float], ...]

FOLDER = Path(__file__).with_name("targets")
VENDORS = ("cpu", "nvidia", "amd")
# Outside of these a figure has the wrong unit or is a typing error.
_SANE = {
    "memory": (2**28, 2**45),
    "bandwidth": (1e8, 1e14),
    "on_chip_cache": (2**16, 2**34),
    "launch_overhead": (1e-8, 1e-2),
    "peak_flops": (1e8, 1e17),
}
# What a dtype runs at where the machine has no peak of its own for it.
_STAND_IN = {"float16": "bfloat16", "bfloat16": "float32", "float64": "float32", "float8_e4m3fn": "bfloat16"}


@dataclass(frozen=True)
class Target:
    """A machine that a program runs on.

    Args:
        name: how the public calls name it, e.g. ``h100``.
        title: what the vendor calls it.
        vendor: ``nvidia``, ``amd`` or ``cpu``.
        kind: ``cuda``, ``rocm`` or ``cpu``.
        arch: what kernels are compiled for, e.g. ``sm_90``; empty for a CPU.
        memory_bytes: memory of the device.
        bandwidth: peak bytes per second from that memory.
        on_chip_cache: bytes of the last cache before the memory; 0 if not known.
        peak_flops: dense operations per second by dtype name.
        launch_overhead: seconds to start one kernel.
        sources: where each figure comes from, by figure (``bandwidth``, ``peak_flops.bfloat16``).
        measured: figures measured on such a machine, e.g. ``bandwidth_fraction``; empty unless measured.
        aliases: other names that mean the same.
        device_names: parts of the name by which torch reports the device.
        threads: CPU threads; 0 for others.
        bandwidths: measured ``(bytes, bytes per second)`` by how much a step reads, ascending; empty where
            only the peak is known.
        curves: measured time of kernels, by kernel and dtype (``linear.bfloat16``): ``(operations per byte,
            seconds per byte)`` ascending, read from memory. Empty where only the peaks are known.
        launches: for the same kernels, seconds of a launch beyond its bytes and ``launch_overhead``.
        activation_rates: by dtype, measured bytes per second of the arithmetic between kernels.
        kernel_rates: measured ``(bytes, bytes per second)`` of linears over so many bytes of weights.
    """

    name: str
    title: str
    vendor: str
    kind: str
    arch: str
    memory_bytes: int
    bandwidth: float
    peak_flops: Mapping[str, float]
    launch_overhead: float
    on_chip_cache: int = 0
    sources: Mapping[str, str] = field(default_factory=dict)
    measured: Mapping[str, float] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    device_names: tuple[str, ...] = ()
    threads: int = 0
    bandwidths: tuple[tuple[float, float], ...] = ()
    curves: Mapping[str, Curve] = field(default_factory=dict)
    launches: Mapping[str, float] = field(default_factory=dict)
    activation_rates: Mapping[str, float] = field(default_factory=dict)
    kernel_rates: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        for name in ("peak_flops", "sources", "measured", "curves", "launches", "activation_rates"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        where = f"target {self.name!r}"
        for figure, number in self._figures():
            least, most = _SANE[figure.split(".")[0]]
            real = isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)
            if not real or not least <= number <= most:
                raise InputError(
                    f"{figure} is {number!r}; between {least:g} and {most:g} was expected",
                    where=where,
                    hint="sizes are bytes, rates are per second, times are seconds",
                )
        if "float32" not in self.peak_flops:
            raise InputError("peak_flops has no float32", where=where, hint="it stands in for other dtypes")

    def _figures(self) -> list[tuple[str, Any]]:
        figures = [("memory", self.memory_bytes), ("bandwidth", self.bandwidth)]
        figures += [("launch_overhead", self.launch_overhead)]
        figures += [("on_chip_cache", self.on_chip_cache)] if self.on_chip_cache else []
        return figures + [(f"peak_flops.{dtype}", rate) for dtype, rate in self.peak_flops.items()]

    def flops_rate(self, dtype: str) -> float:
        """Dense operations per second at a dtype; a dtype without a peak runs as the next wider one."""
        while dtype not in self.peak_flops:
            dtype = _STAND_IN.get(dtype, "float32")
        return self.peak_flops[dtype]

    def read_rate(self, step_bytes: float) -> float:
        """Bytes per second for a step that reads so many bytes; caches keep a small step's."""
        return interpolate_bandwidth(self.bandwidths, step_bytes) if self.bandwidths else self.bandwidth

    def cache_speedup(self, step_bytes: float) -> float:
        """How many times faster kernels read in a step of so many bytes than in one beyond all caches."""
        if not self.kernel_rates:
            return 1.0
        return interpolate_bandwidth(self.kernel_rates, step_bytes) / self.kernel_rates[-1][1]

    def efficiency(self, figure: str) -> float:
        """The measured fraction of a peak, e.g. ``linear_bandwidth``; 1 where nothing was measured."""
        return self.measured.get(figure, 1.0)

    @property
    def line(self) -> str:
        """The machine in one line."""
        peak = self.flops_rate("bfloat16")
        return (
            f"{self.title}: {self.memory_bytes / 1e9:.0f} GB at {_si(self.bandwidth)}B/s, "
            f"{_si(peak)}FLOP/s dense bfloat16"
        )

    def __str__(self) -> str:
        return self.name


def freeze_curves(curves: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, Curve]:
    """Measured curves as a target holds them."""
    return {name: tuple((point[0], point[1]) for point in curve) for name, curve in curves.items()}


def seconds_per_byte(curve: Curve, intensity: float) -> float:
    """Time of a byte that takes so many operations, linear between measured points.

    Below the first point it is flat, as memory bounds it; beyond the last it grows with the arithmetic.
    """
    if intensity <= curve[0][0]:
        return curve[0][1]
    for (low, fast), (high, slow) in itertools.pairwise(curve):
        if intensity <= high:
            return fast + (slow - fast) * (intensity - low) / (high - low)
    return curve[-1][1] * intensity / curve[-1][0]


def interpolate_bandwidth(bandwidths: Sequence[Sequence[float]], step_bytes: float) -> float:
    """Bytes per second at a size between measured ones, linear in the time per byte; flat beyond them."""
    if step_bytes <= bandwidths[0][0]:
        return bandwidths[0][1]
    for (low, fast), (high, slow) in itertools.pairwise(bandwidths):
        if step_bytes <= high:
            share = (step_bytes - low) / (high - low)
            return 1 / ((1 - share) / fast + share / slow)
    return bandwidths[-1][1]


def _si(number: float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g} "


@lru_cache(maxsize=1)
def _known() -> dict[str, Target]:
    from graphwright.cost_model.target_file import load_target

    found = [load_target(path) for path in sorted(FOLDER.glob("*.toml"))]
    found.sort(key=lambda target: (VENDORS.index(target.vendor), target.name))
    return {target.name: target for target in found}


def targets() -> dict[str, str]:
    """Every machine that can be optimized for: its name, and one line about it."""
    cpu = 'the CPU at hand, measured; "auto" is a GPU where torch sees one, and this otherwise'
    return {name: cpu if target.kind == "cpu" else target.line for name, target in _known().items()}


def resolve_target(name: str | Target = "auto") -> Target:
    """The target of a name or alias; nothing is measured.

    Args:
        name: ``cpu``, ``auto``, a name of :func:`targets` (case and ``_`` or spaces do not matter), or a
            target, which is returned as it is. The machine at hand comes with what was measured of it
            (``graphwright calibrate``); otherwise its figures are assumed, and their source says so.

    Raises:
        UnknownTargetError: no such target; the message lists the nearest names.
    """
    if isinstance(name, Target):
        return name
    if not isinstance(name, str):
        raise InputError(f"a target is a name, not {name!r}", where="target=...", hint='for example "cpu"')
    wanted = name.strip().lower().replace("_", "-").replace(" ", "-")
    here = _device_target()
    if wanted == "auto":
        wanted = here.name if here else "cpu"
    by_name = {alias: target for target in _known().values() for alias in (target.name, *target.aliases)}
    if wanted not in by_name:
        near = difflib.get_close_matches(wanted, by_name, n=4, cutoff=0.4) or sorted(_known())
        raise UnknownTargetError(
            f"there is no target {name!r}", where="target=...", hint=f"did you mean {', '.join(near)}?"
        )
    target = by_name[wanted]
    if here is not None and here.name == target.name:
        return _as_measured(here, torch.device("cuda", 0))
    return _as_measured(target, torch.device("cpu")) if target.kind == "cpu" else target


def _as_measured(target: Target, device: torch.device) -> Target:
    from graphwright.cost_model.calibrate import apply_measured, cached_measured

    return apply_measured(target, cached_measured(device))


def _device_target() -> Target | None:
    """The target of the first CUDA or ROCm device, by its name and then by its memory."""
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_properties(0)
    return match_device(device.name, device.total_memory)


def match_device(name: str, memory_bytes: int) -> Target | None:
    """The target that a device of this name and memory is, or None if no file describes it.

    Args:
        name: as torch reports it, e.g. ``NVIDIA H100 80GB HBM3``.
        memory_bytes: what torch reports as total memory.
    """

    def longest(target: Target) -> int:
        parts = (p for p in target.device_names if re.search(rf"\b{re.escape(p)}\b", name, re.IGNORECASE))
        return max(map(len, parts), default=0)

    # The longest matching part is the most specific; memory decides between 40 and 80 GB of one name.
    def score(target: Target) -> tuple[int, float]:
        return longest(target), -abs(target.memory_bytes - memory_bytes)

    best = max(_known().values(), key=score)
    if not longest(best):
        return None
    return replace(
        best, memory_bytes=memory_bytes, sources={**best.sources, "memory": "reported by the driver"}
    )
