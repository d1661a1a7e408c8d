"""Drafting from the candidates that the target itself considered before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from graphwright.ir.errors import InputError
from graphwright.kernels.top_tokens import MAX_TOP_TOKENS, top_tokens
from graphwright.runtime.speculation.calibration import Candidate, Tally
from graphwright.runtime.speculation.drafter import Generation, Outcome, drafter
from graphwright.runtime.speculation.following import Follower
from graphwright.runtime.speculation.successors import Successors

#: The last tokens of a text, at most ``order`` of them.
Context = tuple[int, ...]


class Row(NamedTuple):
    """Tokens that the target considered in some place, with their probabilities there, likeliest first."""

    generation: int
    candidates: list[tuple[int, float]]


#: Contexts kept of each length: what has not been refreshed for longest is forgotten.
_MOST_CONTEXTS = 65536


@drafter("recycling")
@dataclass
class RecyclingDrafter(Follower[Context]):
    """Proposes the k tokens that the target found likeliest when it last saw the same token.

    An adjacency matrix has a row of k candidates for each token, replaced whenever a step has logits behind
    that token: also those of rejected draft tokens, which would be thrown away otherwise, if the token has no
    row yet. A tree over the matrix is the draft. The matrix outlives generations.

    Options:
        k: candidates of a row.
        order: 1 is the paper's matrix. With 2, rows of the last *two* tokens are kept as well and come first,
            which drafts about a quarter better.
        forget: start every generation with an empty matrix.

    Source: Luo et al. 2024, "Turning Trash into Treasure: Accelerating Inference of Large Language Models
    with Token Recycling".
    """

    wants_logits: ClassVar[bool] = True

    k: int = 8
    order: int = 2
    forget: bool = False
    _rows: list[Context] = field(default_factory=list, init=False, repr=False, compare=False)
    _matrix: list[dict[Context, Row]] = field(default_factory=list, init=False, repr=False, compare=False)
    _generation: int = field(default=0, init=False, repr=False, compare=False)
    _tally: Tally = field(default_factory=Tally, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= self.k <= MAX_TOP_TOKENS or self.order < 1:
            raise InputError(
                f"k={self.k} or order={self.order} leaves nothing to recycle, or too much",
                where="drafter=recycling",
                hint=f"k from 1 to {MAX_TOP_TOKENS}, order >= 1",
            )

    def begin(self, generation: Generation) -> None:
        self.settle()
        self._generation += 1
        self._rows = [tuple(prompt[-self.order :]) for prompt in generation.prompts]
        if self.forget or not self._matrix:
            self._matrix = [{} for _ in range(self.order)]

    def observe(self, row: int, outcome: Outcome) -> None:
        contexts = [self._rows[row]]
        for token in outcome.tokens:
            self._tally.learn(self._listed(contexts[-1]), token)
            contexts.append((*contexts[-1], token)[-self.order :])
        self._rows[row] = contexts.pop()
        if outcome.logits is None:  # a source of a mix that is replayed over a text
            return
        nodes = outcome.nodes
        for node, context in self._unknown(outcome, contexts):
            nodes.append(node)
            contexts.append(context)
        best = top_tokens(outcome.logits[nodes], min(self.k, outcome.logits.shape[1]))
        tokens, chances = best[0].tolist(), best[1].exp().tolist()
        for context, *candidates in zip(contexts, tokens, chances, strict=True):
            self._refresh(context, Row(self._generation, list(zip(*candidates, strict=True))))

    def _unknown(self, outcome: Outcome, path: Sequence[Context]) -> list[tuple[int, Context]]:
        """The rejected step tokens that have no row, one for each token, and that get none on the path."""
        draft, found = outcome.draft, []
        contexts = [path[0]]
        known = {context[-1] for context in path}
        for index, token in enumerate(draft.tokens):
            parent = index if draft.parents is None else draft.parents[index] + 1
            contexts.append((*contexts[parent], token)[-self.order :])
            if token not in known and (token,) not in self._matrix[0]:
                known.add(token)
                found.append((index + 1, contexts[-1]))
        return found

    def _refresh(self, context: Context, row: Row) -> None:
        for length in range(1, len(context) + 1):
            rows, key = self._matrix[length - 1], context[-length:]
            rows.pop(key, None)  # the newest rows come last
            rows[key] = row
            if len(rows) > _MOST_CONTEXTS:
                del rows[next(iter(rows))]

    def root(self, row: int) -> Context:
        return self._rows[row]

    def follow(self, row: int, state: Context, token: int) -> Context:
        return (*state, token)[-self.order :]

    def candidates(self, row: int, state: Context) -> Successors:
        return self._tally.rank(self._listed(state))

    def _listed(self, context: Context) -> Sequence[Candidate]:
        """The row of the longest context that has one. Rows of this generation are kinds of their own."""
        for length in range(len(context), 0, -1):
            row = self._matrix[length - 1].get(context[-length:])
            if row is not None:
                new = row.generation == self._generation
                return [
                    (token, (new, length, rank, int(8 * chance)), chance * length / (length + 1))
                    for rank, (token, chance) in enumerate(row.candidates)
                ]
        return []
