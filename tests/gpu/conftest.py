"""What tests on a GPU share."""

from __future__ import annotations

from collections.abc import Iterator

import numpy
import pytest
import torch

from tests.gpu.support import REHEARSED


@pytest.fixture(autouse=True)
def _products_of_a_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter a row's product depends on its place in the tile, by numpy's order of sums."""

    def product(a: numpy.ndarray, b: numpy.ndarray, dtype: object = None) -> numpy.ndarray:
        return (a.astype("f8") @ b.astype("f8")).astype(dtype or numpy.result_type(a, b))

    if REHEARSED:
        monkeypatch.setattr(numpy, "matmul", product)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New memory holds NaN, or the largest integer: what a kernel does not write shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)  # libraries may refuse; kernels here do not
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before
