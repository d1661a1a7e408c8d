"""What the kernels of a target do with packed caches, told to the cost model, which does not know kernels."""

from __future__ import annotations

from typing import Any

from graphwright.cost_model.streaming import StoreKernels, register_store_kernels
from graphwright.cost_model.target import Target
from graphwright.ir.codecs import PageShape
from graphwright.ir.selectors import parse_selector
from graphwright.kernels.registry import kernels

_TRITON = "triton"


def kernel_family(target: Target) -> str:
    """The family of kernels that reads packed caches on a target, as ``annotations["decode_kernels"]``."""
    return "cpp" if target.kind == "cpu" else _TRITON


def _supports(**arguments: Any) -> str | None:
    """Why no Triton kernel runs a ``packed_attention``; None if one does, on a GPU of this kind."""
    for kernel in kernels("packed_attention"):
        if kernel.provider == _TRITON:
            return kernel.supports(**arguments)
    from graphwright.kernels.triton import installed

    return installed() or "Triton has no kernel for packed_attention"


def _packs(codec: str, shape: PageShape) -> bool:
    """Whether Triton kernels pack pages, in one launch."""
    from graphwright.kernels.triton import installed

    if installed() is not None:
        return False
    from graphwright.kernels.triton.encode import encode_obstacle

    return encode_obstacle(codec, shape) is None


def _scores(selector: str) -> bool:
    """Whether a Triton kernel scores the pages of a selector."""
    return parse_selector(selector).in_kernels


register_store_kernels(
    _TRITON,
    # An attention is split along its keys, and its parts are combined.
    StoreKernels(
        _supports, _packs, attention_launches=2, turning_launches=1, joins_rotary=True, scores=_scores,
        chooses=True,
    ),
)  # fmt: skip
