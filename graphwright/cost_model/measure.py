"""Timing what programs are made of, on the machine at hand: reads, matrix products, attention, launches.

Everything is measured on data that no cache holds, because a decode step reads each weight once. Kernels
are passed in: the machine is measured with what its programs run.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

MIB = 2**20
#: Larger than most last-level caches, so that a pass over it reads memory.
BUFFER_BYTES = 512 * MIB
#: Rows of the measured products. Kernels work on tiles of rows: the step beyond a tile is measured too.
ROWS = (1, 2, 4, 8, 16, 17, 32, 33, 64, 128, 512)
#: Query tokens of the measured attention.
TOKENS = (1, 2, 4, 8, 16, 64, 256)
#: Sequences of the measured attention.
BATCHES = (1, 4)
_WIDE, _DEEP = 2048, 1024  # a weight of the measured products: 4 MiB in bfloat16
_SMALL = 512  # and of those that tell what a launch costs
_HEADS, _GROUPS, _WIDTH, _CONTEXT = 8, 4, 64, 2048

#: ``(intensity, seconds per byte)`` ascending: operations per byte read, and what a byte takes with them.
Curve = list[list[float]]


@dataclass(frozen=True)
class Kernels:
    """What the programs of a machine run.

    Args:
        linear: ``x [1, M, K]`` and ``weight [N, K]`` to ``[1, M, N]``.
        attention: ``q [B, H, T, D]``, ``k`` and ``v [B, G, T, D]``, stores ``keys`` and ``values
            [B, G, S, D]``, positions, lengths, counts; appends and attends.
        launch: seconds of one launch inside a program, measured; None to time a small op instead.
    """

    linear: Callable[[torch.Tensor, torch.Tensor], Any]
    attention: Callable[..., Any]
    launch: Callable[[], float] | None = None


class Clock:
    """Times calls, on a device that may run asynchronously.

    Args:
        device: where the calls run.
        limit: about how long to repeat a call, in seconds.
    """

    def __init__(self, device: torch.device, limit: float) -> None:
        self.device, self.limit = device, limit

    def median(self, run: Callable[[], object], least: int = 3) -> float:
        """The median of several runs after a first one: what a program meets, not the luckiest moment."""
        run()
        times: list[float] = []
        started = time.perf_counter()
        while len(times) < least or time.perf_counter() - started < self.limit:
            times.append(self._once(run))
            if time.perf_counter() - started > 4 * self.limit:  # a slow machine: what there is must do
                break
        return statistics.median(times)

    def best(self, run: Callable[[], object], least: int = 3) -> float:
        """The shortest of several runs: for peaks, which other work on the machine only ever hides."""
        run()
        best, runs, started = math.inf, 0, time.perf_counter()
        while runs < least or time.perf_counter() - started < self.limit:
            best, runs = min(best, self._once(run)), runs + 1
            if time.perf_counter() - started > 4 * self.limit:
                break
        return best

    def _once(self, run: Callable[[], object]) -> float:
        self._finish()
        before = time.perf_counter()
        run()
        self._finish()
        return time.perf_counter() - before

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


# --- memory and small ops ------------------------------------------------------------------------


def read_rates(size: int, clock: Clock) -> list[list[float]]:
    """``[bytes, bytes per second]`` from buffers up to ``size``, by the faster of a sum and a dot product."""
    buffer = torch.ones(size // 4, dtype=torch.float32, device=clock.device)
    rates: list[list[float]] = []
    for part in (16, 4, 2, 1):
        values = buffer[: len(buffer) // part]
        half = len(values) // 2
        runs = (values.sum, partial(torch.dot, values[:half], values[half:]))
        rates.append([float(values.nbytes), values.nbytes / min(clock.best(run) for run in runs)])
    return falling(rates)


def matmul_rate(dtype: torch.dtype, clock: Clock) -> float:
    """Operations per second of the library's square product; grows while a product is short."""
    width = 128
    while True:
        a = torch.ones(width, width, dtype=dtype, device=clock.device)
        spent = clock.best(partial(torch.mm, a, a))
        if width >= 8192 or spent * 8 > clock.limit * 4:
            return 2 * width**3 / spent
        width *= 2


def small_op_seconds(clock: Clock) -> float:
    """One small op called from Python."""
    a = torch.ones(1, 64, device=clock.device)

    def hundred() -> None:
        for _ in range(100):
            torch.add(a, a)

    return clock.best(hundred) / 100


