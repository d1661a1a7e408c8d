"""Drafting by copying on from the last place with the same ending."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from graphwright.ir.errors import InputError
from graphwright.runtime.speculation.calibration import Candidate, Tally
from graphwright.runtime.speculation.drafter import Generation, Outcome, drafter
from graphwright.runtime.speculation.following import Follower
from graphwright.runtime.speculation.successors import Successors

#: Longest stretch that is compared to tell a copy's chance.
_LONGEST = 32


class Copying(NamedTuple):
    """What is being copied.

    Attributes:
        source: position of the next token to copy; -1 for none.
        same: tokens before it that are the same as the text's last ones, at most :data:`_LONGEST`.
        copied: tokens of the block so far.
    """

    source: int
    same: int
    copied: int


_NOTHING = Copying(-1, 0, 0)


class CopiedText:
    """A growing text that knows where its last gamma tokens were before, at a constant cost a token."""

    def __init__(self, tokens: Sequence[int], gamma: int) -> None:
        self.tokens: list[int] = []
        self._gamma = gamma
        self._ends: dict[tuple[int, ...], int] = {}
        self._source = -1
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """Append one token."""
        self.tokens.append(token)
        end = len(self.tokens)
        if end < self._gamma:
            return
        key = tuple(self.tokens[end - self._gamma :])
        self._source = self._ends.get(key, -1)
        self._ends[key] = end

    def source(self) -> Copying:
        """What followed the last earlier occurrence of the last gamma tokens."""
        source, tokens = self._source, self.tokens
        if source < 0:
            return _NOTHING
        same, most = self._gamma, min(source, _LONGEST)
        while same < most and tokens[source - same - 1] == tokens[-same - 1]:
            same += 1
        return Copying(source, same, 0)


@drafter("copy")
@dataclass
class CopyDrafter(Follower[Copying]):
    """Copies a block from behind the last earlier occurrence of the text's last gamma tokens.

    Options:
        gamma: tokens that have to be the same.
        block: most tokens copied in a cycle.

    Source: Dumitru et al. 2025, "CopySpec: Accelerating LLMs with Speculative Copy-and-Paste Without
    Compromising Quality".
    """

    gamma: int = 3
    block: int = 10
    _rows: list[CopiedText] = field(default_factory=list, init=False, repr=False, compare=False)
    _tally: Tally = field(default_factory=Tally, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.gamma < 1 or self.block < 1:
            raise InputError(
                f"gamma={self.gamma} or block={self.block} leaves nothing to copy",
                where="drafter=copy",
                hint="gamma >= 1, block >= 1",
            )

    def begin(self, generation: Generation) -> None:
        self.settle()
        self._rows = [CopiedText(prompt, self.gamma) for prompt in generation.prompts]

    def observe(self, row: int, outcome: Outcome) -> None:
        text = self._rows[row]
        for token in outcome.tokens:
            self._tally.learn(self._listed(text, text.source()), token)
            text.append(token)

    def root(self, row: int) -> Copying:
        return self._rows[row].source()

    def follow(self, row: int, state: Copying, token: int) -> Copying:
        source, same, copied = state
        if source < 0 or self._rows[row].tokens[source] != token or source + 1 == len(self._rows[row].tokens):
            return _NOTHING
        return Copying(source + 1, min(same + 1, _LONGEST), copied + 1)

    def candidates(self, row: int, state: Copying) -> Successors:
        return self._tally.rank(self._listed(self._rows[row], state))

    def _listed(self, text: CopiedText, state: Copying) -> list[Candidate]:
        if state.source < 0 or state.copied >= self.block:
            return []
        return [(text.tokens[state.source], state.same, state.same / (state.same + 2))]

    def default_length(self) -> int:
        return self.block
