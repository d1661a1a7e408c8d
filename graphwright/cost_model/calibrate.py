"""Measuring the CPU at hand: read bandwidth, matrix products, the cost of starting a small op.

The figures are kept in the user's cache folder (``$GRAPHWRIGHT_CACHE_DIR`` overrides it), one file for
each CPU model and number of threads.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from platformdirs import user_cache_dir

from graphwright.cost_model.target import Target, interpolate_bandwidth
from graphwright.ir.errors import InputError

CACHE_VARIABLE = "GRAPHWRIGHT_CACHE_DIR"
_VERSION = 1
_MIB = 2**20
# Larger than most last-level caches, so that a sum over it reads memory.
_BUFFER_BYTES = 512 * _MIB
_ASSUMED_CACHE = 32 * _MIB

Progress = Callable[[str, float], None]
#: ``x [M, K]`` and ``weight [N, K]`` to ``[M, N]``.
LinearKernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Measured:
    """What was measured on one CPU.

    Args:
        cpu, threads: which CPU, and torch's threads at the time.
        bandwidth: bytes per second read from a buffer of ``buffer_bytes``.
        flops: operations per second of a square matrix product, by dtype name.
        launch_overhead: seconds of one small op called from Python.
        buffer_bytes: the buffer; a last-level cache that is larger keeps part of it.
        bandwidths: ``[bytes, bytes per second]`` of smaller buffers too, the largest last: a step that reads
            little reads it from caches.
        efficiencies: fractions of ``bandwidth`` and ``flops`` that the program's kernels reach,
            e.g. ``linear_bandwidth``; only what was measured.
    """

    cpu: str
    threads: int
    bandwidth: float
    flops: dict[str, float]
    launch_overhead: float
    buffer_bytes: int
    bandwidths: list[list[float]] = field(default_factory=list)
    efficiencies: dict[str, float] = field(default_factory=dict)


def measure_cpu(
    progress: Progress | None = None,
    seconds: float = 2.0,
    *,
    linear: LinearKernel | None = None,
    refresh: bool = False,
) -> Measured:
    """This CPU's figures, measured once and then read from the cache folder.

    Args:
        progress: called with what is being measured and the fraction done.
        seconds: about how long to measure for (filling the buffer comes on top).
        linear: a kernel for one row against bfloat16 weights; the fraction of the bandwidth that it
            reaches becomes ``linear_bandwidth``.
        refresh: measure again although figures exist.

    Raises:
        InputError: ``seconds`` is not above zero.
    """
    if not seconds > 0:
        raise InputError(f"seconds must be above zero, not {seconds!r}", where="measure_cpu(seconds=...)")
    tell = progress or (lambda step, done: None)
    measured = None if refresh else cached_measured()
    if measured is None:
        measured = _measure(tell, seconds)
        _store(measured)
    if linear is not None and "linear_bandwidth" not in measured.efficiencies:
        tell("one-row linear", 0.9)
        size, rate = _linear_rate(linear, seconds / 4)
        fraction = rate / interpolate_bandwidth(measured.bandwidths, size)
        measured = replace(measured, efficiencies={**measured.efficiencies, "linear_bandwidth": fraction})
        _store(measured)
    tell("done", 1.0)
    return measured


def cached_measured() -> Measured | None:
    """The stored figures of this CPU at this number of threads, or None; a damaged file counts as none."""
    try:
        data = json.loads(_path().read_text(encoding="utf-8"))
        if data.pop("version") != _VERSION:
            return None
        found = Measured(**data)
        rates = (found.bandwidth, found.launch_overhead, *found.flops.values(), *found.efficiencies.values())
        return found if all(rate > 0 for rate in rates) and found.flops else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def apply_measured(target: Target, measured: Measured | None) -> Target:
    """The ``cpu`` target as this machine: its memory and caches, and what was measured of it.

    Figures that were not measured stay as the target file assumes them, and ``sources`` says so.
    """
    cache = last_level_cache()
    known = "reported by the system" if cache else "assumed: the system does not report its caches"
    sources = {**target.sources, "memory": "reported by the system", "on_chip_cache": known}
    here = replace(
        target, title=cpu_name(), threads=torch.get_num_threads(), memory_bytes=system_memory(),
        on_chip_cache=cache or _ASSUMED_CACHE, sources=sources,
    )  # fmt: skip
    if measured is None:
        return here
    note = f"measured on {measured.cpu}, {measured.threads} threads"
    reads = f"{note}: reading {measured.buffer_bytes // _MIB} MiB"
    if cache >= measured.buffer_bytes // 2:
        reads += f"; the last-level cache of {cache // _MIB} MiB may hold part of it"
    sources |= {"bandwidth": reads, "launch_overhead": f"{note}: a small op from Python"}
    sources = {name: source for name, source in sources.items() if not name.startswith("peak_flops")}
    sources |= {f"peak_flops.{dtype}": f"{note}: square matrix product" for dtype in measured.flops}
    return replace(
        here, bandwidth=measured.bandwidth, peak_flops=measured.flops, sources=sources,
        launch_overhead=measured.launch_overhead, measured=measured.efficiencies,
        bandwidths=tuple((size, rate) for size, rate in measured.bandwidths),
    )  # fmt: skip


# --- what is measured ----------------------------------------------------------------------------


@torch.no_grad()
def _measure(tell: Progress, seconds: float) -> Measured:
    tell("read bandwidth", 0.0)
    size = min(_BUFFER_BYTES, system_memory() // 16)
    bandwidths = _read_rates(size, seconds / 3)
    tell("float32 matrix product", 0.3)
    flops = {"float32": _matmul_rate(torch.float32, seconds / 5)}
    tell("small op", 0.45)
    overhead = _small_op_seconds(seconds / 20)
    tell("bfloat16 matrix product", 0.5)
    bfloat16 = _bfloat16_rate(seconds / 5)
    if bfloat16:
        flops["bfloat16"] = bfloat16
    return Measured(cpu_name(), torch.get_num_threads(), bandwidths[-1][1], flops, overhead, size, bandwidths)


def _best_seconds(run: Callable[[], object], limit: float, least: int = 3) -> float:
    """The shortest of several runs: other work on the machine only ever makes a run longer."""
    best, started = float("inf"), time.perf_counter()
    runs = 0
    while runs < least or time.perf_counter() - started < limit:
        before = time.perf_counter()
        run()
        now = time.perf_counter()
        best, runs = min(best, now - before), runs + 1
        if now - started > 3 * limit:  # a slow machine: one run must do
            break
    return best


def _read_rates(size: int, limit: float) -> list[list[float]]:
    """Bytes per second from buffers of growing size, by whichever of a sum and a dot product is faster."""
    buffer = torch.ones(size // 4, dtype=torch.float32)
    rates: list[list[float]] = []
    for part in (16, 4, 2, 1):
        values = buffer[: len(buffer) // part]
        half = len(values) // 2
        runs = (values.sum, partial(torch.dot, values[:half], values[half:]))
        seconds = min(_best_seconds(run, limit / 8) for run in runs)
        rates.append([float(values.nbytes), values.nbytes / seconds])
    # A larger buffer is never read faster; where it seems so, the smaller one was disturbed.
    for index in range(len(rates) - 2, -1, -1):
        rates[index][1] = max(rates[index][1], rates[index + 1][1])
    return rates


def _matmul_rate(dtype: torch.dtype, limit: float) -> float:
    """Doubles the size while a product is short, so that neither fast nor slow machines wait."""
    width = 128
    while True:
        a = torch.ones(width, width, dtype=dtype)
        torch.mm(a, a)
        spent = _best_seconds(partial(torch.mm, a, a), limit / 16)
        if width >= 2048 or spent * 8 > limit / 4:
            return 2 * width**3 / spent
        width *= 2


# Doubles the size as _matmul_rate does; needs nothing but torch, which starts faster than this package.
_CHILD = """
import sys, time, torch
limit = float(sys.argv[1])
torch.set_num_threads(int(sys.argv[2]))
width = 128
while True:
    a = torch.ones(width, width, dtype=torch.bfloat16)
    torch.mm(a, a)
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < limit / 16 or best == float("inf"):
        before = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - before)
    if width >= 2048 or best * 8 > limit / 4:
        break
    width *= 2
