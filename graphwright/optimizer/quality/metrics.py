"""What a program loses against the exact one: divergence, perplexity and agreement on given text.

Both programs run through their own caches, a few tokens at a time, so that what storage, sparsity or
skipping lose is seen. Logits of one step are compared and dropped: a whole ``[R, T, V]`` in float32
exists nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from graphwright.ir.errors import InputError
from graphwright.optimizer import machine
from graphwright.runtime.program import Program

#: Tokens of a step.
STEP_TOKENS = 16
_ROWS = 8  # run together
_KEEP_BYTES = 2**30  # of reference logits, in the model's own dtype


@dataclass(frozen=True)
class Quality:
    """How far a program is from the exact one. Every token of a row but the first counts.

    Attributes:
        kl: mean over tokens of KL(exact || program) over the vocabulary, in nats per token; infinite if
            the program's logits are NaN.
        perplexity_ratio: exp of the mean difference of the negative log-likelihoods of the rows' own
            tokens; above 1 the program is worse, below 1 it happens to be better.
        top1_agreement: share of tokens for which both programs' first choice is the same.
        tokens: how many tokens were compared.
        relative_logit_difference: the largest difference of a logit, in units of the exact program's
            largest.
    """

    kl: float
    perplexity_ratio: float
    top1_agreement: float
    tokens: int
    relative_logit_difference: float = 0.0

    @property
    def log_perplexity(self) -> float:
        """Natural logarithm of the perplexity ratio: the mean difference in nats per token."""
        return math.log(self.perplexity_ratio) if self.perplexity_ratio > 0 else -math.inf


def measure_quality(
    reference: Program, program: Program, rows: Sequence[Sequence[int]], *, step: int = STEP_TOKENS
) -> Quality:
    """Run both programs over the rows, step by step side by side.

    Identical programs give exactly 0, 1 and 1.

    Args:
        rows: token ids; rows may differ in length.
        step: tokens of a row in one step.

    Raises:
        InputError: no row has two tokens.
        CapacityError: a row is longer than the model's positions.
    """
    return Reference(reference, rows, step=step, keep_bytes=0).measure(program)


class Reference:
    """The exact program on given rows, to measure any number of programs against.

    Args:
        program: the exact program.
        rows: token ids; rows may differ in length.
        step: tokens of a row in one step.
        keep_bytes: most memory for its logits. If they need more, the exact program runs again beside
            each program that is measured.
        prompt: tokens at the start of each row that both programs run as a prompt, and that are not compared.

    Raises:
        InputError: no row has two tokens, or none after its prompt.
    """

    def __init__(
        self,
        program: Program,
        rows: Sequence[Sequence[int]],
        *,
        step: int = STEP_TOKENS,
        keep_bytes: int = _KEEP_BYTES,
        prompt: int = 0,
    ) -> None:
        rows = [row for row in rows if len(row) > prompt + 1]
        if not rows:
            raise InputError(
                "there is nothing to measure on: no row has two tokens after its prompt"
                if prompt
                else "there is nothing to measure on: no row has two tokens",
                where="calibration",
                hint="pass longer texts, or leave calibration out for the embedded one",
            )
        self._program, self._step = program, step
        self._batches = [
            _Batch(rows[i : i + _ROWS], program.device, prompt) for i in range(0, len(rows), _ROWS)
        ]
        compared = sum(b.tokens[:, prompt:].numel() for b in self._batches)
        needed = compared * program.vocab_size * program.dtype.itemsize
        self._kept: list[list[torch.Tensor]] | None = [] if needed <= keep_bytes else None

    def measure(self, program: Program) -> Quality:
        """What ``program`` loses on the rows."""
        totals = _Totals()
        # Ops without a kernel of their own run as their reference bodies, through the library.
        with machine.safe_library(program.dtype, program.device):
            for index in range(len(self._batches)):
                self._compare(index, program, totals)
        return totals.quality()

    def _compare(self, index: int, program: Program, totals: _Totals) -> None:
        batch = self._batches[index]
        pairs = zip(self._logits(index), batch.run(program, self._step), strict=True)
        starts = range(batch.prompt, batch.width, self._step)
        for start, (expected, actual) in zip(starts, pairs, strict=True):
            for row, count in enumerate(batch.counts(start, self._step).tolist()):
                if count:
                    targets = batch.targets[row, start : start + count]
                    totals.add(expected[row, :count], actual[row, :count], targets)

    def _logits(self, index: int) -> Iterator[torch.Tensor]:
        """Logits of the exact program on one batch of rows, step by step; kept at the first time."""
        batch = self._batches[index]
        if self._kept is None:
            yield from batch.run(self._program, self._step)
            return
        if index == len(self._kept):
            self._kept.append([logits.clone() for logits in batch.run(self._program, self._step)])
        yield from self._kept[index]


class _Batch:
    """Rows side by side: inputs ``[R, T]``, the tokens that follow them, and how many are valid.

    The first ``prompt`` of each run as a prompt; every row is longer.
    """

    def __init__(self, rows: Sequence[Sequence[int]], device: torch.device, prompt: int = 0) -> None:
        self.prompt = prompt
        self.lengths = torch.tensor([len(row) - 1 for row in rows], dtype=torch.int64, device=device)
        self.width = int(self.lengths.max())
        padded = [list(row) + [0] * (self.width + 1 - len(row)) for row in rows]
        every = torch.tensor(padded, dtype=torch.int64, device=device)
        self.tokens, self.targets = every[:, :-1].contiguous(), every[:, 1:]

    def counts(self, start: int, step: int) -> torch.Tensor:
        """``[R]``: valid tokens of the step that begins at ``start``."""
        return (self.lengths - start).clamp(0, min(step, self.width - start))

    def run(self, program: Program, step: int) -> Iterator[torch.Tensor]:
        """Logits ``[R, t, V]`` of each step after the prompt, through the program's own cache.

        Without a prompt, the first step counts as one.
        """
        state = program.allocate(len(self.lengths), self.width)
        if self.prompt:
            program.prefill(state, self.tokens[:, : self.prompt], torch.full_like(self.lengths, self.prompt))
        else:
            state.end_prompt(self.counts(0, step).tolist())
        for start in range(self.prompt, self.width, step):
            counts = self.counts(start, step)
            yield program.step(state, self.tokens[:, start : start + step].contiguous(), counts)
            state.commit(counts)


@dataclass
class _Totals:
    """Sums over tokens."""

    kl: float = 0.0
    nll: float = 0.0
    agreed: int = 0
    tokens: int = 0
    difference: float = 0.0
    largest: float = 0.0

    def add(self, expected: torch.Tensor, actual: torch.Tensor, targets: torch.Tensor) -> None:
        """Add tokens with logits ``[t, V]`` of both programs and the ids ``[t]`` that followed."""
        dtype = torch.promote_types(expected.dtype, torch.float32)
        expected, actual = expected.to(dtype), actual.to(dtype)
        self.tokens += len(targets)
        largest = _largest(expected)
        if not math.isfinite(largest):
            largest = _largest(expected.nan_to_num(0.0, 0.0, 0.0))
        self.largest = max(self.largest, largest)
        if torch.equal(expected, actual):  # spares what can only be zero; NaN is never equal
            self.agreed += len(targets)
            return
        self.agreed += int((expected.argmax(-1) == actual.argmax(-1)).sum())
        apart = expected - actual
        difference = _largest(apart)
        if math.isnan(difference):  # two equal infinities, tokens that are ruled out, do not differ
            apart = torch.where(expected == actual, 0.0, apart)
            difference = _largest(apart)
        self.difference = max(self.difference, math.inf if math.isnan(difference) else difference)
        # log p = x - log sum exp x, so that with d = x - y: KL = sum p d + log sum exp y - log sum exp x.
        before, after = expected.logsumexp(-1), actual.logsumexp(-1)
        share = (expected - before[:, None]).exp_()
        weighted = (share * apart).sum(-1)
        if not bool(weighted.isfinite().all()):  # 0 log 0 = 0
            weighted = torch.where(share > 0, share * apart, 0.0).sum(-1)
        self.kl += float((weighted + after - before).double().sum())
        lost = apart.gather(1, targets[:, None])[:, 0] + after - before
        self.nll += float(lost.double().sum())

    def quality(self) -> Quality:
        """The means."""
        kl, nll = (x / self.tokens for x in (self.kl, self.nll))
        lost = math.isnan(kl) or math.isnan(nll)
        return Quality(
            kl=math.inf if lost else max(kl, 0.0),  # rounding can make next to nothing negative
            perplexity_ratio=math.inf if lost or nll > 700 else math.exp(nll),
            top1_agreement=self.agreed / self.tokens,
            tokens=self.tokens,
            relative_logit_difference=self.difference / max(self.largest, 1e-6),
        )


def _largest(x: torch.Tensor) -> float:
    """The largest magnitude; NaN if there is one."""
    least, most = (float(end) for end in x.aminmax())
    return max(-least, most) if least == least else math.nan
