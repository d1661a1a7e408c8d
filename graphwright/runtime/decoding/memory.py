"""Running out of memory: what it looks like, and giving back what the call held."""

from __future__ import annotations

import traceback
from typing import Any

import torch

from graphwright.ir.errors import OutOfMemoryError

#: What torch's allocator for CPUs, the system and CUDA's driver say; those errors have no class of their own.
_MESSAGES = ("not enough memory", "can't allocate memory", "cannot allocate memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that host or device memory has run out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _MESSAGES)


def free_memory(error: BaseException, program: Any) -> bool:
    """Drop what an interrupted call held, so that the memory can be used again.

    The traceback keeps every function's variables alive, the caches among them; those of functions that
    have ended are cleared. The program lets go of the states that it keeps for later calls.

    Returns:
        Whether the program had any.
    """
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__context__
    dropped: bool = program.free_idle()
    if program.device.type == "cuda":
        torch.cuda.empty_cache()
    return dropped


def out_of_memory(error: BaseException, program: Any, where: str) -> OutOfMemoryError:
    """Free what the interrupted call held; the error to raise in place of ``error``."""
    free_memory(error, program)
    first = str(error).strip().splitlines()
    return OutOfMemoryError(
        f"memory ran out on {program.device}" + (f": {first[0]}" if first else ""),
        where=where,
        hint="use a smaller batch, a shorter prompt or a smaller max_new_tokens; or optimize with a budget "
        "that says how much memory there is, Budget(memory=...), or with a packed cache, quantize_cache. "
        "What this call held is free again, and the program can be used",
    )
