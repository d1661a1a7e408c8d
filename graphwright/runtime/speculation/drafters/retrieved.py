"""Drafting with the program itself over a shortened prompt."""

from __future__ import annotations

from dataclasses import dataclass

from graphwright.ir.errors import InputError
from graphwright.runtime.speculation.drafter import Generation, drafter
from graphwright.runtime.speculation.drafters.model import check_context
from graphwright.runtime.speculation.model_session import ModelSession
from graphwright.runtime.speculation.second_cache import SecondCacheDrafter
from graphwright.runtime.speculation.shortening import shortened
from graphwright.runtime.speculation.translation import SameTokens


@drafter("retrieved")
@dataclass
class RetrievedDrafter(SecondCacheDrafter):
    """Runs the program itself over the parts of a long prompt that matter most to its end.

    A draft step still reads all weights: it pays where reading the cache takes most of a step. Prompts of
    ``context`` tokens or less are not drafted for.

    Options:
        context: tokens of the prompt that are kept: the first, the newest, and chunks like the newest.

    Source: Chen et al. 2025, "Long-Context Inference with Retrieval-Augmented Speculative Decoding" (RAPID,
    with the target itself as the drafter).
    """

    context: int = 1024

    def __post_init__(self) -> None:
        check_context(self.context, "drafter=retrieved")

    def open(self, generation: Generation) -> ModelSession:
        program = generation.program
        if program is None:
            raise InputError("there is no program to draft with", where=f"drafter={self}")
        self._silent = {
            row: f"the prompt has {len(prompt)} tokens, no more than the {self.context} that would be kept"
            for row, prompt in enumerate(generation.prompts)
            if len(prompt) <= self.context
        }
        prompts = [shortened(prompt, self.context) for prompt in generation.prompts]
        same = SameTokens(program.vocab_size, program.vocab_size)
        return self._follow(program, generation, same, prompts)
