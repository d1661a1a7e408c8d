"""The C++ provider: vectorized CPU kernels, built once with the system's compiler.

What a kernel takes is declared here; the arithmetic is in the C++ files. All of them take float32 and
bfloat16 and give a row the same bits whatever else is in the batch or the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphwright.kernels.cpp import build
from graphwright.kernels.cpp.packed import supports_packed_attention
from graphwright.kernels.cpp.prefix import supports_prefix_attention
from graphwright.kernels.cpp.sparse import lists_reason, supports_choose_pages, supports_score_pages
from graphwright.kernels.registry import implements_compiled, register_provider

PROVIDER = "cpp"
DTYPES = (torch.float32, torch.bfloat16)

register_provider(PROVIDER, ("cpu",), build.available)


def _dtype_reason(*tensors: torch.Tensor | None) -> str | None:
    present = [t for t in tensors if t is not None]
    dtypes = {t.dtype for t in present}
    if len(dtypes) > 1:
        return f"the inputs have several dtypes: {', '.join(sorted(map(str, dtypes)))}"
    if not dtypes <= set(DTYPES):
        return f"{next(iter(dtypes))} is not float32 or bfloat16"
    return None


def supports_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> str | None:
    """None when ``linear`` takes these, else the reason."""
    return supports_linear_group(x, [weight], [bias])


def supports_linear_group(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> str | None:
    """None when ``linear_group`` takes these, else the reason."""
    if any(w.dim() != 2 or (w.stride(1) != 1 and w.shape[1] != 1) for w in weights):
        return "a weight is not row-major [N, K]"
    return _dtype_reason(x, *weights, *biases)


def supports_routed_linear(
    x: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    transposed: bool = False,
) -> str | None:
    """None when ``routed_linear`` takes these, else the reason."""
    if x.stride(2) != 1 and x.shape[2] != 1:
        return "the last dimension of x has a stride"
    if weight.stride(2) != 1 and weight.shape[2] != 1:
        return "the last dimension of the experts' weights has a stride"
    if index.dtype != torch.int64:
        return f"the experts' numbers are {index.dtype}, not int64"
    return _dtype_reason(x, weight, bias)


def supports_cache_append(
    store: torch.Tensor, new: torch.Tensor, lengths: torch.Tensor, counts: torch.Tensor
) -> str | None:
    """None when ``cache_append`` takes these, else the reason."""
    return _store_reason(store) or _dtype_reason(store, new)


def _store_reason(store: torch.Tensor) -> str | None:
    return None if store.stride(3) == 1 or store.shape[3] == 1 else "the cache's last dimension has a stride"


def supports_cache_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    window: int = 0,
    pages: torch.Tensor | None = None,
    chosen: torch.Tensor | None = None,
    **_: Any,
) -> str | None:
    """None when ``cache_attention`` takes these, else the reason."""
    stores = _store_reason(keys) or _store_reason(values) or _dtype_reason(q, keys, values)
    return stores or lists_reason(pages, chosen, window)


def supports_append_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    **_: Any,
) -> str | None:
    """None when ``append_attention`` takes these, else the reason."""
    return _store_reason(keys) or _store_reason(values) or _dtype_reason(q, k, v, keys, values)


implements_compiled("linear", PROVIDER, supports_linear)
implements_compiled("linear_group", PROVIDER, supports_linear_group)
implements_compiled("routed_linear", PROVIDER, supports_routed_linear)
implements_compiled("cache_append", PROVIDER, supports_cache_append)
implements_compiled("cache_attention", PROVIDER, supports_cache_attention)
implements_compiled("append_attention", PROVIDER, supports_append_attention)
implements_compiled("packed_attention", PROVIDER, supports_packed_attention)
implements_compiled("score_pages", PROVIDER, supports_score_pages)
implements_compiled("choose_pages", PROVIDER, supports_choose_pages)
implements_compiled("prefix_attention", PROVIDER, supports_prefix_attention)
