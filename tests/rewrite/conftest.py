"""Captures that tests of the rewrites share: a capture takes seconds, a copy milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from graphwright.ir.canonicalize import CanonicalizationReport, canonicalize
from graphwright.ir.graph import Graph
from graphwright.optimizer.capture import capture
from tests.architectures import tiny_model


@dataclass(frozen=True)
class Captured:
    """One tiny model: stock, as captured and canonical. Tests must not edit the graphs: see ``copy``."""

    model: PreTrainedModel
    raw: Graph
    canonical: Graph
    report: CanonicalizationReport


@pytest.fixture(scope="session")
def captured() -> Callable[..., Captured]:
    """``captured(name, **arguments of tiny_model)``, cached for the session."""
    cache: dict[Any, Captured] = {}

    def make(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Captured:
        key = (name, dtype, repr(sorted(options.items())))
        if key not in cache:
            model = tiny_model(name, dtype, **options)
            raw = capture(model)
            canonical = raw.copy()
            report = canonicalize(canonical)
            cache[key] = Captured(model, raw, canonical, report)
        return cache[key]

    return make
