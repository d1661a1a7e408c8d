"""Which packed stores the C++ kernel attends over; others are read by the op's reference body."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphwright.ir.codecs.fusible import fusion_obstacle
from graphwright.kernels.cpp.sparse import lists_reason


def supports_packed_attention(
    q: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    key_codec: str,
    value_codec: str,
    key_page: int,
    value_page: int,
    window: int = 0,
    pages: torch.Tensor | None = None,
    chosen: torch.Tensor | None = None,
    page: int = 0,
    first: int = 0,
    **_: Any,
) -> str | None:
    """None when ``packed_attention`` takes these, else the reason."""
    stores = _store_reason(q, keys, key_codec) or _store_reason(q, values, value_codec)
    lists = lists_reason(pages, chosen, window)
    if stores or lists or pages is None:
        return stores or lists
    own = {(key_page, keys[2].shape[2]), (value_page, values[2].shape[2])}
    if own != {(page, first)}:
        return f"the listed pages are of {page} tokens after {first}, the stores' are others"
    return None


def _store_reason(q: torch.Tensor, store: Sequence[torch.Tensor], codec: str) -> str | None:
    _, tail, first, *buffers = store
    if q.dtype not in (torch.float32, torch.bfloat16):
        return f"{q.dtype} is not float32 or bfloat16"
    if {tail.dtype, first.dtype} != {q.dtype}:
        return f"q is {q.dtype}, the newest tokens {tail.dtype} and the first {first.dtype}"
    if any(x.stride(-1) != 1 and x.shape[-1] != 1 for x in (tail, first, *buffers)):
        return "the last dimension of a packed store's tensor has a stride"
    return fusion_obstacle(codec)
