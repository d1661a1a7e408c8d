"""Checks of token ids and masks, and the compact ragged form that runs inside."""

from __future__ import annotations

from typing import Any

import torch

from graphwright.ir.errors import CapacityError, InputError
from graphwright.runtime.transfers import upload


def same_device(one: torch.device, other: torch.device) -> bool:
    """Whether two devices are one; ``cuda`` is ``cuda:0``."""
    return one.type == other.type and (one.index or 0) == (other.index or 0)


def check_ids(ids: Any, program: Any, where: str) -> torch.Tensor:
    """Return ``ids`` as int64 ``[B, T]`` or raise what is wrong with it.

    Raises:
        InputError: not an integer tensor of two dimensions, an empty batch or prompt, another device
            than the program's, or a token outside the vocabulary.
    """
    if not isinstance(ids, torch.Tensor):
        raise InputError(
            f"token ids must be a torch.Tensor, got {type(ids).__name__}",
            where=where,
            hint="tokenize with return_tensors='pt'",
        )
    if ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool:
        raise InputError(
            f"token ids must be integers, got {ids.dtype}", where=where, hint="cast with .long()"
        )
    if ids.dim() != 2:
        raise InputError(
            f"token ids must have shape [batch, tokens], got {tuple(ids.shape)}",
            where=where,
            hint="add the batch dimension with ids[None]",
        )
    if ids.shape[0] == 0:
        raise InputError("the batch is empty (batch 0)", where=where, hint="pass at least one sequence")
    if ids.shape[1] == 0:
        raise InputError(
            "the prompt is empty (0 tokens)", where=where, hint="pass at least one token, e.g. bos"
        )
    if not same_device(ids.device, program.device):
        raise InputError(
            f"token ids are on {ids.device}, the program runs on {program.device}",
            where=where,
            hint=f"move them with .to('{program.device}')",
        )
    low, high = (int(edge) for edge in ids.aminmax())
    if low < 0 or high >= program.vocab_size:
        raise InputError(
            f"token id {low if low < 0 else high} is outside the vocabulary of {program.vocab_size}",
            where=where,
            hint="use the tokenizer of this model, and a pad token that the model has",
        )
    return ids.long()


def check_mask(mask: Any, ids: torch.Tensor, where: str) -> torch.Tensor | None:
    """Return the mask as bool ``[B, T]``, or None when nothing is padded.

    Raises:
        InputError: the shape is not that of ``ids``, a value is not 0 or 1, a row has no token, or
            a row's tokens are not one run (padding may be on the left, on the right or on both sides).
    """
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):
        raise InputError(f"attention_mask must be a torch.Tensor, got {type(mask).__name__}", where=where)
    if mask.shape != ids.shape:
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}, the token ids have {tuple(ids.shape)}",
            where=where,
            hint="pass the mask that the tokenizer returned with these ids",
        )
    if not same_device(mask.device, ids.device):
        raise InputError(
            f"attention_mask is on {mask.device}, the token ids are on {ids.device}",
            where=where,
            hint=f"move it with .to('{ids.device}')",
        )
    keep = mask != 0
    if not bool(((mask == 1) | ~keep).all()):
        raise InputError("attention_mask has values other than 0 and 1", where=where)
    if bool(keep.all()):
        return None
    counts = keep.sum(1)
    if not bool((counts > 0).all()):
        row = int((counts == 0).nonzero()[0])
        raise InputError(
            f"row {row} of attention_mask is all zeros", where=where, hint="every sequence needs a token"
        )
    columns = torch.arange(keep.shape[1], device=keep.device)
    first = torch.where(keep, columns, keep.shape[1]).amin(1)
    last = torch.where(keep, columns, -1).amax(1)
    holes = last - first + 1 != counts
    if bool(holes.any()):
        raise InputError(
            f"row {int(holes.nonzero()[0])} of attention_mask has a hole (a 0 between two 1s)",
            where=where,
            hint="pad on the left or on the right only; if the mask was inferred from the pad token, "
            "pass attention_mask explicitly",
        )
    return keep


def check_position_ids(
    position_ids: Any, mask: torch.Tensor | None, start: torch.Tensor, tokens: int
) -> bool:
    """Whether ``position_ids`` are the ones the program uses: 0, 1, 2, ... over each row's real tokens.

    Args:
        position_ids: ``[B or 1, T]``.
        mask: bool ``[B, T]`` or None.
        start: ``[B]`` position of each row's first token of this call.
    """
    if not isinstance(position_ids, torch.Tensor) or position_ids.dim() != 2:
        return False
    if position_ids.shape[1] != tokens or position_ids.shape[0] not in (1, start.shape[0]):
        return False
    if mask is None:
        mask = torch.ones((start.shape[0], tokens), dtype=torch.bool, device=start.device)
    expected = start[:, None] + mask.long().cumsum(1) - 1
    return bool((~mask | (position_ids == expected)).all())


def compact_rows(ids: torch.Tensor, mask: torch.Tensor | None) -> list[list[int]]:
    """Each row's real tokens as a Python list; the loop and the drafters work on these."""
    rows: list[list[int]] = ids.tolist()
    if mask is None:
        return rows
    return [
        [token for token, kept in zip(row, keep, strict=True) if kept]
        for row, keep in zip(rows, mask.tolist(), strict=True)
    ]


def right_padded(rows: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as one right-padded int64 tensor ``[B, T]`` and their lengths ``[B]``."""
    width = max(len(row) for row in rows)
    tokens = upload([row + [0] * (width - len(row)) for row in rows], device)
    return tokens, upload([len(row) for row in rows], device)


def check_capacity(
    longest: int, new: int, max_positions: int | None, capacity: int | None, where: str
) -> None:
    """Raise a :class:`CapacityError` when the longest row plus its new tokens cannot fit."""
    limits = [(max_positions, "the model's positions"), (capacity, "the program's cache")]
    for limit, name in limits:
        if limit is not None and longest + new > limit:
            raise CapacityError(
                f"{longest} prompt tokens and {new} new ones do not fit {name} ({limit})",
                where=where,
                hint=f"shorten the prompt or ask for at most {max(limit - longest, 0)} new tokens",
            )
