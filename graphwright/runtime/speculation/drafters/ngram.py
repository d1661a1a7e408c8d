"""Drafting by n-gram lookup in the text so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from graphwright.ir.errors import InputError
from graphwright.runtime.speculation.draft import NO_DRAFT, Draft
from graphwright.runtime.speculation.drafter import Drafter, Generation, Outcome, drafter
from graphwright.runtime.speculation.tree import MAX_TREE_TOKENS


class NgramIndex:
    """Where each n-gram of a growing text was last followed by something.

    Appending a token and looking up the longest suffix both cost O(max_ngram), whatever the length of
    the text: there is no rescan.
    """

    def __init__(self, tokens: Sequence[int], min_ngram: int, max_ngram: int) -> None:
        self.text: list[int] = []
        self._sizes = range(min_ngram, max_ngram + 1)
        self._next: list[dict[tuple[int, ...], int]] = [{} for _ in self._sizes]
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens."""
        text, tables = self.text, list(zip(self._sizes, self._next, strict=True))
        for token in tokens:
            end = len(text)
            for size, table in tables:  # n-grams that end just before `token` now have a follower
                if size > end:
                    break
                table[tuple(text[end - size : end])] = end
            text.append(token)

    def continuation(self, budget: int) -> list[int]:
        """What followed the most recent earlier occurrence of the longest known suffix.

        When that occurrence is so recent that its follow-up runs into the end of the text, the text
        has been repeating with that period, and the guess goes on repeating.
        """
        text = self.text
        end = len(text)
        for size, table in zip(reversed(self._sizes), reversed(self._next), strict=True):
            if size > end:
                continue
            start = table.get(tuple(text[end - size : end]))
            if start is not None:
                guess = text[start : start + budget]
                period = end - start
                while len(guess) < budget:
                    guess.append(guess[len(guess) - period])
                return guess
        return []


@drafter("ngram")
@dataclass
class NgramDrafter(Drafter):
    """Continues the longest recent n-gram that occurred before in the same text (prompt lookup).

    Options:
        max_ngram: longest suffix that is looked up.
        tokens: most tokens in a draft.
        min_ngram: shortest suffix that counts as a match.

    Source: Saxena 2023, "Prompt Lookup Decoding"; Yang et al. 2023, "Inference with Reference".
    """

    proposals: ClassVar[Sequence[Mapping[str, Any]]] = tuple({"tokens": n} for n in (2, 4, 8, 16))

    max_ngram: int = 3
    tokens: int = MAX_TREE_TOKENS - 1
    min_ngram: int = 2
    _rows: list[NgramIndex] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise InputError(
                f"min_ngram={self.min_ngram} and max_ngram={self.max_ngram} leave no n-gram to look up",
                where="drafter=ngram",
                hint="1 <= min_ngram <= max_ngram",
            )
        if self.tokens < 1:
            raise InputError(
                f"tokens={self.tokens} drafts nothing", where="drafter=ngram", hint="tokens >= 1"
            )

    def begin(self, generation: Generation) -> None:
        self._rows = [NgramIndex(row, self.min_ngram, self.max_ngram) for row in generation.prompts]

    def propose(self, rows: Sequence[int], budget: Sequence[int]) -> list[Draft]:
        drafts = []
        for row, most in zip(rows, budget, strict=True):
            guess = self._rows[row].continuation(min(most, self.tokens))
            drafts.append(Draft(guess) if guess else NO_DRAFT)
        return drafts

    def observe(self, row: int, outcome: Outcome) -> None:
        self._rows[row].extend(outcome.tokens)

    def default_length(self) -> int:
        return min(self.tokens, super().default_length())
