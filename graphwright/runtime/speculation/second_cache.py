"""Base of drafters that run a program over a cache of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from graphwright.runtime.speculation.draft_model import NeedsModel
from graphwright.runtime.speculation.drafter import Generation
from graphwright.runtime.speculation.growing import Ask
from graphwright.runtime.speculation.model_session import ModelSession
from graphwright.runtime.speculation.program_drafter import ProgramDrafter
from graphwright.runtime.speculation.successors import NOTHING, Successors
from graphwright.runtime.speculation.translation import SameTokens, Translation

# Tokens beyond the expected ones that a row may need in another vocabulary.
_SPARE = 64


@dataclass
class SecondCacheDrafter(ProgramDrafter):
    """Drafts with a program over its own cache, row by row as far as that reaches.

    A row whose text is longer than the draft model can read takes plain steps from there on.
    """

    _translation: Translation | None = field(default=None, init=False, repr=False, compare=False)
    _own: ModelSession | None = field(default=None, init=False, repr=False, compare=False)
    _silent: dict[int, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    def law(self, logits: torch.Tensor) -> torch.Tensor:
        assert self._translation is not None
        return self._translation.law(logits.float() / self._generation.temperature)

    def look(self, asked: Sequence[Ask]) -> list[Successors]:
        able = [ask for ask in asked if self._reaches(ask)]
        answers = iter(super().look(able) if able else ())
        return [next(answers) if ask.row not in self._silent else NOTHING for ask in asked]

    def stopped(self) -> str | None:
        return next(iter(self._silent.values()), None)

    def release(self) -> None:
        if self._own is not None:
            self._own.close()
            self._own = None
        super().release()

    def _follow(
        self,
        program: Any,
        generation: Generation,
        translation: Translation,
        prompts: Sequence[list[int]],
    ) -> ModelSession:
        """A session over ``prompts``, which are in the draft model's tokens.

        A row that cannot be read is silent and reads one token; why is put down in ``_silent`` before.
        """
        self._translation = translation
        most = program.max_positions
        if most is not None:
            self._silent |= {
                row: f"the prompt has {len(prompt)} tokens and the draft model reads {most}"
                for row, prompt in enumerate(prompts)
                if len(prompt) >= most and row not in self._silent
            }
        read = [prompt[:1] if row in self._silent else prompt for row, prompt in enumerate(prompts)]
        new = generation.capacity - max(map(len, generation.prompts))
        spare = _SPARE if translation.growth > 1 else 0
        capacity = max(map(len, read)) + translation.growth * new + spare
        self._own = ModelSession(program, read, capacity, generation.prompts, translation)
        return self._own

    def _reaches(self, ask: Ask) -> bool:
        """Whether the draft model can read what the row has and drafts; if not, it is done with the row."""
        assert self._own is not None
        if ask.row not in self._silent and self._own.reads(ask.row) + len(ask.growing) > self._own.limit:
            self._silent[ask.row] = (
                f"a row has grown beyond the {self._own.limit} tokens that the draft model reads"
            )
        return ask.row not in self._silent


@dataclass
class SecondModelDrafter(NeedsModel, SecondCacheDrafter):
    """Drafts with a second model over the same tokens; what it writes itself, in its own vocabulary."""

    def open(self, generation: Generation) -> ModelSession:
        self._silent = {}
        size = self.model.program.vocab_size
        prompts = [list(prompt) for prompt in generation.prompts]
        return self._follow(self.model.program, generation, SameTokens(size, size), prompts)
