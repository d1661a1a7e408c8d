"""Verifiers: which of the draft's tokens the target would have produced itself.

A verifier walks each row's draft from the root. At every node the target's logits, after the logits
processors saw exactly the text up to that node, choose one token; if the draft has a child with that
token the walk goes on there, otherwise it ends with the chosen token. All rows walk level by level
together. So the processors are called once for every token produced, in order, and never for a
rejected branch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from graphwright.runtime.speculation.draft import Draft
from graphwright.runtime.speculation.verifiers.sampling_rule import SamplingRule

#: (logits [R, V] float32, batch rows [R], tokens each row took in this walk) -> processed scores [R, V]
Processor = Callable[[torch.Tensor, list[int], list[list[int]]], torch.Tensor]


@dataclass(slots=True)
class Verdict:
    """One row's outcome of a cycle.

    Args:
        tokens: the new tokens: those of the accepted path, then the one that the target chose instead of
            going on (missing only if the path ended in an end-of-sequence token).
        path: draft indices accepted, from the root down.
        scores, logits: the processed scores and raw logits ``[V]`` (float32) that chose each token; empty
            unless kept.
    """

    tokens: list[int] = field(default_factory=list)
    path: list[int] = field(default_factory=list)
    scores: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


def most_likely(scores: torch.Tensor) -> Any:
    """The first index of the maximum over the last dimension, as nested lists of the other dimensions.

    On a CPU numpy's search is vectorized and torch's is not: 11 us against 198 for 49,152 bf16 logits.
    """
    if scores.device.type == "cpu":
        return scores.detach().float().numpy().argmax(-1).tolist()
    return scores.argmax(-1).tolist()


class Verifier(ABC):
    """Walks the drafts of a batch over the target's logits.

    Args:
        process: the logits processors, or None when there are none.
        stop: end-of-sequence tokens; a walk ends at the first.
        keep_scores, keep_logits: fill :attr:`Verdict.scores` and :attr:`Verdict.logits`.
    """

    def __init__(
        self,
        process: Processor | None = None,
        stop: Collection[int] = (),
        *,
        keep_scores: bool = False,
        keep_logits: bool = False,
    ) -> None:
        self.process, self.stop = process, stop
        self.keep_scores, self.keep_logits = keep_scores, keep_logits

    @abstractmethod
    def choose(
        self,
        scores: torch.Tensor,
        rows: list[int],
        batch: int,
        drafts: Sequence[Draft],
        nodes: Sequence[int],
    ) -> list[int]:
        """The next token of each of the R rows, from its scores ``[R, V]`` at step token ``nodes[r]``."""

    def verify(self, logits: torch.Tensor, drafts: Sequence[Draft], rows: list[int]) -> list[Verdict]:
        """Walk ``drafts[row]`` over ``logits[row]`` for each of ``rows``.

        Args:
            logits: ``[B, T, V]``; column 0 belongs to the root, column i + 1 to draft token i.
            drafts: one for each of the B rows.
            rows: the batch rows that take part.

        Returns:
            One verdict for each of ``rows``.
        """
        batch = logits.shape[0]
        verdicts = [Verdict() for _ in rows]
        successors = [drafts[row].successors if drafts[row].tokens else None for row in rows]
        walking, nodes = list(range(len(rows))), [0] * len(rows)
        while walking:
            at = [rows[index] for index in walking]
            here = [nodes[index] for index in walking]
            raw = self._gather(logits, at, here)
            scores = raw
            if self.process is not None:
                taken = [verdicts[index].tokens for index in walking]
                scores = self.process(raw.clone() if self.keep_logits else raw, at, taken)
            picks = self.choose(scores, at, batch, [drafts[row] for row in at], here)
            onward = []
            for place, (index, token) in enumerate(zip(walking, picks, strict=True)):
                verdict, options = verdicts[index], successors[index]
                verdict.tokens.append(token)
                if self.keep_scores:
                    verdict.scores.append(scores[place])
                if self.keep_logits:
                    verdict.logits.append(raw[place])
                child = None if options is None else options[nodes[index]].get(token)
                if child is not None:
                    verdict.path.append(child)
                    nodes[index] = child + 1
                    if token not in self.stop:
                        onward.append(index)
            walking = onward
        return verdicts

    @staticmethod
    def _gather(logits: torch.Tensor, rows: list[int], nodes: list[int]) -> torch.Tensor:
        """``logits[rows, nodes]`` as a float32 copy ``[R, V]``."""
        if len(rows) == logits.shape[0] and not any(nodes):
            return logits[:, 0].to(dtype=torch.float32, copy=True)
        at = torch.tensor([rows, nodes], device=logits.device)
        return logits[at[0], at[1]].float()


class GreedyVerifier(Verifier):
    """Keeps what greedy decoding would have produced, token for token."""

    def choose(
        self,
        scores: torch.Tensor,
        rows: list[int],
        batch: int,
        drafts: Sequence[Draft],
        nodes: Sequence[int],
    ) -> list[int]:
        picks: list[int] = most_likely(scores)
        return picks

    def verify(self, logits: torch.Tensor, drafts: Sequence[Draft], rows: list[int]) -> list[Verdict]:
        if self.process is not None or self.keep_scores or self.keep_logits:
            return super().verify(logits, drafts, rows)
        # Without processors a node's choice depends on nothing but its logits: one argmax for all nodes.
        best: list[list[int]] = most_likely(logits)
        verdicts = []
        for row in rows:
            choices, draft = best[row], drafts[row]
            if not draft.tokens:
                verdicts.append(Verdict([choices[0]]))
                continue
            successors = draft.successors
            tokens, path, node = [choices[0]], [], 0
            while (child := successors[node].get(tokens[-1])) is not None:
                path.append(child)
                if tokens[-1] in self.stop:
                    break
                node = child + 1
                tokens.append(choices[node])
            verdicts.append(Verdict(tokens, path))
        return verdicts


class SamplingVerifier(Verifier):
    """Keeps the target's distribution, exactly unless the rule says otherwise.

    A deterministic draft (no ``q``; chain or tree) is verified by drawing from the target and following the
    child that was drawn: the draw itself is the target's, and no rule accepts a given set of children more
    often. Children drawn from a distribution are verified by ``rule``.

    Draws are made for the whole batch, as stock ``generate`` does, so that without a draft, or with one
    row, a seed gives the same tokens as stock.

    Args:
        rule: for drawn drafts.
        process, stop, keep: as for every verifier.
    """

    def __init__(
        self,
        rule: SamplingRule,
        process: Processor | None = None,
        stop: Collection[int] = (),
        **keep: bool,
    ) -> None:
        super().__init__(process, stop, **keep)
        self.rule = rule

    def choose(
        self,
        scores: torch.Tensor,
        rows: list[int],
        batch: int,
        drafts: Sequence[Draft],
        nodes: Sequence[int],
    ) -> list[int]:
        probabilities = torch.softmax(scores, dim=-1)
        judged = [place for place in range(len(rows)) if self._judges(drafts[place], nodes[place])]
        picks = [0] * len(rows) if len(judged) == len(rows) else self._draw(probabilities, rows, batch)
        for place in judged:
            draft, node, p = drafts[place], nodes[place], probabilities[place]
            q = draft.law(node)
            picks[place] = self.rule.pick(p, None if q is None else q.to(p), draft.drawn(node))
        return picks

    def _judges(self, draft: Draft, node: int) -> bool:
        """Whether the rule, and not a draw from the target, chooses below this step token."""
        if not draft.tokens or not draft.successors[node]:
            return False
        return self.rule.judges_guesses or draft.law(node) is not None

    @staticmethod
    def _draw(probabilities: torch.Tensor, rows: list[int], batch: int) -> list[int]:
        if len(rows) == batch:
            everywhere: list[int] = torch.multinomial(probabilities, 1).squeeze(1).tolist()
            return everywhere
        whole = probabilities.new_ones((batch, probabilities.shape[1]))
        whole[rows] = probabilities
        drawn: list[int] = torch.multinomial(whole, 1).squeeze(1).tolist()
        return [drawn[row] for row in rows]