print(2 * width**3 / best)
"""


def _bfloat16_rate(limit: float) -> float | None:
    """bfloat16 products in a process of its own, or None where they fail.

    Virtual machines exist that announce AMX and do not have it: oneDNN's product then ends the process
    with an illegal instruction, which must not be the caller's.
    """
    command = [sys.executable or "python", "-c", _CHILD, str(limit), str(torch.get_num_threads())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return float(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _small_op_seconds(limit: float) -> float:
    a = torch.ones(1, 64)

    def hundred() -> None:
        for _ in range(100):
            torch.add(a, a)

    return _best_seconds(hundred, limit) / 100


@torch.no_grad()
def _linear_rate(linear: LinearKernel, limit: float) -> tuple[int, float]:
    """Bytes of many weights, and how many of them per second one row goes through."""
    count = _BUFFER_BYTES // 2 // (1536 * 576 * 2)
    weights = [torch.ones(1536, 576, dtype=torch.bfloat16) for _ in range(count)]
    row = torch.ones(1, 576, dtype=torch.bfloat16)

    def run() -> None:
        for weight in weights:
            linear(row, weight)

    run()
    size = sum(weight.nbytes for weight in weights)
    return size, size / _best_seconds(run, limit)


# --- the machine ---------------------------------------------------------------------------------


def cpu_name() -> str:
    """The CPU's model name, as the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        return platform.processor() or platform.machine() or "unknown CPU"


def system_memory() -> int:
    """Bytes of main memory that this process may use: the system's, or its control group's if less."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        total = 16 * 10**9
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8").strip()
        total = min(total, int(limit)) if limit.isdigit() else total
    except OSError:
        return total
    return total


def last_level_cache() -> int:
    """Bytes of the largest cache that CPU 0 uses; 0 if the system does not say."""
    sizes = [0]
    for entry in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            text = entry.read_text(encoding="utf-8").strip()
            sizes.append(int(text.rstrip("KMG")) * {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1], 1))
        except (OSError, ValueError, IndexError):
            continue
    return max(sizes)


def cache_folder() -> Path:
    """Where measurements are kept."""
    return Path(os.environ.get(CACHE_VARIABLE) or user_cache_dir("graphwright"))


def _path() -> Path:
    key = f"{cpu_name()}|{torch.get_num_threads()}"
    return cache_folder() / f"cpu-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _store(measured: Measured) -> None:
    """Write all of it or nothing: another process may read, and this one may be interrupted.

    A cache folder that cannot be written only means that the next run measures again.
    """
    path = _path()
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"version": _VERSION, **asdict(measured)}, file, indent=2)
        os.replace(temporary, path)
        temporary = None
    except OSError:
        return
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
