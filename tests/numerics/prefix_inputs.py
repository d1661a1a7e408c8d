"""Inputs for attention over a shared prefix: steps whose rows continue one text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tests.numerics.inputs import Case, after_append, randn, step

#: Tokens of the prefix, and the step over what follows it.
PREFIXES: dict[str, tuple[int, dict[str, Any]]] = {
    "one-token": (200, dict(tokens=1, lengths=[20, 3, 0], slots=60)),
    "smollm2": (257, dict(tokens=8, lengths=[150, 20], counts=[8, 3], heads=(9, 3), slots=200)),
    "no-prefix": (0, dict(tokens=3, lengths=[9, 140], slots=200)),
    "one-row": (130, dict(tokens=5, lengths=[40], dims=(7, 5), slots=60)),
    "chunk-borders": (128, dict(tokens=2, lengths=[126, 0, 127], slots=300)),
    "unequal-dims": (33, dict(tokens=2, lengths=[14, 2], dims=(48, 20), heads=(4, 1), slots=30)),
    "tree": (140, dict(tokens=15, lengths=[12, 0], tree=True, slots=60)),
    "softcap": (60, dict(tokens=4, lengths=[6, 1], softcap=3.0, slots=40)),
    "sinks": (60, dict(tokens=4, lengths=[60, 0], counts=[4, 0], sinks=True, slots=80)),
    "many-rows": (70, dict(tokens=1, lengths=[5] * 17, heads=(4, 2), dims=(32, 32), slots=12)),
    "prefill": (300, dict(tokens=100, lengths=[30, 0], counts=[100, 77], heads=(4, 2), slots=140)),
}


def prefix_step(dtype: torch.dtype, shared: int, **options: Any) -> dict[str, Any]:
    """Arguments of ``prefix_attention``; slots that hold no token are NaN."""
    arguments = after_append(step(dtype, **options))
    groups, width = arguments["keys"].shape[1], arguments["keys"].shape[3]
    return dict(
        q=arguments.pop("q"),
        prefix_keys=randn(1, groups, shared, width, dtype=dtype),
        prefix_values=randn(1, groups, shared, arguments["values"].shape[3], dtype=dtype),
        **{**arguments, "positions": arguments["positions"] + shared},
    )


def prefix_cases(dtype: torch.dtype) -> Iterator[Case]:
    for name, (shared, options) in PREFIXES.items():
        yield name, prefix_step(dtype, shared, **options)


def unshared(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``cache_attention`` over stores that hold the prefix in every row."""
    rest = dict(arguments)
    batch = rest["q"].shape[0]
    for name in ("keys", "values"):
        prefix = rest.pop(f"prefix_{name}")
        rest[name] = torch.cat((prefix.expand(batch, -1, -1, -1), rest[name]), dim=2)
    shared = rest["keys"].shape[2] - arguments["keys"].shape[2]
    return {**rest, "lengths": rest["lengths"] + shared}
