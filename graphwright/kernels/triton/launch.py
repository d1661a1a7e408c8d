"""One launch of a Triton kernel as data: it can be run, or recorded to be compiled without a GPU.

The Python side of every kernel allocates its results, builds launches and runs them. On tensors of the
``meta`` device inside of :func:`recording` nothing runs: the launches are collected, with the very types
and constants that a run would have, and :mod:`graphwright.kernels.triton.ahead` compiles them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

_RECORD: ContextVar[list[Launch] | None] = ContextVar("graphwright_launches", default=None)
# Named although it is the default of today: later versions of Triton change it.
_OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        kernel: a ``triton.jit`` function.
        grid: up to three numbers of programs.
        arguments: run-time arguments by name, in the kernel's order: tensors, tuples of tensors, numbers
            and None.
        constants: ``tl.constexpr`` arguments by name; device functions among them.
        num_warps, num_stages: of the compiled kernel.
        label: the variant in a few words, for tables: ``attend d128 g4 m16 int4/int4``.
        options: further options of the compiler.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    label: str = ""
    options: Mapping[str, Any] = field(default_factory=lambda: dict(_OPTIONS))

    def run(self) -> None:
        """Launch, or record."""
        record = _RECORD.get()
        if record is not None:
            record.append(self)
            return
        if 0 in self.grid:
            return
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device_of(next(tensor for _, tensor in flat_tensors(self.arguments))):
            self.kernel[self.grid](
                **self.arguments,
                **self.constants,
                num_warps=self.num_warps,
                num_stages=self.num_stages,
                **self.options,
            )


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect the launches of the calls inside instead of running them; their results are not computed."""
    launches: list[Launch] = []
    token = _RECORD.set(launches)
    try:
        yield launches
    finally:
        _RECORD.reset(token)


def flat_tensors(arguments: Mapping[str, Any]) -> Iterator[tuple[tuple[Any, ...], torch.Tensor]]:
    """The tensors of a launch's arguments by path: ``("q",)`` or ``("key_codes", 0)``."""
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            yield (name,), value
        elif isinstance(value, tuple):
            for index, item in enumerate(value):
                if isinstance(item, torch.Tensor):
                    yield (name, index), item
