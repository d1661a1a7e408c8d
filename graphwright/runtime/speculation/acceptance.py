"""How well a drafter guesses a text, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy.optimize import brentq

from graphwright.cost_model.speculation import expected_tokens
from graphwright.ir.errors import InputError
from graphwright.runtime.speculation.draft import Draft
from graphwright.runtime.speculation.drafter import Generation, Outcome, make_drafter


@dataclass(frozen=True)
class DraftRates:
    """What a drafter gave on a text, in drafts of at most ``tokens``.

    Attributes:
        tokens: most tokens in a draft.
        cycles, drafted: steps in all, and those with a draft.
        gained: tokens that the drafted steps yielded, the model's own included.
    """

    tokens: int
    cycles: int
    drafted: int
    gained: int

    @property
    def hit_rate(self) -> float:
        """Share of cycles with a draft."""
        return self.drafted / self.cycles if self.cycles else 0.0

    @property
    def tokens_per_cycle(self) -> float:
        """Tokens of a cycle on average, over cycles with and without a draft."""
        return (self.gained + self.cycles - self.drafted) / self.cycles if self.cycles else 1.0

    @property
    def acceptance(self) -> float:
        """The probability per position at which drafts of this length yield what they did.

        It inverts equation 1 of Leviathan et al. 2023: pricing with it gives back the measured tokens.
        """
        mean = self.gained / self.drafted if self.drafted else 1.0
        if mean <= 1:
            return 0.0
        if mean >= self.tokens + 1:
            return 1.0
        return float(brentq(lambda chance: expected_tokens(chance, self.tokens) - mean, 0.0, 1.0))


def measure_drafts(
    drafter_name: str,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    tokens: int,
    *,
    program: Any = None,
    **options: Any,
) -> DraftRates:
    """Replay decoding as if the model had written each row: draft, compare and observe cycle by cycle.

    Args:
        drafter_name: a registered drafter.
        rows: prompts and what followed them, as token ids.
        tokens: most tokens in a draft.
        program: what the drafter's ``begin`` gets; lookups need none.
        options: of the drafter.

    Raises:
        InputError: no such drafter or option, no tokens to draft, or a drafter that needs logits.
    """
    if tokens < 1:
        raise InputError(f"tokens={tokens} drafts nothing", where="measure_drafts", hint="tokens >= 1")
    guesser = make_drafter(drafter_name, **options)
    if guesser.wants_logits:
        raise InputError(
            f"drafter '{drafter_name}' needs the model's logits, which a text does not have",
            where="measure_drafts",
            hint="measure it by generating with the program; see OptimizedModel.stats()",
        )
    cycles = drafted = gained = 0
    for prompt, follow in rows:
        text, start = [int(token) for token in (*prompt, *follow)], len(prompt)
        guesser.begin(Generation([text[:start]], program))
        first = True
        while start < len(text):
            if not first and len(text) - start <= tokens:
                break  # the end of the text would cut the draft short, which says nothing about it
            first = False
            draft = guesser.propose([0], [min(tokens, len(text) - start)])[0]
            kept = _follow(draft, text[start:])
            step = text[start : start + kept + 1]  # the model's own token follows the accepted ones
            cycles += 1
            drafted += bool(draft.tokens)
            gained += len(step) if draft.tokens else 0
            guesser.observe(0, Outcome(step))
            start += len(step)
    return DraftRates(tokens, cycles, drafted, gained)


def halves(rows: Sequence[Sequence[int]]) -> list[tuple[list[int], list[int]]]:
    """Texts as prompts and continuations; those shorter than two tokens are left out."""
    cut = [([int(t) for t in row], (len(row) + 1) // 2) for row in rows if len(row) > 1]
    return [(row[:middle], row[middle:]) for row, middle in cut]


def _follow(draft: Draft, text: Sequence[int]) -> int:
    """Tokens of the draft that the text goes through."""
    node = kept = 0
    for token in text:
        options = draft.successors[node]
        if token not in options:
            return kept
        node = options[token] + 1
        kept += 1
    return kept
