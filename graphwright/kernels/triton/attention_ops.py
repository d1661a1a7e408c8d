"""The semantic ops that the attention template runs, and what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphwright.ir.packed_ops import page_shape
from graphwright.ir.sparse_ops import SPARSE_TOKENS
from graphwright.kernels.registry import implements
from graphwright.kernels.triton.append import cache_append
from graphwright.kernels.triton.attention import Attention, Pages, Side, Step
from graphwright.kernels.triton.listed_attention import ListedAttention, Lists
from graphwright.kernels.triton.tiles import obstacle

PROVIDER = "triton"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_WIDTH = 256
#: Query tokens that a tree mask has bits for.
MAX_TREE_TOKENS = 63


def cache_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    tree: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    pages: torch.Tensor | None = None,
    chosen: torch.Tensor | None = None,
    page: int = 0,
    first: int = 0,
) -> torch.Tensor:
    """The semantic op ``cache_attention``."""
    step = Step(positions, lengths, counts, tree, scale, window, softcap, sinks)
    if (lists := _lists(pages, chosen, page, first)) is not None:
        return ListedAttention(_rows(q), keys, values, step, lists=lists).run()
    return Attention(_rows(q), keys, values, step).run()


def packed_attention(
    q: torch.Tensor,
    keys: Sequence[torch.Tensor],
    key_constants: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    value_constants: Sequence[torch.Tensor],
    slots: torch.Tensor,
    positions: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    tree: torch.Tensor,
    key_codec: str,
    key_page: int,
    value_codec: str,
    value_page: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    pages: torch.Tensor | None = None,
    chosen: torch.Tensor | None = None,
    page: int = 0,
    first: int = 0,
) -> torch.Tensor:
    """The semantic op ``packed_attention``."""
    packed = Pages(
        Side.of(keys, key_constants, key_codec, key_page),
        Side.of(values, value_constants, value_codec, value_page),
        keys[0],
        (keys[2], values[2]),
        key_page,
    )
    step = Step(positions, lengths, counts, tree, scale, window, softcap, sinks)
    if (lists := _lists(pages, chosen, page, first)) is not None:
        return ListedAttention(_rows(q), keys[1], values[1], step, packed, lists=lists).run()
    return Attention(_rows(q), keys[1], values[1], step, packed).run()


def _lists(pages: torch.Tensor | None, chosen: torch.Tensor | None, page: int, first: int) -> Lists | None:
    """The lists that are read; steps that only prompts have read everything."""
    if pages is None or chosen is None or pages.shape[1] > SPARSE_TOKENS:
        return None
    return Lists(pages.contiguous(), chosen.contiguous(), page, first)


def _rows(q: torch.Tensor) -> torch.Tensor:
    return q if q.stride(3) == 1 or q.shape[3] == 1 else q.contiguous()


def supports_cache_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tree: torch.Tensor,
    window: int = 0,
    pages: torch.Tensor | None = None,
    **_: Any,
) -> str | None:
    """None when the template takes these, else the reason."""
    return (
        _window_reason(window, pages)
        or _dtype_reason(q, keys, values)
        or _width_reason(q.shape[3], values.shape[3])
        or _contiguous_reason(keys, values)
        or _tree_reason(tree)
    )


def supports_packed_attention(
    q: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    key_codec: str,
    key_page: int,
    value_codec: str,
    value_page: int,
    window: int = 0,
    pages: torch.Tensor | None = None,
    page: int = 0,
    first: int = 0,
    **_: Any,
) -> str | None:
    """None when the template takes these, else the reason."""
    tails, firsts = (keys[1], values[1]), (keys[2], values[2])
    return (
        _window_reason(window, pages)
        or _listed_reason(pages, page, first, key_page, keys[2].shape[2])
        or _dtype_reason(q, *tails, *firsts)
        or _width_reason(q.shape[3], values[1].shape[3])
        or page_reason(key_page, value_page, firsts, tails)
        or _eighths_reason(q.shape[3], values[1].shape[3])
        or obstacle(key_codec, page_shape(tails[0], key_page))
        or obstacle(value_codec, page_shape(tails[1], value_page))
    )


def _window_reason(window: int, pages: torch.Tensor | None) -> str | None:
    return "lists of pages do not go with a window" if window and pages is not None else None


def _listed_reason(
    pages: torch.Tensor | None, page: int, first: int, packed_page: int, packed_first: int
) -> str | None:
    """Why lists are of other pages than the store packs; None if they are not."""
    if pages is None or (page, first) == (packed_page, packed_first):
        return None
    return f"listed pages have {page} tokens after {first}, packed ones {packed_page} after {packed_first}"


def page_reason(
    key_page: int, value_page: int, firsts: Sequence[torch.Tensor], tails: Sequence[torch.Tensor]
) -> str | None:
    """Why keys and values cannot be read page by page together; None if they can."""
    if key_page != value_page:
        return f"pages of keys have {key_page} tokens, those of values {value_page}"
    for name, (own, other) in (("first", firsts), ("newest", tails)):
        if own.shape[2] != other.shape[2]:
            return f"keys and values keep different numbers of {name} tokens"
    if key_page % 16:
        return f"pages of {key_page} tokens are not multiples of 16"
    return None


def _dtype_reason(*tensors: torch.Tensor) -> str | None:
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) > 1:
        return f"the inputs have several dtypes: {', '.join(sorted(map(str, dtypes)))}"
    found = next(iter(dtypes))
    return None if found in DTYPES else f"{found} is not float32, float16 or bfloat16"


def _width_reason(*widths: int) -> str | None:
    return f"a head of {max(widths)} features is above {MAX_WIDTH}" if max(widths) > MAX_WIDTH else None


def _eighths_reason(*widths: int) -> str | None:
    odd = next((w for w in widths if w % 8), None)
    return None if odd is None else f"a head of {odd} features is not a multiple of 8"


def _tree_reason(tree: torch.Tensor) -> str | None:
    columns = tree.shape[1]
    if isinstance(columns, int) and columns > MAX_TREE_TOKENS:
        return f"a tree of {columns} tokens is above the {MAX_TREE_TOKENS} that its mask has bits for"
    return None


def _contiguous_reason(*stores: torch.Tensor) -> str | None:
    return None if all(s.is_contiguous() for s in stores) else "a store is not contiguous"


def append_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    tree: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The semantic op ``append_attention``."""
    cache_append(keys, k, lengths, counts)
    cache_append(values, v, lengths, counts)
    return cache_attention(q, keys, values, positions, lengths, counts, tree, scale, window, softcap, sinks)


def supports_append_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tree: torch.Tensor,
    **_: Any,
) -> str | None:
    """None when the template takes these, else the reason."""
    return _dtype_reason(q, k, v) or supports_cache_attention(q, keys, values, tree)


implements("cache_attention", PROVIDER, supports_cache_attention)(cache_attention)
implements("append_attention", PROVIDER, supports_append_attention)(append_attention)
implements("packed_attention", PROVIDER, supports_packed_attention)(packed_attention)
