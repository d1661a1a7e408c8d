"""Drafting with a second, smaller model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graphwright.ir.errors import InputError
from graphwright.runtime.speculation.draft_model import VOCABULARIES, NeedsModel
from graphwright.runtime.speculation.drafter import Generation, drafter
from graphwright.runtime.speculation.growing import Ask
from graphwright.runtime.speculation.model_session import ModelSession
from graphwright.runtime.speculation.second_cache import SecondCacheDrafter
from graphwright.runtime.speculation.shortening import shortened
from graphwright.runtime.speculation.successors import NOTHING, Successors

#: A shortened prompt has at least so many tokens.
LEAST_CONTEXT = 64


@drafter("model")
@dataclass
class ModelDrafter(NeedsModel, SecondCacheDrafter):
    """Asks a smaller model, with a cache of its own; its vocabulary may be another one.

    Greedy decoding takes its likeliest tokens, sampling draws from it at the request's temperature.

    Options:
        path: folder or name of a transformers model, loaded when the program is built.
        vocabulary: ``same``, ``intersection`` (tokens that both have, by their strings) or ``auto``.
        context: most tokens of a prompt that it reads, the rest is left out; 0 for all.
        confidence: it drafts nothing where its likeliest token has a smaller probability.

    Sources: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding"; Timor et al.
    2025, "Accelerating LLM Inference with Lossless Speculative Decoding Algorithms for Heterogeneous
    Vocabularies" (``intersection``); Chen et al. 2025, "Long-Context Inference with Retrieval-Augmented
    Speculative Decoding" (``context``); transformers' assisted generation (``confidence``).
    """

    vocabulary: str = "auto"
    context: int = 0
    confidence: float = 0.0

    def __post_init__(self) -> None:
        if self.vocabulary not in VOCABULARIES:
            raise InputError(
                f"there is no vocabulary={self.vocabulary}",
                where="drafter=model",
                hint=f"vocabulary is one of {', '.join(VOCABULARIES)}; drafter=retokenized drafts as text",
            )
        check_context(self.context, "drafter=model", optional=True)
        if not 0 <= self.confidence <= 1:
            raise InputError(f"confidence={self.confidence} is not a probability", where="drafter=model")

    def check(self, target: Any) -> None:
        super().check(target)
        self.model.translation(target, self.vocabulary)

    def open(self, generation: Generation) -> ModelSession:
        self._silent = {}
        self.check(generation.program)
        translation = self.model.translation(generation.program, self.vocabulary)
        prompts = [translation.read((), prompt) or [0] for prompt in generation.prompts]
        if self.context:
            prompts = [shortened(prompt, self.context) for prompt in prompts]
        return self._follow(self.model.program, generation, translation, prompts)

    def look(self, asked: Sequence[Ask]) -> list[Successors]:
        # Decided by the distribution, never by what was drawn from it, so sampling stays exact.
        return [NOTHING if self._is_unsure(found) else found for found in super().look(asked)]

    def _is_unsure(self, successors: Successors) -> bool:
        if not self.confidence:
            return False
        law = successors.law
        return (successors.ahead() if law is None else float(law.max())) < self.confidence


def check_context(context: int, where: str, *, optional: bool = False) -> None:
    """Refuse prompts too short to draft from.

    Raises:
        InputError: ``context`` is less than :data:`LEAST_CONTEXT`, and not 0 where that stands for all.
    """
    if context < LEAST_CONTEXT and not (optional and context == 0):
        raise InputError(
            f"context={context} leaves too little of a prompt",
            where=where,
            hint=f"context >= {LEAST_CONTEXT}",
        )
