"""Teacher-forced passes over given tokens, and the cache object that forward() hands out."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from transformers import Cache

from graphwright.ir.errors import CapacityError, UnsupportedGenerationError
from graphwright.runtime.decoding.inputs import check_capacity, right_padded
from graphwright.runtime.decoding.memory import is_out_of_memory, out_of_memory
from graphwright.runtime.decoding.protocol import DecodingProgram


class ProgramCache(Cache):
    """An opaque handle on one sequence batch's state, for token-by-token loops over ``forward()``.

    It counts *columns* as stock caches do (padding included), while the state inside holds each row's
    real tokens only. When it is full it grows by replaying the tokens into a state twice as large, which
    gives the same numbers; so it does after a crop that a sliding window cannot follow.

    Attributes:
        prompts: tokens of each row that count as its prompt; None before there are any.
    """

    def __init__(self, program: DecodingProgram, batch: int) -> None:
        super().__init__(layers=[])
        self.program = program
        self.rows: list[list[int]] = [[] for _ in range(batch)]
        self.mask = torch.zeros((batch, 0), dtype=torch.bool, device=program.device)
        self.state: Any = None
        self.prompts: list[int] | None = None

    def reserve(self, new: list[list[int]], spare: int) -> None:
        """Make room for ``new[b]`` more tokens in each row, allocating ``spare`` beyond when it must grow."""
        program = self.program
        needed = max(len(row) + len(more) for row, more in zip(self.rows, new, strict=True))
        if self.state is not None and needed <= self.state.capacity:
            return
        room = max(needed + spare, 0 if self.state is None else 2 * self.state.capacity)
        if program.max_positions is not None:
            room = max(min(room, program.max_positions), needed)
        state = program.allocate(len(self.rows), room)
        if any(self.rows):
            state.end_prompt(self.prompts)
            program.prefill(state, *right_padded(self.rows, program.device))
        else:
            self.prompts = None
        self.state = state

    def end_prompt(self, prompts: list[int]) -> None:
        """What comes after the first ``prompts[b]`` tokens of each row counts as generated."""
        self.prompts = prompts
        self.state.end_prompt(prompts)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen so far, padding included."""
        return int(self.mask.shape[1])

    def crop(self, max_length: int) -> None:
        """Keep the first ``max_length`` columns; drop the last ``-max_length`` if negative."""
        columns = self.get_seq_length()
        keep = max_length if max_length > 0 else columns + max_length
        if keep < columns:
            self.mask = self.mask[:, :keep]
            lengths = self.mask.sum(1)
            try:
                if self.state is not None:
                    self.state.truncate(lengths)
            except CapacityError:  # a window has dropped what is needed again: replay at the next call
                self.state = None
            self.rows = [row[:length] for row, length in zip(self.rows, lengths.tolist(), strict=True)]
            if self.prompts is not None:
                self.prompts = [min(len(row), n) for row, n in zip(self.rows, self.prompts, strict=True)]

    def _refuse(self, name: str) -> NoReturn:
        raise UnsupportedGenerationError(
            f"a program's cache has no {name}",
            where="past_key_values",
            hint="hand it back to forward() unchanged, or start again from all tokens",
        )

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: only the program writes its cache."""
        self._refuse("update()")

    def reorder_cache(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: rows stay where they are (beam search is not supported)."""
        self._refuse("reorder_cache()")

    def batch_repeat_interleave(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: rows stay where they are."""
        self._refuse("batch_repeat_interleave()")

    def batch_select_indices(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: rows stay where they are."""
        self._refuse("batch_select_indices()")

    def reset(self) -> NoReturn:
        """Refused: start with a fresh forward() instead."""
        self._refuse("reset()")

    def __repr__(self) -> str:
        return f"ProgramCache(batch={len(self.rows)}, columns={self.get_seq_length()})"


def wanted_columns(columns: int, logits_to_keep: int | torch.Tensor) -> list[int]:
    """Which columns' logits are returned, in order, as transformers defines ``logits_to_keep``."""
    if isinstance(logits_to_keep, torch.Tensor):
        return torch.arange(columns)[logits_to_keep.cpu()].tolist()
    return list(range(columns))[slice(-logits_to_keep, None) if logits_to_keep else slice(None)]


def run_tokens(
    cache: ProgramCache,
    new: list[list[int]],
    mask: torch.Tensor,
    *,
    wanted: list[int],
    chunk: int,
    where: str,
    fixed: int | None = None,
    spare: int = 0,
    prompt: int | None = None,
) -> torch.Tensor:
    """Run each row's new tokens through the cache, ``chunk`` at a time, and commit them.

    Args:
        cache: the sequences so far; extended by the call.
        new: ``[B]`` rows of real tokens.
        mask: bool ``[B, T]``, where those tokens are in the caller's layout.
        wanted: the columns of that layout whose logits are returned.
        chunk: tokens a step.
        fixed: most tokens a row may have, if the caller set a limit.
        spare: slots to allocate beyond what is needed now.
        prompt: of tokens that begin their rows, how many count as a prompt; None: all of them.

    Returns:
        ``[B, len(wanted), V]``; zeros at padded positions.
    """
    program = cache.program
    longest = max(len(row) + len(more) for row, more in zip(cache.rows, new, strict=True))
    check_capacity(longest, 0, program.max_positions, fixed, where)
    try:
        cache.reserve(new, spare)
        out = _run_chunks(cache, new, mask, wanted, chunk, prompt)
    except BaseException as error:
        # An interrupted pass must not leave half of its tokens in the caller's cache. A window may
        # already have dropped what going back needs, so the next call replays the tokens instead.
        cache.state = None
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error, program, where) from None
    cache.rows = [row + more for row, more in zip(cache.rows, new, strict=True)]
    cache.mask = torch.cat((cache.mask, mask), dim=1)
    return out


def _run_chunks(
    cache: ProgramCache,
    new: list[list[int]],
    mask: torch.Tensor,
    wanted: list[int],
    chunk: int,
    prompt: int | None,
) -> torch.Tensor:
    """:func:`run_tokens` over a state that has room for them."""
    program = cache.program
    tokens, counts = right_padded(new, program.device)
    out = torch.zeros((len(new), len(wanted), program.vocab_size), dtype=program.dtype, device=program.device)
    position = mask.long().cumsum(1) - 1  # [B, T]: which of its row's tokens a column holds
    columns = torch.tensor(wanted, dtype=torch.int64, device=program.device)
    if cache.prompts is None:
        most = tokens.shape[1] if prompt is None else prompt
        cache.end_prompt([min(len(row), most) for row in new])
    position = torch.where(mask, position, -1)[:, columns]  # [B, K]
    for start in range(0, tokens.shape[1], chunk):
        part = tokens[:, start : start + chunk]
        here = (counts - start).clamp(0, part.shape[1])
        logits = program.step(cache.state, part.contiguous(), here)
        row, place = ((position >= start) & (position < start + chunk)).nonzero(as_tuple=True)
        out[row, place] = logits[row, position[row, place] - start].to(out.dtype)
        cache.state.commit(here)
    return out
