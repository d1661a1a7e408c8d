"""Attention over a shared prefix in Triton's interpreter, against the op's reference body."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphwright.ir.ops import SEMANTIC_OPS
from graphwright.kernels import registry
from graphwright.kernels.triton import attention
from graphwright.kernels.triton.configs import AttendConfig, AttendShape
from tests.numerics.prefix_inputs import prefix_step
from tests.numerics.test_kernels import wide

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "several-splits": (200, dict(tokens=1, lengths=[20, 3, 0], slots=140, dims=(32, 32))),
    "short-prefix": (3, dict(tokens=5, lengths=[9, 2], counts=[5, 2], heads=(4, 2), slots=20, dims=(16, 16))),
    "no-prefix": (0, dict(tokens=2, lengths=[4], heads=(2, 1), slots=8, dims=(16, 16))),
    "tree": (70, dict(tokens=7, lengths=[12, 0], tree=True, heads=(2, 1), slots=20, dims=(16, 16))),
    "options": (
        40,
        dict(tokens=2, lengths=[6, 0], counts=[2, 0], softcap=3.0, sinks=True, slots=10, dims=(24, 16)),
    ),
    "prompt": (10, dict(tokens=64, lengths=[0], heads=(1, 1), slots=64, dims=(16, 16))),
}


@pytest.fixture(autouse=True)
def _several_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short chunks, so that few tokens are split."""
    own = attention.attend_config

    def short(shape: AttendShape) -> AttendConfig:
        found = own(shape)
        return AttendConfig(found.block_m, 64, 128, found.num_warps, found.num_stages)

    monkeypatch.setattr(attention, "attend_config", short)


def triton(**arguments: Any) -> torch.Tensor:
    """The kernel's result; fails where another would run."""
    kernel = registry.select("prefix_attention", "cpu", ["triton"], **arguments)
    assert kernel.provider == "triton", kernel.reason
    result: torch.Tensor = kernel.op(**arguments)
    return result


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name: str) -> None:
    shared, options = CASES[name]
    arguments = prefix_step(torch.float32, shared, **options)
    expected = SEMANTIC_OPS["prefix_attention"].overload(**wide(arguments))
    found = triton(**arguments)
    assert found.dtype == torch.float32 and found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-5)
