"""How a kernel is cut up on the GPU at hand: what was found fastest there, else what is predicted to be.

Nothing but ``block_m`` depends on the tokens of a step (of up to 64): a token has the same bits in a
verification of many as in a step of its own. Chunks do depend on the batch and on the slots that are
allocated, and those of prompts on their tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import lru_cache

from graphwright.kernels.triton.devices import DeviceFacts, device_facts, planned_device, planning_for
from graphwright.kernels.triton.proposals import AttendConfig, AttendShape, candidates, rows

__all__ = [
    "MAX_STEP",
    "AttendConfig",
    "AttendShape",
    "DeviceFacts",
    "asked",
    "attend_config",
    "candidates",
    "device_facts",
    "forget",
    "planned_device",
    "planning_for",
    "trying",
]

_TRYING: ContextVar[tuple[AttendShape, AttendConfig] | None] = ContextVar("graphwright_trying", default=None)
_ASKED: ContextVar[list[AttendShape] | None] = ContextVar("graphwright_asked", default=None)


#: Tokens of a step that drafts are verified in; more are a prompt.
MAX_STEP = 64


def attend_config(shape: AttendShape) -> AttendConfig:
    """The configuration of an attention: what was found fastest on this GPU, else the first candidate.

    Prompts fill the device with their own rows, and have fewer splits.
    """
    config = _step_config(shape)
    return config if shape.tokens <= MAX_STEP else replace(config, chunk=_prompt_chunk(shape, config))


def _prompt_chunk(shape: AttendShape, config: AttendConfig) -> int:
    """Slots of a split where the rows alone are many programs: partial results are written for each."""
    programs = shape.batch * shape.groups * -(-shape.group * shape.tokens // config.block_m)
    splits = max(1, 2 * shape.device.multiprocessors // programs)
    unit = math.lcm(config.block_n, shape.page or 1)
    return max(config.chunk, -(-shape.slots // (splits * unit)) * unit)


def _step_config(shape: AttendShape) -> AttendConfig:
    shapes, trial = _ASKED.get(), _TRYING.get()
    if shapes is not None:
        shapes.append(shape)
    if trial is not None and trial[0] == replace(shape, tokens=1):
        return replace(trial[1], block_m=rows(shape))
    return _chosen(shape)


@contextmanager
def trying(shape: AttendShape, config: AttendConfig) -> Iterator[None]:
    """Inside, attentions of this shape (tokens aside) use a configuration: how candidates are timed."""
    token = _TRYING.set((replace(shape, tokens=1), config))
    try:
        yield
    finally:
        _TRYING.reset(token)


@contextmanager
def asked() -> Iterator[list[AttendShape]]:
    """The shapes that configurations are asked for inside."""
    shapes: list[AttendShape] = []
    token = _ASKED.set(shapes)
    try:
        yield shapes
    finally:
        _ASKED.reset(token)


@lru_cache(maxsize=4096)
def _chosen(shape: AttendShape) -> AttendConfig:
    from graphwright.kernels.triton import tuning

    found = tuning.tuned(tuning.attend_key(shape))
    if found is None or not _is_legal(shape, found):
        return candidates(shape)[0]
    return replace(found, block_m=rows(shape))


def _is_legal(shape: AttendShape, config: AttendConfig) -> bool:
    """Whether the kernel takes it; a file may have been edited."""
    powers = all(n & (n - 1) == 0 for n in (config.block_n, config.num_warps))
    paged = not shape.page or shape.page % config.block_n == 0
    return powers and paged and config.chunk % math.lcm(config.block_n, shape.page or 1) == 0


def forget() -> None:
    """Choose again, after something was tuned."""
    _chosen.cache_clear()
