"""Plain data: what JSON can hold, and whether it has the shape that is expected of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any


def plain(value: Any) -> Any:
    """``value`` as JSON types: enums as their value, tuples as lists, non-finite numbers as None."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    item = getattr(value, "item", None)  # numpy and torch scalars
    return plain(item()) if callable(item) else str(value)


def number(value: object) -> float | None:
    """``value`` if it is a finite number, else None; True and False are no numbers."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


@dataclass(frozen=True)
class Either:
    """A shape that any one of several shapes satisfies."""

    shapes: tuple[Any, ...]


#: A number; null stands for one that is not finite.
NUMBER = Either((int, float, None))


def misfit(data: object, shape: Any, where: str = "") -> str:
    """Where and how ``data`` departs from ``shape``, in words; empty if it does not.

    Args:
        data: what ``json.loads`` returned.
        shape: a type; None; a frozenset of the allowed values; ``[shape]`` for a list of such items;
            :class:`Either`; or a dictionary of shapes by key, in which a trailing ``?`` makes a key
            optional and ``*`` stands for all other keys (without it there may be none).
        where: the path of ``data`` in the document.
    """
    here = where or "the document"
    if isinstance(shape, Either):
        problems = [misfit(data, one, where) for one in shape.shapes]
        # The shape that was followed deepest into the data is the one that was meant.
        return "" if "" in problems else max(problems, key=lambda text: len(text.split(" is ")[0]))
    if isinstance(shape, frozenset):
        known = isinstance(data, str) and data in shape
        return "" if known else f"{here} is {_short(data)}, not one of {', '.join(sorted(shape))}"
    if isinstance(shape, list):
        if not isinstance(data, list):
            return f"{here} is {_short(data)}, not a list"
        return next(filter(None, (misfit(d, shape[0], f"{where}[{i}]") for i, d in enumerate(data))), "")
    if isinstance(shape, dict):
        return _object_misfit(data, shape, where)
    if shape is None:
        return "" if data is None else f"{here} is {_short(data)}, not null"
    fits = isinstance(data, shape) and (shape is bool or not isinstance(data, bool))
    return "" if fits else f"{here} is {_short(data)}, not a {shape.__name__}"


def _object_misfit(data: object, shape: dict[str, Any], where: str) -> str:
    if not isinstance(data, dict):
        return f"{where or 'the document'} is {_short(data)}, not an object"
    shapes = {key.removesuffix("?"): one for key, one in shape.items() if key != "*"}
    for key in shape:
        if key != "*" and not key.endswith("?") and key not in data:
            return f"{where}.{key} is missing".removeprefix(".")
    for key, value in data.items():
        path = f"{where}.{key}".removeprefix(".")
        if key not in shapes and "*" not in shape:
            return f"{path} is not a key of this schema"
        if problem := misfit(value, shapes.get(key, shape.get("*")), path):
            return problem
    return ""


def _short(data: object) -> str:
    text = repr(data)
    return text if len(text) <= 40 else f"{text[:37]}..."
