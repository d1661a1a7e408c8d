"""What the decode loop asks of a compiled program and of its per-call state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch


class DecodingState(Protocol):
    """One call's cache: every row has its own number of committed tokens."""

    lengths: torch.Tensor
    batch: int
    capacity: int

    def commit(self, accepted: torch.Tensor, known: Sequence[int] | None = None) -> None:
        """Keep the first ``accepted[b]`` tokens of the last step (``[B]`` int64) and drop the rest.

        ``known`` is ``accepted`` on the host, where the caller has it: then the device is not read.
        """
        ...

    def commit_path(
        self, path: torch.Tensor, accepted: torch.Tensor, known: Sequence[int] | None = None
    ) -> None:
        """Keep step tokens ``path[b, :accepted[b]]`` (``[B, P]``, ``[B]`` int64), compacted in the cache.

        ``path`` is on the CPU; ``known`` is as in :meth:`commit`.
        """
        ...

    def truncate(self, lengths: torch.Tensor) -> None:
        """Forget everything after the first ``lengths[b]`` committed tokens of each row."""
        ...

    def rewind(self, tokens: Sequence[int]) -> None:
        """Take back the last ``tokens[b]`` committed tokens of each row, to run them again."""
        ...

    def end_prompt(self, prompts: Sequence[int] | None = None) -> None:
        """The first ``prompts[b]`` tokens of each row are its prompt, by default all that there are."""
        ...

    def room(self) -> list[int]:
        """Tokens that each row may run in one step and still compute what single steps would."""
        ...


class DecodingProgram(Protocol):
    """A compiled decoder: prompt in, logits out, cache kept in a state of its own."""

    config: Any
    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    max_positions: int | None
    max_step_tokens: int
    #: A step is queued on the device: the host may go on before its result is there.
    runs_ahead: bool
    #: Generated tokens between dense passes over the last ones; 0 for none.
    refresh: int
    #: Tokens that the rows of a batch are promised to share; 0: whatever they do; None: nothing is shared.
    shared_prefix: int | None

    def allocate(self, batch: int, capacity: int) -> Any:
        """A fresh :class:`DecodingState` with ``capacity`` slots in each of ``batch`` rows."""
        ...

    def borrow(self, batch: int, capacity: int, prefix: int = 0) -> Any:
        """An empty state of at least this capacity for one generation; :meth:`give_back` ends it.

        ``prefix`` tokens are kept once for all rows; :meth:`prefill` takes them from the first row.
        """
        ...

    def give_back(self, state: Any) -> None:
        """The generation that borrowed ``state`` is over, however it ended."""
        ...

    def free_idle(self) -> bool:
        """Let go of the states that are kept for later generations; whether there were any."""
        ...

    def step(
        self,
        state: Any,
        tokens: torch.Tensor,
        counts: torch.Tensor,
        *,
        depth: torch.Tensor | None = None,
        tree: torch.Tensor | None = None,
        dense: torch.Tensor | None = None,
        logits: Literal["last", "all"] = "all",
    ) -> torch.Tensor:
        """Run ``tokens [B, T]`` over the cache without committing them; logits ``[B, T, V]``.

        The first ``dense[b]`` tokens of a row read everything, where others select what they read.

        Programs whose layers can be looked into take two more arguments, which only drafters that ask for it
        use: ``skip``, layers to leave out, and ``visit``, called with the residual stream after each layer.
        Their states have ``advance(tokens)`` and ``retreat()``: later steps read tokens that are uncommitted.
        See :class:`~graphwright.runtime.program.Program` and :class:`~graphwright.runtime.storage.State`.
        """
        ...

    def prefill(self, state: Any, tokens: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Run and commit right-padded prompts ``[B, T]``; logits ``[B, V]`` of each row's last token."""
        ...
