"""What configurations depend on of a GPU: the one at hand, or one that kernels are compiled for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

import torch

from graphwright.ir.errors import InputError


@dataclass(frozen=True)
class DeviceFacts:
    """What a configuration depends on.

    Attributes:
        name: as torch reports the device, or the target's name.
        kind: ``cuda`` or ``rocm``.
        multiprocessors: of the device.
        shared_memory: bytes that one program may use; a multiprocessor has hardly more.
        l2: bytes of the last-level cache.
        bandwidth: peak bytes per second from memory.
    """

    name: str
    kind: str
    multiprocessors: int
    shared_memory: int
    l2: int
    bandwidth: float = 2e12


# By target: architecture, multiprocessors, last-level cache in MiB, bytes per second. Cache and bandwidth
# are those of the files in cost_model/targets, which name their sources.
_PLANNED = {
    "a100": ("sm_80", 108, 40, 2.039e12),  # GA100 whitepaper, table 4
    "a100-40gb": ("sm_80", 108, 40, 1.555e12),  # the same table
    "h100": ("sm_90", 132, 50, 3.35e12),  # GH100 whitepaper, H100 SXM5
    "h100-pcie": ("sm_90", 114, 50, 2.0e12),  # GH100 whitepaper, H100 PCIe
    "h200": ("sm_90", 132, 50, 4.8e12),  # the H100's chip
    "b200": ("sm_100", 148, 126.5, 7.7e12),  # reported by CUDA drivers; not in the data sheet
    "l4": ("sm_89", 58, 48, 300e9),  # 7,424 CUDA cores, 128 of them a multiprocessor
    "l40s": ("sm_89", 142, 96, 864e9),  # data sheet: 18,176 CUDA cores
    "rtx4090": ("sm_89", 128, 72, 1.008e12),  # Ada whitepaper, GeForce RTX 4090
    "rtx5090": ("sm_120", 170, 96, 1.792e12),  # RTX Blackwell whitepaper, GeForce RTX 5090
    "mi300x": ("gfx942", 304, 256, 5.3e12),  # MI300X data sheet: 304 compute units
    "mi325x": ("gfx942", 304, 256, 6.0e12),  # MI325X data sheet: 304 compute units
}
# Which of them stands for an architecture.
_TYPICAL = {
    "sm_80": "a100", "sm_89": "rtx4090", "sm_90": "h100", "sm_100": "b200", "sm_120": "rtx5090",
    "gfx942": "mi300x",
}  # fmt: skip
# What kernels are planned for where nothing says otherwise (the interpreter).
_DEFAULT = "a100-40gb"

_PLANNING: ContextVar[DeviceFacts | None] = ContextVar("graphwright_planned_device", default=None)


def planned_device(name: str) -> DeviceFacts:
    """Facts of a GPU that is not at hand.

    Args:
        name: a target's name (``h200``), or an architecture (``sm_90``), which its usual GPU stands for.

    Raises:
        InputError: nothing is known of it.
    """
    target = _TYPICAL.get(name, name)
    if target not in _PLANNED:
        raise InputError(
            f"nothing is known of a GPU {name!r}",
            where="planned_device(name)",
            hint=f"known: {', '.join((*_PLANNED, *_TYPICAL))}",
        )
    from graphwright.kernels.triton.ahead import ARCHITECTURES

    arch, count, cache_mib, bandwidth = _PLANNED[target]
    kind = "rocm" if arch.startswith("gfx") else "cuda"
    shared = ARCHITECTURES[arch].shared
    return DeviceFacts(name, kind, count, shared, round(cache_mib * 2**20), bandwidth)


@contextmanager
def planning_for(facts: DeviceFacts | str) -> Iterator[DeviceFacts]:
    """Inside, tensors that are on no GPU are planned for this one.

    Args:
        facts: of the GPU, or a name that :func:`planned_device` knows.
    """
    facts = planned_device(facts) if isinstance(facts, str) else facts
    token = _PLANNING.set(facts)
    try:
        yield facts
    finally:
        _PLANNING.reset(token)


def device_facts(device: torch.device) -> DeviceFacts:
    """Of the GPU at hand; elsewhere (``meta``, the interpreter) of the one that is planned for."""
    if device.type == "cuda":
        return _found(torch.cuda.current_device() if device.index is None else device.index)
    return _PLANNING.get() or planned_device(_DEFAULT)


@cache
def _found(index: int) -> DeviceFacts:
    found = torch.cuda.get_device_properties(index)
    kind = "rocm" if torch.version.hip else "cuda"
    shared = getattr(found, "shared_memory_per_block_optin", 0) or getattr(
        found, "shared_memory_per_block", 48 << 10
    )
    # Two transfers a clock (kHz) of the bus (bits); older versions of torch report neither.
    clock, width = getattr(found, "memory_clock_rate", 0), getattr(found, "memory_bus_width", 0)
    bandwidth = 2e3 * clock * width / 8 or DeviceFacts.bandwidth
    return DeviceFacts(found.name, kind, found.multi_processor_count, shared, found.L2_cache_size, bandwidth)
