"""Drafting by n-gram lookup in the text so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphwright.ir.errors import InputError
from graphwright.runtime.speculation.drafter import NO_DRAFT, Draft, Drafter, drafter


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
class NgramDrafter(Drafter):
    """Continues the longest recent n-gram that occurred before in the same text (prompt lookup).

    Args:
        max_ngram: longest suffix that is looked up.
        tokens: most tokens in a draft.
        min_ngram: shortest suffix that counts as a match.

    Source: Saxena 2023, "Prompt Lookup Decoding"; Yang et al. 2023, "Inference with Reference".
    """

    def __init__(self, max_ngram: int = 3, tokens: int = 8, min_ngram: int = 2) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise InputError(
                f"min_ngram={min_ngram} and max_ngram={max_ngram} leave no n-gram to look up",
                where="drafter=ngram",
                hint="1 <= min_ngram <= max_ngram",
            )
        if tokens < 1:
            raise InputError(f"tokens={tokens} drafts nothing", where="drafter=ngram", hint="tokens >= 1")
        self.max_ngram, self.min_ngram, self.tokens = max_ngram, min_ngram, tokens
        self._rows: list[NgramIndex] = []

    def begin(self, prompts: list[list[int]], program: Any) -> None:
        self._rows = [NgramIndex(prompt, self.min_ngram, self.max_ngram) for prompt in prompts]

    def propose(self, rows: Sequence[int], budget: Sequence[int]) -> list[Draft]:
        drafts = []
        for row, most in zip(rows, budget, strict=True):
            guess = self._rows[row].continuation(min(most, self.tokens))
            drafts.append(Draft(guess) if guess else NO_DRAFT)
        return drafts

    def observe(self, row: int, tokens: Sequence[int], *, logits: torch.Tensor | None = None) -> None:
        self._rows[row].extend(tokens)

    def default_length(self) -> int:
        return self.tokens

    def __str__(self) -> str:
        return f"ngram(max_ngram={self.max_ngram}, tokens={self.tokens}, min_ngram={self.min_ngram})"
