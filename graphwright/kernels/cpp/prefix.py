"""Which shared prefixes the C++ kernel attends over."""

from __future__ import annotations

from typing import Any

import torch


def supports_prefix_attention(
    q: torch.Tensor,
    prefix_keys: torch.Tensor,
    prefix_values: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    **_: Any,
) -> str | None:
    """None when ``prefix_attention`` takes these, else the reason."""
    stores = (prefix_keys, prefix_values, keys, values)
    if any(store.stride(3) != 1 and store.shape[3] != 1 for store in stores):
        return "the cache's last dimension has a stride"
    dtypes = {x.dtype for x in (q, *stores)}
    if len(dtypes) > 1:
        return f"the inputs have several dtypes: {', '.join(sorted(map(str, dtypes)))}"
    if q.dtype not in (torch.float32, torch.bfloat16):
        return f"{q.dtype} is not float32 or bfloat16"
    return None
