"""Drafting as text, with a model of any vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from graphwright.runtime.speculation.draft import NO_DRAFT, Draft
from graphwright.runtime.speculation.draft_model import NeedsModel
from graphwright.runtime.speculation.drafter import Drafter, Generation, Outcome, drafter
from graphwright.runtime.speculation.growing import grow
from graphwright.runtime.speculation.second_cache import SecondModelDrafter
from graphwright.runtime.speculation.translation import Retokenizer
from graphwright.runtime.speculation.trees.chain import Chain


@drafter("retokenized")
@dataclass
class RetokenizedDrafter(NeedsModel, Drafter):
    """Lets a smaller model of any vocabulary write text, and drafts the program's tokens of that text.

    The draft is one path of likeliest tokens, also when sampling.

    Options:
        path: folder or name of a transformers model, loaded when the program is built.

    Source: Timor et al. 2025, "Accelerating LLM Inference with Lossless Speculative Decoding Algorithms for
    Heterogeneous Vocabularies" (string-level exact match, SLEM).
    """

    wants_logits: ClassVar[bool] = True  # a program is needed, which a text does not have

    _writer: SecondModelDrafter = field(
        default_factory=SecondModelDrafter, init=False, repr=False, compare=False
    )
    _texts: list[list[int]] = field(default_factory=list, init=False, repr=False, compare=False)
    _read: list[list[int]] = field(default_factory=list, init=False, repr=False, compare=False)
    _vocabulary: int = field(default=0, init=False, repr=False, compare=False)

    def check(self, target: Any) -> None:
        super().check(target)
        self.model.require_tokenizers((target.vocab_size, self.model.program.vocab_size))

    def begin(self, generation: Generation) -> None:
        model, target = self.model, generation.program
        self.check(target)
        self._vocabulary = target.vocab_size
        self._to_draft = Retokenizer(model.target_tokenizer, model.tokenizer)
        self._to_target = Retokenizer(model.tokenizer, model.target_tokenizer)
        self._texts = [list(prompt) for prompt in generation.prompts]
        self._read = [self._to_draft((), prompt) or [0] for prompt in self._texts]
        new = generation.capacity - max(map(len, generation.prompts))
        # Text of as many tokens may be more of the draft model's.
        capacity = max(map(len, self._read)) + 2 * new
        self._writer.use(model)
        self._writer.begin(
            replace(
                generation,
                prompts=self._read,
                program=None,
                state=None,
                capacity=capacity,
                sample=False,
                temperature=1.0,
            )
        )

    def propose(self, rows: Sequence[int], budget: Sequence[int]) -> list[Draft]:
        written = grow(Chain(), self._writer, rows, budget, [0.0] * len(rows))
        return [
            self._draft(row, one.tokens, most) for row, one, most in zip(rows, written, budget, strict=True)
        ]

    def _draft(self, row: int, written: Sequence[int], most: int) -> Draft:
        found = self._to_target(self._read[row], written)[:most] if written else []
        unknown = next((i for i, token in enumerate(found) if token >= self._vocabulary), len(found))
        return Draft(found[:unknown]) if unknown else NO_DRAFT

    def observe(self, row: int, outcome: Outcome) -> None:
        tokens = list(outcome.tokens)
        read = self._to_draft(self._texts[row], tokens)
        self._texts[row] += tokens
        self._read[row] += read
        if read:
            self._writer.observe(row, Outcome(read))

    def stopped(self) -> str | None:
        return self._writer.stopped()

    def release(self) -> None:
        self._writer.release()
