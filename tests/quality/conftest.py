"""One captured model for all tests of quality, and nothing measured before each test."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphwright.optimizer.quality import store
from tests.quality.rounded_cache import Lab


@pytest.fixture(scope="session")
def captured_lab() -> Lab:
    """Three layers of a tiny Llama; captured once."""
    return Lab(layers=3)


@pytest.fixture
def lab(captured_lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Lab:
    """The captured model with nothing measured yet."""
    # Not the environment variable: the kernels that are built already stay in use.
    monkeypatch.setattr(store, "cache_folder", lambda: tmp_path / "cache")
    captured_lab.lowered = 0
    return captured_lab
