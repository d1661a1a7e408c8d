"""Configurations of decode attention, proposed by a model of the kernel's time.

Attention reads its store once, so its time is bytes over bandwidth if every multiprocessor reads its share
and enough of it is on the way. The model (:func:`seconds`) knows what stands in the way: the multiprocessor
with the most work, loads that wait for their latency, tiles that wait for one another, and what splits write
and combine. Shared memory and registers rule tiles out. Its constants are rough; they rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from graphwright.kernels.triton.devices import DeviceFacts

#: Rows of a tile: the least that tensor cores take, and what a step of many tokens uses.
FEW_ROWS, MANY_ROWS = 16, 32
# What is tried, the plainest first: each step away from it must gain this share of the time.
_BLOCKS, _STAGES, _WARPS = (64, 128, 32), (3, 2, 4), (4, 8)
_PLAIN = 0.002
# What is tried where none of these fits: heads that are wide, in float32, with little shared memory.
_SMALL_BLOCKS, _SMALL_STAGES = (32, 16), (2, 1)
_LEAST_CHUNK = 128
# Rows of unequal length share the device evenly only if programs are short, or many on each multiprocessor.
_MOST_CHUNK, _MANY_PROGRAMS = 8192, 8
# Partial results may be this share of the bytes that a step of one token reads, unless the device would be
# left without work: they are written, and read again, mostly from the cache.
_WORKSPACE_SHARE = 1 / 8
# Seconds: from asking memory to having the data; of a tile's chain of products, maxima and exponentials; of
# what a tile keeps the multiprocessor from doing for others; of starting and ending a program. Orders of
# magnitude of Ampere and later, not measurements.
_LATENCY, _TILE, _ISSUE, _PROGRAM = 7e-7, 3e-7, 1e-7, 1e-6
# One multiprocessor alone reads so many times its share of the bandwidth.
_ALONE = 3.0
# 32-bit registers of a multiprocessor and of a thread, and those of a thread for addresses and the like.
_REGISTERS = {"cuda": 65_536, "rocm": 131_072}
_THREAD_REGISTERS = {"cuda": 255, "rocm": 512}
_OTHER_REGISTERS = 40
# Shares of the slots in use for which time is added up: a store is allocated before it is full.
_FILLED = (1.0, 0.25)
# Chunks of one tile that are worth trying differ by this factor at least.
_APART = 1.5


@dataclass(frozen=True)
class AttendShape:
    """The sizes of one decode attention.

    Attributes:
        device: where it runs.
        batch, groups, group, tokens: B, key/value heads, query heads of each, tokens of the step.
        key_width, value_width: D and E.
        slots: of a dense ring, or tokens that all pages of a row hold.
        page: tokens of a page, 0 for a dense ring.
        key_bytes, value_bytes: stored bytes of a token of one head.
        dtype: of the queries.
        codecs: texts of the codecs of keys and values; empty for a dense ring.
    """

    device: DeviceFacts
    batch: int
    groups: int
    group: int
    tokens: int
    key_width: int
    value_width: int
    slots: int
    page: int
    key_bytes: float
    value_bytes: float
    dtype: torch.dtype
    codecs: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """What chunks are multiples of, besides tiles."""
        return self.page or 64

    @property
    def token_bytes(self) -> float:
        """Stored bytes of keys and values of a token of one head."""
        return self.key_bytes + self.value_bytes


@dataclass(frozen=True)
class AttendConfig:
    """How an attention is cut up.

    Attributes:
        block_m: rows (queries times heads of a group) of a tile.
        block_n: tokens of a tile.
        chunk: slots that one program reads.
        num_warps, num_stages: of the compiled kernel.
    """

    block_m: int
    block_n: int
    chunk: int
    num_warps: int
    num_stages: int


def rows(shape: AttendShape) -> int:
    """Rows of a tile."""
    return FEW_ROWS if shape.group * shape.tokens <= FEW_ROWS else MANY_ROWS


def candidates(shape: AttendShape) -> list[AttendConfig]:
    """Configurations by predicted time, the fastest first; never empty.

    Of each tile a few chunks are among them, far enough apart that trying them tells something.
    """
    return [replace(config, block_m=rows(shape)) for config in _candidates(replace(shape, tokens=1))]


@lru_cache(maxsize=1024)
def _candidates(one: AttendShape) -> list[AttendConfig]:
    found: list[tuple[float, AttendConfig]] = []
    for plainness, tile in enumerate(_tiles(one)):
        resident = max(1, _resident(one, tile))
        timed = sorted((seconds(one, c, resident), -c.chunk, c) for c in _cut(one, tile))
        kept: list[AttendConfig] = []
        for time, _, config in timed:
            if all(_apart(config.chunk, k.chunk) for k in kept):
                kept.append(config)
                found.append((time * (1 + _PLAIN * plainness), config))
    found.sort(key=lambda pair: pair[0])
    return [config for _, config in found]


def _apart(one: int, other: int) -> bool:
    return max(one, other) >= _APART * min(one, other)


# --- what is possible ----------------------------------------------------------------------------


def _tiles(shape: AttendShape) -> list[AttendConfig]:
    """Tiles that fit, chunks not chosen yet, plain ones first; the smallest one if none does."""
    small = _grid(shape, _SMALL_STAGES, _SMALL_BLOCKS, _WARPS)
    # In float32 there are no tensor cores: products unroll, and larger tiles spill kilobytes of registers.
    single = shape.dtype == torch.float32
    plain = _grid(shape, _STAGES, _SMALL_BLOCKS, (8,)) if single else _grid(shape, _STAGES, _BLOCKS, _WARPS)
    for tiles in (plain, small):
        if fitting := [tile for tile in tiles if _resident(shape, tile)]:
            return fitting
    return small[-1:]


def _grid(
    shape: AttendShape, stages: tuple[int, ...], blocks: tuple[int, ...], warps: tuple[int, ...]
) -> list[AttendConfig]:
    """Tiles of so many tokens of which pages are multiples; pages of 16 n tokens always have one."""
    whole = [n for n in blocks if not shape.page or shape.page % n == 0] or [math.gcd(shape.page, 16)]
    return [AttendConfig(MANY_ROWS, n, 0, w, s) for w in warps for s in stages for n in whole]


def shared_bytes(shape: AttendShape, config: AttendConfig) -> float:
    """Shared memory of a program, estimated: tiles on their way, and what changes its layout there."""
    width, size = max(shape.key_width, shape.value_width), shape.dtype.itemsize
    on_the_way = max(1, config.num_stages - 1) * config.block_n * shape.token_bytes
    decoded = config.block_n * width * size if shape.page else 0
    changing = max(decoded, MANY_ROWS * (shape.key_width + config.block_n) * size)
    # AMD's compiler reuses one for the other.
    return max(on_the_way, changing) if shape.device.kind == "rocm" else on_the_way + changing


def registers(shape: AttendShape, config: AttendConfig) -> float:
    """Registers of a thread, estimated with the larger tile of rows: sums, scores, queries, keys and values.

    Within a third of what Triton 3.9 takes for heads of 128 features in bfloat16, dense or of 4 bits.
    """
    n, size = config.block_n, shape.dtype.itemsize
    words = MANY_ROWS * (shape.value_width + n) + MANY_ROWS * shape.key_width * size / 4
    words += n * (shape.key_width + shape.value_width) * size / 4
    words += n * (shape.key_width + shape.value_width) / 2 if shape.page else 0  # codes beside levels
    copies = 3 if shape.device.kind == "rocm" else 1  # wavefronts hold the same operands
    return copies * words / _threads(shape, config) + _OTHER_REGISTERS


def _threads(shape: AttendShape, config: AttendConfig) -> int:
    return config.num_warps * (64 if shape.device.kind == "rocm" else 32)


def _resident(shape: AttendShape, config: AttendConfig) -> int:
    """Programs that a multiprocessor runs at once; 0 if the tile does not fit."""
    kind, used, shared = shape.device.kind, registers(shape, config), shared_bytes(shape, config)
    if used > _THREAD_REGISTERS[kind] or shared > shape.device.shared_memory:
        return 0
    by_registers = _REGISTERS[kind] / (used * _threads(shape, config))
    return max(1, int(min(by_registers, shape.device.shared_memory / shared)))


def _cut(shape: AttendShape, tile: AttendConfig) -> list[AttendConfig]:
    """A tile with every chunk that is worth a look: so many halves of a program for each multiprocessor."""
    count, step = shape.device.multiprocessors, math.lcm(shape.step, tile.block_n)
    units = max(1, -(-shape.slots // step))
    parts = {min(units, max(1, halves * count // (2 * _heads(shape)))) for halves in range(1, 33)}
    chunks = sorted({step * -(-units // n) for n in parts}, reverse=True)
    chunks = [c for c in chunks if c >= min(_LEAST_CHUNK, step * units)] or [-(-_LEAST_CHUNK // step) * step]
    configs = [replace(tile, chunk=chunk) for chunk in chunks]
    # Filling the device comes first: an idle multiprocessor costs more than partial results.
    configs = [c for c in configs if programs(shape, c) >= count] or configs[-1:]
    short = [c for c in configs if c.chunk <= _MOST_CHUNK or programs(shape, c) >= _MANY_PROGRAMS * count]
    configs = short or configs[-1:]
    return [c for c in configs if workspace_share(shape, c) <= _WORKSPACE_SHARE] or configs[:1]


# --- what it takes -------------------------------------------------------------------------------


def splits(shape: AttendShape, config: AttendConfig) -> int:
    """Programs that share a row's slots."""
    return max(1, -(-shape.slots // config.chunk))


def programs(shape: AttendShape, config: AttendConfig) -> int:
    """Programs of a step of one token."""
    return _heads(shape) * splits(shape, config)


def _heads(shape: AttendShape) -> int:
    return shape.batch * shape.groups * -(-shape.group // rows(replace(shape, tokens=1)))


def workspace_share(shape: AttendShape, config: AttendConfig) -> float:
    """Bytes of partial results over bytes read, in a step of one token."""
    if splits(shape, config) == 1:
        return 0.0
    return _partial_bytes(shape) / (config.chunk * shape.token_bytes)


def _partial_bytes(shape: AttendShape) -> int:
    """Of one split of one group: float32 results with their log-sum-exp."""
    return 4 * shape.group * (shape.value_width + 1)


def seconds(shape: AttendShape, config: AttendConfig, resident: int | None = None) -> float:
    """Predicted time of steps of one token, added up over a store that is full and one that is not yet.

    Args:
        shape, config: the attention and how it is cut up.
        resident: programs that a multiprocessor runs at once; worked out if not given.
    """
    resident = resident or max(1, _resident(shape, config))
    used = [max(1, round(shape.slots * share)) for share in _FILLED]
    return sum(_reading(shape, config, n, resident) + _combining(shape, config, n) for n in used)


def _reading(shape: AttendShape, config: AttendConfig, used: int, resident: int) -> float:
    """Of the multiprocessor with the most programs; and all of it is never faster than memory."""
    device, heads = shape.device, _heads(shape)
    most = -(-heads * -(-used // config.chunk) // device.multiprocessors)
    tile = config.block_n * shape.token_bytes
    # What a program draws: bytes on their way over the latency, and no more than its tiles take.
    ahead = config.num_stages - 1 or 0.5  # with one stage, loads and products take turns
    one = min(ahead * tile / _LATENCY, tile / (_TILE * (1 + config.block_n / 256)))
    rate = min(
        _ALONE * device.bandwidth / device.multiprocessors,
        min(most, resident) * one,
        tile / (_ISSUE * (1 + config.block_n / 64)),
    )
    busiest = most * min(config.chunk, used) * shape.token_bytes / rate
    everything = heads * used * shape.token_bytes / device.bandwidth
    return max(busiest, everything) + math.ceil(most / resident) * _PROGRAM


def _combining(shape: AttendShape, config: AttendConfig, used: int) -> float:
    """Writing partial results and reading them again; a program combines all of one head."""
    count = -(-used // config.chunk)
    if count == 1:
        return 0.0
    device, nbytes = shape.device, shape.batch * shape.groups * count * _partial_bytes(shape)
    through = 2 * nbytes / device.bandwidth
    alone = count * _partial_bytes(shape) / shape.group
    return through + alone * device.multiprocessors / (_ALONE * device.bandwidth)
