"""A program over a cache of its own, which follows the rows' texts: a second model that drafts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphwright.runtime.decoding.inputs import right_padded
from graphwright.runtime.decoding.rectify import from_newest
from graphwright.runtime.speculation.drafter import Outcome
from graphwright.runtime.speculation.program_drafter import DraftSession
from graphwright.runtime.speculation.translation import Translation
from graphwright.runtime.speculation.tree import MAX_TREE_TOKENS, StepTokens
from graphwright.runtime.transfers import upload


class ModelSession(DraftSession):
    """What a draft model has read of every row.

    Tokens of the text that it has not read yet are run in front of a cycle's first step. Drafted tokens are
    read without being committed; those that were accepted are committed, where they lie, before the next
    cycle's first step.

    Args:
        program: the draft model.
        prompts: what it reads of each row's prompt, in its own tokens; at least one token each.
        capacity: tokens that a row may reach, in its own tokens.
        originals: the rows' prompts in the target's tokens.
        translation: to its own tokens.

    Attributes:
        limit: tokens of a row that it can read.
    """

    def __init__(
        self,
        program: Any,
        prompts: Sequence[list[int]],
        capacity: int,
        originals: Sequence[list[int]],
        translation: Translation,
    ) -> None:
        most = program.max_positions
        self.program, self.device = program, program.device
        self.limit = capacity if most is None else min(capacity, most)
        self._translation = translation
        self._originals = [list(row) for row in originals]
        self._texts = [list(row) for row in prompts]  # in its own tokens, the root's last
        self._read = [len(row) for row in prompts]  # of a row's text, how many tokens are in the cache
        self._ahead = [0] * len(prompts)
        self._tried: list[list[int]] = [[] for _ in prompts]  # what a cycle has advanced by
        self._leads = [0] * len(prompts)  # of the last step, tokens in front that are to be committed
        self._last: list[list[int]] = [[] for _ in prompts]  # the last step's tokens
        self.state = program.borrow(len(prompts), self.limit)
        program.prefill(self.state, *right_padded(list(self._texts), self.device))

    def close(self) -> None:
        """The generation is over: let go of the cache."""
        self.program.give_back(self.state)
        del self.state

    def reads(self, row: int) -> int:
        """Tokens of a row's text, the root's included, in its own tokens."""
        return len(self._texts[row])

    def observe(self, row: int, outcome: Outcome) -> None:
        text, before, tokens = self._texts[row], self._originals[row], list(outcome.tokens)
        # A root there must be: what is nothing in its own tokens is read as the last token once more.
        text += self._translation.read(before, tokens) or text[-1:]
        before += tokens

    def step(self, step: StepTokens) -> torch.Tensor:
        self._commit_leads()
        if not any(self._ahead):
            self._commit_accepted()
        counts, lines = step.counts.tolist(), step.tokens.tolist()
        starting = [count > 0 and ahead == 0 for count, ahead in zip(counts, self._ahead, strict=True)]
        leads = self._missing(starting)
        if max(map(len, leads)) + len(lines[0]) > MAX_TREE_TOKENS:
            self._catch_up(leads)
            leads = [[] for _ in leads]
        self._leads = [len(lead) for lead in leads]
        self._last = [
            [*lead, *self._own(row, line[:count], starting[row])]
            for row, (lead, line, count) in enumerate(zip(leads, lines, counts, strict=True))
        ]
        logits = self._run(self._last, *self._shifted(step))
        return from_newest(logits, self._leads, len(lines[0])) if any(self._leads) else logits

    def advance(self, counts: Sequence[int]) -> None:
        begin = list(self._leads)
        self._commit_leads()
        self.state.advance(counts)
        for row, (start, count) in enumerate(zip(begin, counts, strict=True)):
            self._tried[row] += self._last[row][start : start + count]
            self._ahead[row] += count

    def retreat(self) -> None:
        self.state.retreat()
        self._ahead = [0] * len(self._ahead)

    # --- the cache -------------------------------------------------------------------------------

    def _missing(self, rows: Sequence[bool]) -> list[list[int]]:
        """The tokens before its root that each of these rows has not read."""
        return [
            text[read:-1] if wanted else []
            for text, read, wanted in zip(self._texts, self._read, rows, strict=True)
        ]

    def _commit_accepted(self) -> None:
        """Commit what the last cycle advanced by and the text went on with; no step has run since."""
        accepted = []
        for tried, missing in zip(self._tried, self._missing([True] * len(self._tried)), strict=True):
            pairs = zip(tried, missing, strict=False)
            accepted.append(next((i for i, (one, other) in enumerate(pairs) if one != other), len(tried)))
            accepted[-1] = min(accepted[-1], len(missing))
        self._commit(accepted)
        self._tried = [[] for _ in self._tried]

    def _commit_leads(self) -> None:
        leads, self._leads = self._leads, [0] * len(self._leads)
        self._commit(leads)

    def _commit(self, counts: Sequence[int]) -> None:
        if any(counts):
            self.state.commit(upload(list(counts), self.device), counts)
            self._read = [read + count for read, count in zip(self._read, counts, strict=True)]

    def _catch_up(self, leads: Sequence[list[int]]) -> None:
        """Run and commit tokens that are too many to go in front of a step."""
        width = self.program.max_step_tokens
        for start in range(0, max(map(len, leads)), width):
            part = [lead[start : start + width] for lead in leads]
            self._run(part, None, None)
            self._commit([len(tokens) for tokens in part])

    # --- steps -----------------------------------------------------------------------------------

    def _own(self, row: int, tokens: Sequence[int], starting: bool) -> list[int]:
        """The step's tokens in the draft model's vocabulary; a cycle's first step begins with the root."""
        if not starting:
            return [self._translation.drafted(token) for token in tokens]
        return [self._texts[row][-1], *(self._translation.drafted(token) for token in tokens[1:])]

    def _run(
        self, rows: Sequence[list[int]], depth: torch.Tensor | None, tree: torch.Tensor | None
    ) -> torch.Tensor:
        tokens, counts = right_padded(list(rows), self.device)
        logits: torch.Tensor = self.program.step(self.state, tokens, counts, depth=depth, tree=tree)
        return logits

    def _shifted(self, step: StepTokens) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Depths and masks of a step behind the tokens in front of it, which are a chain."""
        if step.tree is None or step.depth is None:
            return None, None
        depths = [
            [*range(lead), *(depth + lead for depth in row)]
            for lead, row in zip(self._leads, step.depth.tolist(), strict=True)
        ]
        masks = [
            [*((2 << index) - 1 for index in range(lead)), *(mask << lead | (1 << lead) - 1 for mask in row)]
            for lead, row in zip(self._leads, step.tree.tolist(), strict=True)
        ]
        width = max(len(row) for row in self._last)
        return tuple(
            upload([(row + [0] * width)[:width] for row in rows], self.device) for rows in (depths, masks)
        )  # type: ignore[return-value]
