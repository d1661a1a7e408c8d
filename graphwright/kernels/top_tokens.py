"""The likeliest tokens of rows of logits, for drafters and trees."""

from __future__ import annotations

import torch
from torch import Tensor

from graphwright.ir.errors import InputError
from graphwright.kernels.cpp import DTYPES, build

MAX_TOP_TOKENS = 16


def top_tokens(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row of logits.

    On a CPU the C++ library reads a row twice; elsewhere, and where the library cannot be built, PyTorch
    sorts it.

    Args:
        logits: ``[N, V]``, without NaNs.
        k: how many, from 1 to 16 and at most V.

    Returns:
        ``(ids, log_probs)``, both ``[N, k]``: the entries' columns (int64) in descending order of their
        logits, of equal ones the lower column first, and their log-softmax over the row (float32).

    Raises:
        InputError: logits of another shape or not of a floating-point type, or a k that is out of range.
    """
    if logits.dim() != 2 or not logits.is_floating_point():
        raise InputError(
            f"logits are {logits.dtype} {list(logits.shape)}",
            where="top_tokens",
            hint="pass floating-point logits [N, V]",
        )
    most = min(MAX_TOP_TOKENS, logits.shape[1])
    if not 1 <= k <= most:
        raise InputError(
            f"k is {k} for rows of {logits.shape[1]}", where="top_tokens", hint=f"pass a k from 1 to {most}"
        )
    if logits.device.type == "cpu" and logits.dtype in DTYPES and build.available()[0]:
        ids, log_probs = torch.ops.graphwright_cpp.top_tokens(logits, k)
        return ids, log_probs
    return _sorted(logits, k)


def _sorted(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same by a stable sort: ``torch.topk`` promises no order of equal entries."""
    values, ids = logits.float().sort(dim=-1, descending=True, stable=True)
    return ids[:, :k].contiguous(), values[:, :k] - values.logsumexp(dim=-1, keepdim=True)
