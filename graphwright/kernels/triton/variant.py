"""A launch as plain data: everything that decides what Triton compiles, and nothing that does not.

The process that plans may have Triton's interpreter on and no GPU; another process rebuilds the launch from
this data and compiles it. Of numbers and tensors only what Triton looks at is kept (the kind of an integer,
a tensor's dtype and alignment), so that equal data means one variant.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch

from graphwright.ir.errors import GraphwrightError
from graphwright.kernels.triton.launch import Launch

_ALIGNED = 16  # bytes; what Triton asks of pointers, and both allocators give
_SMALL = 2**31 - 1  # bytes; AMD's buffer instructions reach this far


class CompileError(GraphwrightError):
    """A Triton kernel cannot be compiled ahead of time."""


@dataclass(frozen=True)
class Pointer:
    """Stands for a tensor when Triton specializes a kernel.

    Attributes:
        dtype: of the tensor.
        address: in bytes, modulo 16.
        size: of its storage, in bytes.
    """

    dtype: torch.dtype
    address: int
    size: int

    def data_ptr(self) -> int:
        """The address."""
        return self.address

    def ptr_range(self) -> int:
        """The storage's bytes."""
        return self.size


def describe(launch: Launch) -> dict[str, Any]:
    """What is compiled for a launch, as JSON-ready data.

    Raises:
        CompileError: an argument is of a type that no kernel takes.
    """
    arguments = {name: _argument(value, name) for name, value in launch.arguments.items()}
    constants = {name: _constant(value, name) for name, value in launch.constants.items()}
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, **launch.options}
    return {
        "kernel": _name(launch.kernel),
        "arguments": arguments,
        "constants": constants,
        "options": options,
    }


def rebuild(data: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The kernel and the keyword arguments of a call of it, from :func:`describe`'s data."""
    values = {**data["arguments"], **data["constants"]}
    return _function(data["kernel"]), {**{k: _value(v) for k, v in values.items()}, **data["options"]}


def _name(function: Any) -> str:
    inner = function.fn
    return f"{inner.__module__}:{inner.__qualname__}"


def _function(name: str) -> Any:
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _argument(value: Any, where: str) -> Any:
    """A run-time argument."""
    if isinstance(value, torch.Tensor):
        address = value.storage_offset() * value.element_size() % _ALIGNED
        small = value.untyped_storage().nbytes() <= _SMALL
        return {"tensor": str(value.dtype).removeprefix("torch."), "address": address, "small": small}
    if isinstance(value, tuple | list):
        return {"tuple": [_argument(item, where) for item in value]}
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return _integer(value)
    if isinstance(value, float):
        return 0.5  # numbers are never specialized
    raise CompileError(f"no kernel takes a {type(value).__name__}", where=where)


def _integer(value: int) -> int:
    """The integer that stands for all that Triton compiles alike: 1, and by width and divisibility by 16."""
    if value == 1:
        return 1
    rest = 0 if value % _ALIGNED == 0 else 3
    for bits in (31, 63):
        if -(2**bits) <= value < 2**bits:
            return rest if bits == 31 else 2**40 + rest
    return 2**63 + rest


def _constant(value: Any, where: str) -> Any:
    """A ``tl.constexpr`` argument."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return {"tuple": [_constant(item, where) for item in value]}
    if callable(getattr(value, "fn", None)):
        return {"function": _name(value)}
    if type(value).__module__.startswith("triton.") and hasattr(value, "primitive_bitwidth"):
        return {"dtype": value.name}
    raise CompileError(f"a constant cannot be a {type(value).__name__}", where=where)


def _value(data: Any) -> Any:
    if not isinstance(data, dict):
        return data
    if "tensor" in data:
        size = 0 if data["small"] else _SMALL + 1
        return Pointer(getattr(torch, data["tensor"]), data["address"], size)
    if "tuple" in data:
        return tuple(_value(item) for item in data["tuple"])
    if "function" in data:
        return _function(data["function"])
    from triton import language

    return language.dtype(data["dtype"])
