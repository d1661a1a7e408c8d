"""What tests of kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import numpy
import pytest
import torch


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New memory holds NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.fixture
def fair_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles are multiplied in float64 and rounded to float32.

    The interpreter's own products are numpy's, whose last bit depends on a row's place in the tile. That of
    the GPU's instruction does not; everything around it (blocks, splits, their order) is tested here.
    """
    monkeypatch.setattr(numpy, "matmul", lambda a, b, dtype: (a.astype("f8") @ b.astype("f8")).astype(dtype))
