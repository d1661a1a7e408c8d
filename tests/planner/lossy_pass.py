"""A world with a lossy pass in it: registered while a test runs, and priced as if it saved time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from graphwright.optimizer.planner.alternatives import Alternative
from graphwright.optimizer.planner.prices import PriceList
from graphwright.passes import base
from graphwright.passes.place_cache import PlaceCache
from tests.quality.rounded_cache import RoundCache


def register_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only placing a cache and rounding what enters it; a rounded layer takes a quarter of the time."""
    monkeypatch.setattr(base, "_REGISTRY", {PlaceCache.name: PlaceCache, RoundCache.name: RoundCache})
    priced = PriceList._option

    def cheaper(self: Any, index: int, alternative: Alternative, layer: Any) -> Any:
        option = priced(self, index, alternative, layer)
        if not alternative.lossy:
            return option
        return replace(option, seconds={k: s / 4 for k, s in option.seconds.items()})

    monkeypatch.setattr(PriceList, "_option", cheaper)