def activation_rate(dtype: torch.dtype, clock: Clock) -> float:
    """Bytes per second of arithmetic between kernels, on one thread as compiled layers run it."""
    x = torch.ones(32, 2048, dtype=dtype, device=clock.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = clock.median(lambda: torch.nn.functional.silu(x) * x)
    finally:
        torch.set_num_threads(threads)
    return 3 * x.nbytes / seconds


# --- kernels -------------------------------------------------------------------------------------


@torch.no_grad()
def linear_curve(
    linear: Callable[[torch.Tensor, torch.Tensor], Any],
    dtype: torch.dtype,
    clock: Clock,
    size: int = BUFFER_BYTES,
    rows: Sequence[int] = ROWS,
) -> tuple[float, Curve]:
    """What a launch of a linear costs, and what a weight's byte takes at growing numbers of rows.

    Returns:
        Seconds per launch, and the curve; its intensity is ``2 rows / itemsize``.
    """

    def seconds(pool: list[torch.Tensor], count: int) -> float:
        return _linear_seconds(linear, pool[: _passes(len(pool), count)], count, clock)

    large, small = _weights(_WIDE, _DEEP, dtype, size, clock), _weights(_SMALL, _SMALL, dtype, size, clock)
    times = [(count, seconds(large, count)) for count in rows]
    launch = _launch_seconds(
        _linear_seconds(linear, small, 1, clock, best=True), small[0].nbytes, times[0][1], large[0].nbytes
    )
    points = [(2 * n / dtype.itemsize, _per_byte(took, launch, large[0].nbytes)) for n, took in times]
    return launch, _rising(points)


@torch.no_grad()
def linear_rates(
    linear: Callable[[torch.Tensor, torch.Tensor], Any], clock: Clock, size: int = BUFFER_BYTES
) -> list[list[float]]:
    """``[bytes, bytes per second]`` at which one row goes through growing numbers of bfloat16 weights.

    Weights that caches keep from pass to pass are read faster; the rates fall with their number.
    """
    pool = _weights(_WIDE, _DEEP, torch.bfloat16, size, clock)
    rates: list[list[float]] = []
    for part in (16, 4, 2, 1):
        some = pool[: max(1, len(pool) // part)]
        nbytes = len(some) * pool[0].nbytes
        rates.append([float(nbytes), nbytes / (len(some) * _linear_seconds(linear, some, 1, clock))])
    return falling(rates)


def falling(rates: list[list[float]]) -> list[list[float]]:
    """More bytes are never read faster; where it seems so, the smaller number was disturbed."""
    for index in range(len(rates) - 2, -1, -1):
        rates[index][1] = max(rates[index][1], rates[index + 1][1])
    return rates


def _weights(wide: int, deep: int, dtype: torch.dtype, size: int, clock: Clock) -> list[torch.Tensor]:
    count = max(1, size // (wide * deep * dtype.itemsize))
    return [torch.ones(wide, deep, dtype=dtype, device=clock.device) for _ in range(count)]


def _linear_seconds(
    linear: Callable[[torch.Tensor, torch.Tensor], Any],
    pool: list[torch.Tensor],
    rows: int,
    clock: Clock,
    *,
    best: bool = False,
) -> float:
    """Seconds of one linear among many, the median or the ``best`` over passes."""
    x = torch.ones(1, rows, pool[0].shape[1], dtype=pool[0].dtype, device=clock.device)

    def run() -> None:
        for weight in pool:
            linear(x, weight)

    return (clock.best(run) if best else clock.median(run)) / len(pool)


@torch.no_grad()
def attention_curve(
    attention: Callable[..., Any],
    dtype: torch.dtype,
    clock: Clock,
    size: int = BUFFER_BYTES,
    tokens: Sequence[int] = TOKENS,
) -> tuple[float, Curve]:
    """What a launch of attention costs, and what a stored byte takes at growing numbers of query tokens.

    Returns:
        Seconds per launch, and the curve; its intensity is ``2 H T / (G itemsize)``.
    """
    slot = 2 * _GROUPS * _WIDTH * dtype.itemsize

    def seconds(context: int, new: int, batch: int = 1) -> float:
        available = max(1, size // (slot * context * batch * len(BATCHES)))
        calls = _attention_calls(attention, dtype, clock, context, new, batch)
        return calls(_passes(available, new) if context > 64 else 64)

    launch = _launch_seconds(seconds(16, 1), slot * 16, seconds(_CONTEXT, 1), slot * _CONTEXT)
    # Few rows and many are shared out among threads in different ways; a program may run either.
    times = [
        (2 * _HEADS / _GROUPS / dtype.itemsize * new, batch, seconds(_CONTEXT, new, batch))
        for new in tokens
        for batch in BATCHES
    ]
    nbytes = slot * _CONTEXT
    points: dict[float, list[float]] = {}
    for intensity, batch, took in times:
        points.setdefault(intensity, []).append(_per_byte(took, launch, batch * nbytes))
    return launch, _rising([(x, statistics.mean(found)) for x, found in points.items()])


def _attention_calls(
    attention: Callable[..., Any], dtype: torch.dtype, clock: Clock, context: int, new: int, batch: int
) -> Callable[[int], float]:
    """Times attention over so many stores, one after the other: seconds of one call."""
    options: dict[str, Any] = {"dtype": dtype, "device": clock.device}

    def measure(count: int) -> float:
        shape = (batch, _GROUPS, context + new, _WIDTH)
        stores = [[torch.ones(shape, **options) for _ in range(2)] for _ in range(count)]
        q, k, v = (torch.ones(batch, heads, new, _WIDTH, **options) for heads in (_HEADS, _GROUPS, _GROUPS))
        lengths = torch.full((batch,), context, device=clock.device)
        counts = torch.full((batch,), new, device=clock.device)
        positions = lengths[:, None] + torch.arange(new, device=clock.device)

        def run() -> None:
            for keys, values in stores:
                attention(q, k, v, keys, values, positions, lengths, counts)

        return clock.median(run) / count

    return measure


def _passes(available: int, rows: int) -> int:
    """How many tensors one run goes through: fewer where arithmetic bounds it and caches do not matter."""
    return max(2, available * 16 // rows) if rows > 16 else available


def _launch_seconds(small: float, small_bytes: int, large: float, large_bytes: int) -> float:
    """The part of a call that does not grow with its bytes, from a small and a large call.

    At most half of the large call: a small call that was disturbed must not take the bytes' time away.
    """
    slope = max(large - small, 0.0) / (large_bytes - small_bytes)
    return min(max(small - slope * small_bytes, 0.0), large / 2)


def _per_byte(seconds: float, launch: float, nbytes: int) -> float:
    """Seconds per byte of a call without its launch."""
    return max(seconds - launch, 0.05 * seconds) / nbytes


def _rising(points: list[tuple[float, float]]) -> Curve:
    """More arithmetic is never faster, so a dip is noise."""
    curve: Curve = []
    for intensity, per_byte in points:
        curve.append([intensity, max([per_byte, *(known for _, known in curve)])])
    return curve
