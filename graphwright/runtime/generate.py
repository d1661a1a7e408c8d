"""``generate()`` with transformers' contract, on a compiled program.

``GenerationMixin.generate`` merges the configuration, builds logits processors and stopping criteria,
expands the batch and warns; its public preparation is used as it is. The decoding itself, stock's
``_sample``, is replaced by :class:`graphwright.runtime.decoding.loop.DecodeLoop`, or where the device runs
ahead by :class:`graphwright.runtime.decoding.device_loop.DeviceLoop`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from transformers import GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput

from graphwright.ir.errors import GraphwrightError, InputError, UnsupportedGenerationError
from graphwright.runtime.decoding.assistants import assisted, second_programs
from graphwright.runtime.decoding.device_loop import make_loop
from graphwright.runtime.decoding.inputs import check_capacity, check_ids, check_mask, check_position_ids
from graphwright.runtime.decoding.lock import ProgramLock, hold_all
from graphwright.runtime.decoding.memory import is_out_of_memory, out_of_memory
from graphwright.runtime.decoding.protocol import DecodingProgram
from graphwright.runtime.decoding.refusals import (
    check_arguments,
    check_config,
    check_leftovers,
    refuse,
)
from graphwright.runtime.decoding.request import Request, make_request
from graphwright.runtime.decoding.transcript import Transcript
from graphwright.runtime.speculation import Speculation
from graphwright.runtime.speculation.draft_model import DraftModel
from graphwright.runtime.speculation.stats import GenerationStats

_KNOWN_MODEL_ARGUMENTS = frozenset({"input_ids", "attention_mask", "position_ids", "logits_to_keep"})


def _run(
    program: DecodingProgram,
    request: Request,
    speculation: Speculation | None,
    watch: Callable[[GenerationStats], None],
) -> Transcript:
    """Decode; when memory runs out, nothing that the call held stays alive.

    Args:
        watch: gets the counters before the first step; they count while it decodes.
    """
    loop = make_loop(program, request, speculation)
    watch(loop.stats)
    try:
        return loop.run()
    except Exception as error:
        # An error of the caller's own streamer or criterion passes through as it is.
        if loop.transcript.calling or not is_out_of_memory(error):
            raise
        del loop
        raise out_of_memory(error, program, "generate") from None


class ProgramGeneration(GenerationMixin):
    """The generation half of an :class:`~graphwright.runtime.model.OptimizedModel`."""

    main_input_name = "input_ids"
    input_modalities = ("text",)
    _is_stateful = False

    program: DecodingProgram
    config: Any
    speculation: Speculation | None
    capacity: int | None
    device: torch.device
    _lock: ProgramLock
    _last: GenerationStats
    _total: GenerationStats
    _decoding: bool
    _assistants: weakref.WeakKeyDictionary[Any, DraftModel]
    _speculating: Speculation | None

    def generate(  # type: ignore[override]
        self,
        inputs: torch.Tensor | None = None,
        generation_config: Any = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        prefix_allowed_tokens_fn: Any = None,
        synced_gpus: bool | None = None,
        assistant_model: Any = None,
        streamer: Any = None,
        negative_prompt_ids: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        custom_generate: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Generate from token ids ``[B, L]``; arguments and results are those of transformers' ``generate``.

        Padding may be on the left or on the right, and costs nothing inside. Calls from several threads
        are served one after the other. An ``assistant_model`` drafts instead of what the program drafts
        with; if its vocabulary is another one, ``tokenizer`` and ``assistant_tokenizer`` say what they share.

        Returns:
            ``[B, L + N]`` int64: the prompt as given, the new tokens, the pad token after a row's end. Or
            a ``GenerateDecoderOnlyOutput`` with ``return_dict_in_generate``; in its ``scores`` and ``logits``
            a row that ended earlier has zeros, and ``past_key_values`` is None.

        Raises:
            UnsupportedGenerationError: an option that is refused, by name (beam search, caches, ...).
            InputError: unusable ids, mask or option.
            CapacityError: prompt and new tokens do not fit the model's positions or the program's cache.
            OutOfMemoryError: memory ran out; what the call held is free again.
            ProgramBusyError: called from inside a call of the same program.
        """
        named = {
            "synced_gpus": synced_gpus,
            "negative_prompt_ids": negative_prompt_ids,
            "negative_prompt_attention_mask": negative_prompt_attention_mask,
            "custom_generate": custom_generate,
        }
        check_arguments({**kwargs, **named}, "generate")
        tokenizers = kwargs.get("tokenizer"), kwargs.pop("assistant_tokenizer", None)
        assistant, speculation = self._draft_model(assistant_model, *tokenizers), self.speculation
        if assistant is not None:
            speculation = assisted(assistant, kwargs, generation_config, assistant_model.generation_config)
        with hold_all("generate", self.program, *second_programs(speculation, self.program)):
            inputs, kwargs = self._check_inputs(inputs, generation_config, kwargs)
            self._speculating = speculation
            self._decoding = False
            try:
                return super().generate(
                    inputs,
                    generation_config=generation_config,
                    logits_processor=logits_processor,
                    stopping_criteria=stopping_criteria,
                    prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
                    streamer=streamer,
                    **kwargs,
                )
            except ValueError as error:
                # What transformers finds wrong with the arguments gets our class; what a streamer or
                # criterion of the caller raises while tokens are generated passes through.
                if self._decoding or isinstance(error, GraphwrightError):
                    raise
                raise InputError(str(error), where="generate") from error

    def _draft_model(self, assistant: Any, tokenizer: Any, assistant_tokenizer: Any) -> DraftModel | None:
        """The assistant of a call, with what earlier calls found out about it."""
        if assistant is None:
            if assistant_tokenizer is not None:
                raise InputError(
                    "assistant_tokenizer was given without assistant_model",
                    where="generate",
                    hint="pass both, or neither",
                )
            return None
        program = self._assistant_program(assistant)
        known = self._assistants.get(program)
        if known is None or (known.tokenizer, known.target_tokenizer) != (assistant_tokenizer, tokenizer):
            known = DraftModel(program, assistant_tokenizer, tokenizer)
            self._assistants[program] = known
        return known

    def _assistant_program(self, assistant: Any) -> DecodingProgram:
        """The compiled program of an assistant."""
        if isinstance(assistant, ProgramGeneration):
            return assistant.program
        raise refuse(
            "assistant_model", assistant, "pass a program: graphwright.optimize(assistant_model)", "generate"
        )

    def _check_inputs(
        self, inputs: Any, generation_config: Any, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor | None, dict[str, Any]]:
        ids = kwargs.pop("input_ids", None)
        if ids is not None and inputs is not None:
            raise InputError(
                "both inputs and input_ids were given", where="generate", hint="pass one of them"
            )
        ids = inputs if ids is None else ids
        mask = kwargs.get("attention_mask")
        if ids is None:
            if mask is not None:
                raise InputError("attention_mask was given without input_ids", where="generate")
            configs = (generation_config, self.generation_config)
            bos = [kwargs.get("bos_token_id"), *(getattr(config, "bos_token_id", None) for config in configs)]
            if all(token is None for token in bos):
                raise InputError(
                    "there is no prompt and the model has no bos token",
                    where="generate",
                    hint="pass input_ids",
                )
            return None, kwargs
        ids = check_ids(ids, self.program, "input_ids")
        if mask is not None:
            check_mask(mask, ids, "attention_mask")
            kwargs["attention_mask"] = mask.long()
        return ids, kwargs

    def _prepare_generation_config(self, generation_config: Any, **kwargs: Any) -> Any:
        config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        check_config(config)
        return config, model_kwargs

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        check_leftovers(model_kwargs, _KNOWN_MODEL_ARGUMENTS, "generate")

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to prepare: the loop allocates the program's own cache."""

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """Greedy search and sampling, called by ``GenerationMixin.generate``."""
        ids = check_ids(input_ids, self.program, "input_ids")
        mask = check_mask(attention_mask, ids, "attention_mask")
        zero = torch.zeros(ids.shape[0], dtype=torch.int64, device=ids.device)
        if position_ids is not None and not check_position_ids(position_ids, mask, zero, ids.shape[1]):
            raise UnsupportedGenerationError(
                "position_ids other than 0, 1, 2, ... over each row's tokens are not supported",
                where="generate",
                hint="leave position_ids out",
            )
        request = make_request(
            ids,
            mask,
            processors=logits_processor,
            criteria=stopping_criteria,
            config=generation_config,
            streamer=streamer,
        )
        longest = max(len(prompt) for prompt in request.prompts)
        check_capacity(longest, request.max_new_tokens, self.program.max_positions, self.capacity, "generate")
        self._decoding = True
        transcript = _run(self.program, request, self._speculating, self._watch)
        self._total.add(self._last)
        if streamer is not None:
            streamer.end()
        sequences = transcript.sequences()
        if not generation_config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=transcript.scores if request.keep_scores else None,
            logits=transcript.logits if request.keep_logits else None,
        )

    def _watch(self, stats: GenerationStats) -> None:
        self._last = stats

    def stats(self) -> dict[str, Any]:
        """Counters over all ``generate`` calls, and under ``last`` of the last one, also while it runs.

        ``tokens``, ``cycles`` (steps of the program after the prompt), ``drafts``, ``draft_tokens``,
        ``accepted``, ``accepted_per_position``, ``by_drafter``, and why speculation was off, if it was.
        """
        return {**self._total.as_dict(), "last": self._last.as_dict()}

    def can_generate(self) -> bool:
        """True: pipelines ask."""
        return True

    def _refuse_batching(self, name: str) -> NoReturn:
        raise UnsupportedGenerationError(
            f"{name} (continuous batching) is not supported",
            where="OptimizedModel",
            hint="call generate() with a batch",
        )

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: continuous batching."""
        self._refuse_batching("generate_batch")

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: continuous batching."""
        self._refuse_batching("init_continuous_batching")

    def continuous_batching_context_manager(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: continuous batching."""
        self._refuse_batching("continuous_batching_context_manager")

    def load_custom_generate(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: graphwright never runs remote code."""
        raise UnsupportedGenerationError(
            "custom_generate is not supported", where="generate", hint="graphwright never runs remote code"
        )
