"""Lookahead decoding: Jacobi iteration in side branches of the draft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from graphwright.ir.errors import InputError
from graphwright.runtime.speculation.draft import NO_DRAFT, Draft
from graphwright.runtime.speculation.drafter import Drafter, Generation, Outcome, drafter
from graphwright.runtime.speculation.tree import MAX_TREE_TOKENS
from graphwright.runtime.speculation.verifier import most_likely


class Branches:
    """A draft tree that is built path by path; paths share their beginnings.

    Args:
        budget: most tokens.
    """

    def __init__(self, budget: int) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self._budget = budget
        self._nodes: dict[tuple[int, int], int] = {}

    def child(self, node: int, token: int) -> int | None:
        """The step token below step token ``node`` with this token; None if there is no room for it."""
        found = self._nodes.get((node, token))
        if found is None and len(self.tokens) < self._budget:
            self.tokens.append(token)
            self.parents.append(node - 1)
            found = self._nodes[node, token] = len(self.tokens)
        return found

    def path(self, node: int, tokens: Sequence[int]) -> int | None:
        """The last step token of a path below ``node``; None if it does not fit as a whole."""
        at: int | None = node
        for token in tokens:
            if at is None:
                return None
            at = self.child(at, token)
        return at


class Trajectory:
    """The window of one row: guesses for the next positions, of the last Jacobi iterations.

    Args:
        text: the prompt; its tokens are the first guesses.
        window: positions.
        levels: iterations that are kept; there are fewer in the beginning.
    """

    def __init__(self, text: Sequence[int], window: int, levels: int) -> None:
        self._most = levels
        self._levels = [[text[place % len(text)] for place in range(window)]]
        self._ends: list[int | None] = []

    def grow(self, tree: Branches) -> None:
        """Add the window to a tree: the oldest guesses as a path, below each of them its later iterations."""
        self._ends = []
        spine: int | None = 0
        for first, *later in zip(*self._levels, strict=True):
            spine = None if spine is None else tree.child(spine, first)
            self._ends.append(None if spine is None else tree.path(spine, later))

    def ends(self) -> list[int]:
        """The step tokens whose logits give the next iteration."""
        return [node for node in self._ends if node is not None]

    def advance(self, chosen: Sequence[int]) -> list[list[int]]:
        """Take the next iteration, one token for each of :meth:`ends`.

        Returns:
            The n-grams that are complete: each position's guesses through all iterations.
        """
        tokens = iter(chosen)
        last = self._levels[-1]
        newest = [old if end is None else next(tokens) for old, end in zip(last, self._ends, strict=True)]
        self._levels.append(newest)
        if len(self._levels) <= self._most:
            return []
        columns = zip(zip(*self._levels, strict=True), self._ends, strict=True)
        ngrams = [list(column) for column, end in columns if end is not None]
        del self._levels[0]
        return ngrams


class Pool:
    """N-grams by their first token, the newest last.

    Args:
        each: n-grams kept of a first token.
    """

    def __init__(self, each: int) -> None:
        self._each = each
        self._known: dict[int, dict[tuple[int, ...], None]] = {}

    def add(self, ngram: Sequence[int]) -> None:
        """Remember an n-gram."""
        rests = self._known.setdefault(ngram[0], {})
        rest = tuple(ngram[1:])
        rests.pop(rest, None)
        rests[rest] = None
        if len(rests) > self._each:
            del rests[next(iter(rests))]

    def after(self, token: int) -> list[tuple[int, ...]]:
        """What followed ``token``, the newest first."""
        return list(reversed(self._known.get(token, {})))


@drafter("lookahead")
@dataclass
class LookaheadDrafter(Drafter):
    """Solves for the next tokens by Jacobi iteration in the same steps, and verifies the n-grams that appear.

    The draft holds n-grams of the pool that start with the last token, and the window: guesses for the next
    positions of ``ngram - 1`` iterations as side branches. Their logits give the next iteration, and with it
    an n-gram for each position. N-grams of the text join the pool too.

    Options:
        window: positions.
        ngram: length of the n-grams.
        branches: n-grams that are verified in a step, and kept of each first token.

    Source: Fu et al. 2024, "Break the Sequential Dependency of LLM Inference Using Lookahead Decoding".
    """

    wants_logits: ClassVar[bool] = True
    makes_trees: ClassVar[bool] = True

    window: int = 4
    ngram: int = 4
    branches: int = 2
    _texts: list[list[int]] = field(default_factory=list, init=False, repr=False, compare=False)
    _windows: list[Trajectory] = field(default_factory=list, init=False, repr=False, compare=False)
    _pools: list[Pool] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.window < 1 or self.ngram < 2 or self.branches < 1:
            raise InputError(
                f"window={self.window}, ngram={self.ngram} or branches={self.branches} is too small",
                where="drafter=lookahead",
                hint="window >= 1, ngram >= 2, branches >= 1",
            )
        if self.default_length() >= MAX_TREE_TOKENS:
            raise InputError(
                f"window and branches take {self.default_length()} tokens, a draft has {MAX_TREE_TOKENS - 1}",
                where="drafter=lookahead",
                hint="(window + branches) * (ngram - 1) tokens have to fit",
            )

    def default_length(self) -> int:
        return (self.window + self.branches) * (self.ngram - 1)

    def begin(self, generation: Generation) -> None:
        prompts = generation.prompts
        self._texts = [[] for _ in prompts]
        self._pools = [Pool(self.branches) for _ in prompts]
        self._windows = [Trajectory(prompt, self.window, self.ngram - 1) for prompt in prompts]
        for row, prompt in enumerate(prompts):
            self._extend(row, prompt)

    def _extend(self, row: int, tokens: Sequence[int]) -> None:
        """Append to a row's text; its new n-grams join the pool."""
        text = self._texts[row]
        for token in tokens:
            text.append(token)
            if len(text) >= self.ngram:
                self._pools[row].add(text[-self.ngram :])

    def propose(self, rows: Sequence[int], budget: Sequence[int]) -> list[Draft]:
        return [self._draft(row, most) for row, most in zip(rows, budget, strict=True)]

    def _draft(self, row: int, budget: int) -> Draft:
        tree = Branches(budget)
        for rest in self._pools[row].after(self._texts[row][-1]):
            tree.path(0, rest)
        self._windows[row].grow(tree)
        return Draft(tree.tokens, tree.parents) if tree.tokens else NO_DRAFT

    def observe(self, row: int, outcome: Outcome) -> None:
        self._extend(row, outcome.tokens)
        window = self._windows[row]
        ends = window.ends()
        if not outcome.draft.tokens or not ends:
            return
        assert outcome.logits is not None, "it wants logits"
        for ngram in window.advance(most_likely(outcome.logits[ends])):
            self._pools[row].add(ngram)
