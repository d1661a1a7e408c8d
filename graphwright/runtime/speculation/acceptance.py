"""How well a drafter guesses a text, without running the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from scipy.optimize import brentq

from graphwright.cost_model.speculation import expected_tokens
from graphwright.ir.errors import InputError
from graphwright.runtime.speculation import Generation, Outcome, Speculation
from graphwright.runtime.speculation.draft import Draft


class Likeliest(NamedTuple):
    """The head of the model's distribution at every token of a continuation.

    Attributes:
        ids: ``[N, k]`` int64, likeliest first.
        scores: ``[N, k]`` their logits, or log-probabilities.
        vocabulary: V.
    """

    ids: torch.Tensor
    scores: torch.Tensor
    vocabulary: int

    def logits(self, start: int, stop: int) -> torch.Tensor:
        """``[stop - start, V]``, minus infinity outside of the head."""
        dense = torch.full((stop - start, self.vocabulary), -torch.inf)
        return dense.scatter_(1, self.ids[start:stop], self.scores[start:stop].float())


class Text(NamedTuple):
    """A prompt, what followed it, and if the model wrote that, what else it might have written."""

    prompt: Sequence[int]
    follow: Sequence[int]
    likeliest: Likeliest | None = None


@dataclass(frozen=True)
class DraftRates:
    """What a speculation gave on a text.

    Attributes:
        cycles, drafted: steps in all, and those with a draft.
        gained: tokens that the drafted steps yielded, the model's own included.
        widths: drafted steps by the number of their draft tokens.
    """

    cycles: int
    drafted: int
    gained: int
    widths: Mapping[int, int] = field(default_factory=dict)

    @property
    def hit_rate(self) -> float:
        """Share of cycles with a draft."""
        return self.drafted / self.cycles if self.cycles else 0.0

    @property
    def tokens_per_cycle(self) -> float:
        """Tokens of a cycle on average, over cycles with and without a draft."""
        return (self.gained + self.cycles - self.drafted) / self.cycles if self.cycles else 1.0

    @property
    def verified(self) -> int:
        """Draft tokens of a drafted step, rounded from the mean; 0 if there was none."""
        return round(sum(n * count for n, count in self.widths.items()) / self.drafted) if self.drafted else 0

    @property
    def acceptance(self) -> float:
        """The probability per position at which chains of :attr:`verified` tokens yield what drafts did.

        It inverts equation 1 of Leviathan et al. 2023: pricing with it gives back the measured tokens.
        """
        mean = self.gained / self.drafted if self.drafted else 1.0
        if mean <= 1:
            return 0.0
        if mean >= self.verified + 1:
            return 1.0
        return float(brentq(lambda chance: expected_tokens(chance, self.verified) - mean, 0.0, 1.0))


def measure_drafts(speculation: Speculation, rows: Sequence[Text]) -> DraftRates:
    """Replay decoding as if the model had written each row: draft, compare and observe cycle by cycle.

    Where a text says what the model thought likely, the drafter is shown that for the tokens that were
    written; what it thought behind refused ones nobody knows, so drafters that learn from it are judged a
    little too low.

    Raises:
        InputError: the drafter needs logits, and a text has none.
    """
    total = _Tally()
    for row in rows:
        _replay(speculation, row, total)
    return DraftRates(total.cycles, total.drafted, total.gained, total.widths)


@dataclass
class _Tally:
    cycles: int = 0
    drafted: int = 0
    gained: int = 0
    widths: Counter[int] = field(default_factory=Counter)

    def count(self, draft: Draft, tokens: int) -> None:
        self.cycles += 1
        if draft.tokens:
            self.drafted += 1
            self.gained += tokens
            self.widths[len(draft.tokens)] += 1


def _replay(speculation: Speculation, text: Text, total: _Tally) -> None:
    drafter, rule = speculation.drafter, speculation.rule
    if drafter.wants_logits and text.likeliest is None:
        raise InputError(
            f"drafter '{drafter.name}' needs the model's logits, which a text does not have",
            where="measure_drafts",
            hint="measure it by generating with the program; see OptimizedModel.stats()",
        )
    follow, at = [int(token) for token in text.follow], 0
    drafter.begin(Generation([[int(token) for token in text.prompt]]))
    rule.begin(1)
    while at < len(follow):
        left = len(follow) - at
        most = min(rule.budget(0), speculation.tokens)
        if at and left <= most:
            break  # the end of the text would cut the draft short, which says nothing about it
        most = min(most, left)
        draft = speculation.propose([0], [most])[0] if most > 0 else Draft()
        path = _followed(draft, follow[at:])
        step = follow[at : at + len(path) + 1]  # the model's own token follows the accepted ones
        total.count(draft, len(step))
        if draft.tokens:
            rule.update(0, len(draft.tokens), len(path))
        drafter.observe(0, _outcome(draft, path, step, text.likeliest, at))
        at += len(step)


def _outcome(
    draft: Draft, path: Sequence[int], step: Sequence[int], likeliest: Likeliest | None, at: int
) -> Outcome:
    """What became of a step, as far as a text can tell: of a draft's tokens, the accepted ones."""
    if likeliest is None:
        return Outcome(step, draft, path)
    accepted = Draft([draft.tokens[index] for index in path])
    return Outcome(step, accepted, range(len(path)), likeliest.logits(at, at + len(step)))


def halves(rows: Sequence[Sequence[int]]) -> list[Text]:
    """Texts as prompts and continuations; those shorter than two tokens are left out."""
    cut = [([int(t) for t in row], (len(row) + 1) // 2) for row in rows if len(row) > 1]
    return [Text(row[:middle], row[middle:]) for row, middle in cut]


def _followed(draft: Draft, text: Sequence[int]) -> list[int]:
    """The draft indices that the text goes through."""
    node, path = 0, list[int]()
    for token in text:
        options = draft.successors[node]
        if token not in options:
            break
        path.append(options[token])
        node = options[token] + 1
    return path
