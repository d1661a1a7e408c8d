"""The compiled model as transformers sees it: ``generate``, ``forward`` and ``score``."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from graphwright.ir.errors import InputError, UnsupportedGenerationError
from graphwright.runtime.decoding.inputs import (
    check_ids,
    check_mask,
    check_position_ids,
    compact_rows,
    same_device,
)
from graphwright.runtime.decoding.lock import ProgramLock
from graphwright.runtime.decoding.protocol import DecodingProgram
from graphwright.runtime.decoding.refusals import check_leftovers
from graphwright.runtime.decoding.scoring import ProgramCache, run_tokens, wanted_columns
from graphwright.runtime.generate import ProgramGeneration
from graphwright.runtime.speculation import Speculation
from graphwright.runtime.speculation.stats import GenerationStats

_LOSS_ARGUMENTS = ("num_items_in_batch", "shift_labels")


class OptimizedModel(ProgramGeneration):
    """A compiled causal language model that can stand where a transformers model stands.

    Args:
        program: the compiled decoder; objects that share one also share its lock.
        config: the model's config; copied.
        generation_config: the model's generation config; copied.
        speculation: drafter and length rule, or None. May be replaced between calls.
        capacity: most tokens a row may have, prompt and new together; None for the model's positions.

    One call runs at a time: further threads wait, a nested call raises
    :class:`~graphwright.ir.errors.ProgramBusyError`. A call that is interrupted or runs out of memory
    leaves nothing behind: its state is its own.
    """

    def __init__(
        self,
        program: DecodingProgram,
        *,
        config: Any,
        generation_config: Any,
        speculation: Speculation | None = None,
        capacity: int | None = None,
    ) -> None:
        self.program = program
        self.config = copy.deepcopy(config)
        self.generation_config = copy.deepcopy(generation_config)
        self.speculation = speculation
        self.capacity = capacity
        self.training = False
        self._lock = ProgramLock.of(program)
        self._last, self._total = GenerationStats(), GenerationStats()
        self._decoding = False
        self._assistants, self._speculating = weakref.WeakKeyDictionary(), None

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where the program runs."""
        return self.program.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the logits."""
        return self.program.dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The same as :meth:`forward`."""
        return self.forward(*args, **kwargs)

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits of given tokens, as a stock causal language model returns them; without gradients.

        Args:
            input_ids: ``[B, T]`` int.
            attention_mask: ``[B, T]`` of 0 and 1, padding on the left or right; with
                ``past_key_values`` also ``[B, P + T]``, P the columns in the cache.
            position_ids: accepted if they are the ones that follow from the mask.
            past_key_values: what an earlier ``forward`` of this program returned; it is extended in place.
                Where depth depends on it, the first call's tokens are a prompt, and later ones generated.
            labels: ``[B, T]``, -100 where there is no loss.
            use_cache: return ``past_key_values``; None follows the config.
            logits_to_keep: only the last so many columns (0: all), or the columns of a tensor of indices.
            return_dict: False gives a tuple.

        Returns:
            ``CausalLMOutputWithPast``; logits ``[B, T, V]`` in the model's dtype, zeros at padding.

        Raises:
            InputError, CapacityError, UnsupportedGenerationError, ProgramBusyError.
        """
        loss_arguments = {name: kwargs.pop(name) for name in _LOSS_ARGUMENTS if name in kwargs}
        check_leftovers(kwargs, frozenset(), "forward")
        with self._lock.hold("forward"):
            ids = check_ids(input_ids, self.program, "input_ids")
            cache = self._cache_for(past_key_values, ids.shape[0])
            mask = self._new_mask(attention_mask, ids, cache)
            self._check_positions(position_ids, mask, cache, ids.shape[1])
            keep = getattr(self.config, "use_cache", True) if use_cache is None else use_cache
            whole = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
            logits = run_tokens(
                cache,
                compact_rows(ids, mask),
                whole,
                wanted=wanted_columns(ids.shape[1], logits_to_keep),
                chunk=self.program.max_step_tokens,
                where="forward",
                fixed=self.capacity,
                spare=ids.shape[1] + 64 if keep else 0,
            )
        loss = None
        if labels is not None:
            if labels.shape[1] != logits.shape[1] and "shift_labels" not in loss_arguments:
                raise InputError(
                    f"labels have {labels.shape[1]} columns, the logits {logits.shape[1]}",
                    where="labels",
                    hint="leave logits_to_keep at 0",
                )
            loss = ForCausalLMLoss(
                logits=logits, labels=labels, vocab_size=self.program.vocab_size, **loss_arguments
            )
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache if keep else None)
        return output.to_tuple() if return_dict is False else output

    @torch.no_grad()
    def score(
        self, input_ids: torch.Tensor, step: int = 32, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Teacher-forced logits ``[B, T, V]`` through the program's own cache, ``step`` tokens at a time.

        Every token but the first ``step`` reads its past from the cache and counts as generated, so what a
        compressed, sparse or skipped program loses is seen, which a single pass would hide.

        Raises:
            InputError: unusable ids or mask, or ``step`` outside 1 .. ``program.max_step_tokens``.
            CapacityError: the tokens do not fit.
        """
        if not 1 <= step <= self.program.max_step_tokens:
            raise InputError(
                f"step={step} is outside 1 .. {self.program.max_step_tokens}", where="score", hint="step=32"
            )
        with self._lock.hold("score"):
            ids = check_ids(input_ids, self.program, "input_ids")
            mask = check_mask(attention_mask, ids, "attention_mask")
            return run_tokens(
                ProgramCache(self.program, ids.shape[0]),
                compact_rows(ids, mask),
                torch.ones_like(ids, dtype=torch.bool) if mask is None else mask,
                wanted=list(range(ids.shape[1])),
                chunk=step,
                where="score",
                fixed=self.capacity,
                prompt=step,
            )

    def _cache_for(self, past: Any, batch: int) -> ProgramCache:
        if past is None:
            return ProgramCache(self.program, batch)
        if not isinstance(past, ProgramCache) or past.program is not self.program:
            raise UnsupportedGenerationError(
                f"past_key_values is a {type(past).__name__} that this program did not make",
                where="forward",
                hint="pass what an earlier forward() of this object returned",
            )
        if len(past.rows) != batch:
            raise InputError(
                f"past_key_values holds {len(past.rows)} rows, input_ids has {batch}", where="past_key_values"
            )
        return past

    @staticmethod
    def _new_mask(mask: torch.Tensor | None, ids: torch.Tensor, cache: ProgramCache) -> torch.Tensor | None:
        """The mask of this call's columns, cut from one over all columns if that was given."""
        seen = cache.get_seq_length()
        if mask is not None and seen and mask.dim() == 2 and mask.shape[1] == seen + ids.shape[1]:
            if not torch.equal(mask[:, :seen] != 0, cache.mask):
                raise InputError(
                    "attention_mask is not an extension of the one the cache was filled with",
                    where="attention_mask",
                    hint="append columns to the mask of the earlier calls",
                )
            mask = mask[:, seen:]
        return check_mask(mask, ids, "attention_mask")

    @staticmethod
    def _check_positions(
        position_ids: torch.Tensor | None, mask: torch.Tensor | None, cache: ProgramCache, tokens: int
    ) -> None:
        start = torch.tensor([len(row) for row in cache.rows], device=cache.program.device)
        if position_ids is not None and not check_position_ids(position_ids, mask, start, tokens):
            raise UnsupportedGenerationError(
                "position_ids other than 0, 1, 2, ... over each row's tokens are not supported",
                where="forward",
                hint="leave position_ids out",
            )

    def eval(self) -> OptimizedModel:
        """A program is always in evaluation mode."""
        return self

    def train(self, mode: bool = True) -> OptimizedModel:
        """Refused unless ``mode`` is False: a program has no gradients."""
        if mode:
            raise UnsupportedGenerationError(
                "a program cannot be trained", where="train", hint="train the model"
            )
        return self

    def to(self, *args: Any, **kwargs: Any) -> OptimizedModel:
        """Accepts the device and dtype the program has; it cannot be moved."""
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        moved = device is not None and not same_device(device, self.device)
        if moved or (dtype is not None and dtype != self.dtype):
            raise InputError(
                f"the program was compiled for {self.device} and {self.dtype} and cannot be moved",
                where="to",
                hint=f"use device='{self.device}', or optimize the model again for another target",
            )
        return self
