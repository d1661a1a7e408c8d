"""The decode loop, for plain and speculative generation alike.

A cycle feeds each unfinished row its newest token, which is not in the cache yet, followed by the row's
draft; the verifier keeps a path of the draft and adds one token; the state commits the path and forgets
the rest. Plain decoding is the case of empty drafts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from graphwright.ir.errors import InputError
from graphwright.runtime.decoding.inputs import right_padded
from graphwright.runtime.decoding.memory import free_memory, is_out_of_memory
from graphwright.runtime.decoding.processing import RaggedProcessors
from graphwright.runtime.decoding.protocol import DecodingProgram, DecodingState
from graphwright.runtime.decoding.rectify import dense_tokens, from_newest, until_pass, with_window
from graphwright.runtime.decoding.request import Request
from graphwright.runtime.decoding.transcript import Transcript
from graphwright.runtime.residual import ResidualStream
from graphwright.runtime.shared_prefix import tokens_to_share
from graphwright.runtime.speculation import Speculation
from graphwright.runtime.speculation.draft import NO_DRAFT, Draft
from graphwright.runtime.speculation.drafter import Drafter, Generation, Outcome
from graphwright.runtime.speculation.stats import GenerationStats
from graphwright.runtime.speculation.tree import MAX_TREE_TOKENS, StepTokens, pack
from graphwright.runtime.speculation.verifier import GreedyVerifier, SamplingVerifier, Verdict, Verifier
from graphwright.runtime.speculation.verifiers.recursive import Recursive
from graphwright.runtime.transfers import upload


def why_not_speculate(request: Request, speculation: Speculation | None) -> str | None:
    """Why this request cannot be speculated exactly, or None if it can (or nobody asked)."""
    names = request.stateful_processors
    if speculation is None or request.batch == 1 or not names:
        return None
    return (
        f"{', '.join(names)} may keep state from call to call, and rows of a batch would be processed at "
        "different lengths; set `stateless = True` on the processor if it keeps none"
    )


class DecodeLoop:
    """Runs one request on one program.

    Args:
        program: the compiled decoder.
        request: what to generate.
        speculation: drafter and length rule, or None.
    """

    def __init__(
        self,
        program: DecodingProgram,
        request: Request,
        speculation: Speculation | None = None,
    ) -> None:
        self.program, self.request = program, request
        self.stats = GenerationStats(calls=1, prompt_tokens=sum(len(prompt) for prompt in request.prompts))
        self.stats.speculation_off = why_not_speculate(request, speculation)
        self.speculation = None if self.stats.speculation_off else speculation
        self._shared = tokens_to_share(program.shared_prefix, request.prompts)
        self.stats.shared_prefix_tokens = self._shared
        self.transcript = self._make_transcript()
        longest = max(len(prompt) for prompt in request.prompts)
        self._capacity = longest + request.max_new_tokens
        self._committed = [len(prompt) for prompt in request.prompts]
        self._plain: tuple[list[int], torch.Tensor] | None = None
        self._leads = [0] * request.batch  # tokens of each row that the step runs again
        self._verifier = self._make_verifier()

    def _make_transcript(self) -> Transcript:
        return Transcript(self.request)

    def _make_verifier(self) -> Verifier:
        request = self.request
        process = RaggedProcessors(self.transcript) if request.processors else None
        keep = {"keep_scores": request.keep_scores, "keep_logits": request.keep_logits}
        if not request.sample:
            return GreedyVerifier(process, request.eos, **keep)
        rule = Recursive() if self.speculation is None else self.speculation.verifier
        return SamplingVerifier(rule, process, request.eos, **keep)

    def run(self) -> Transcript:
        """Generate until every row has ended."""
        state, logits = self._start()
        try:
            if self.speculation is not None:
                self.speculation.drafter.begin(self._generation(state, self.speculation))
                self.speculation.rule.begin(self.request.batch)
            self._decode(state, logits)
        finally:
            if self.speculation is not None:
                self.stats.speculation_off = self.speculation.drafter.stopped()
                self.speculation.drafter.release()
            self.program.give_back(state)
        self.stats.tokens = sum(len(row) for row in self.transcript.tokens)
        return self.transcript

    def _generation(self, state: Any, speculation: Speculation) -> Generation:
        return Generation(
            self.request.prompts,
            self.program,
            state,
            capacity=self._capacity,
            sample=self.request.sample,
            temperature=self.request.temperature,
            replacement=speculation.verifier.replacement,
        )

    def _start(self) -> tuple[Any, torch.Tensor]:
        """A state that holds the prompts, and the logits ``[B, 1, V]`` of their last tokens."""
        try:
            return self._prefill()
        except Exception as error:
            # States that are kept for later calls may hold the memory that this call needs.
            if not (is_out_of_memory(error) and free_memory(error, self.program)):
                raise
        return self._prefill()

    def _prefill(self) -> tuple[Any, torch.Tensor]:
        program, request = self.program, self.request
        state = program.borrow(request.batch, self._capacity, self._shared)
        logits = program.prefill(state, *right_padded(request.prompts, program.device))
        return state, logits[:, None]

    def _decode(self, state: Any, logits: torch.Tensor) -> None:
        """Generate from the prompts' logits until every row has ended."""
        program, request, transcript = self.program, self.request, self.transcript
        drafts: list[Draft] = [NO_DRAFT] * request.batch
        rows = list(range(request.batch))
        step: StepTokens | None = None
        stream: ResidualStream | None = None
        while True:
            verdicts = self._verifier.verify(logits, drafts, rows)
            transcript.append(rows, verdicts)
            if step is not None:
                self._count(rows, drafts, verdicts)
            going_on = transcript.active()
            if not going_on:
                break
            if step is not None:
                self._commit(state, step, rows, verdicts)
            if self.speculation is not None:
                started = time.perf_counter()
                self._observe(self.speculation.drafter, logits, stream, rows, drafts, verdicts)
                drafts = self._propose(state, going_on)
                self._count_drafting(self.speculation, time.perf_counter() - started)
            rows = going_on
            dense = self._rewind(state, rows)
            step = self._step_tokens(rows, drafts)
            stream = self._stream()
            watched: dict[str, Any] = {} if stream is None else {"visit": stream}
            logits = program.step(
                state, step.tokens, step.counts, depth=step.depth, tree=step.tree, dense=dense, **watched
            )
            if dense is not None:
                width = 1 + max(len(drafts[row].tokens) for row in rows)
                logits = from_newest(logits, self._leads, width)
                if stream is not None:
                    stream.kept = [from_newest(kept, self._leads, width) for kept in stream.kept]

    def _rewind(self, state: Any, rows: list[int]) -> torch.Tensor | None:
        """Take back what rows run again densely; how many tokens of each row read everything, if any do."""
        every = self.program.refresh
        if not every:
            return None
        dense = [0] * self.request.batch
        for row in rows:
            dense[row] = dense_tokens(len(self.transcript.tokens[row]), every)
        self._leads = [max(0, tokens - 1) for tokens in dense]
        if not any(dense):
            return None
        state.rewind(self._leads)
        for row, lead in enumerate(self._leads):
            self._committed[row] -= lead
        return upload(dense, self.program.device)

    def _step_tokens(self, rows: list[int], drafts: Sequence[Draft]) -> StepTokens:
        newest = self.transcript.tokens
        if any(draft.tokens for draft in drafts) or any(self._leads):
            roots: list[int | None] = [None] * self.request.batch
            behind = [NO_DRAFT] * self.request.batch
            for row in rows:
                root, *window = newest[row][-1 - self._leads[row] :]
                roots[row], behind[row] = root, with_window(drafts[row], window)
            return pack(roots, behind, self.program.device)
        if self._plain is None or self._plain[0] != rows:
            counts = upload([int(row in rows) for row in range(self.request.batch)], self.program.device)
            self._plain = (rows, counts)
        tokens = upload([[row[-1]] for row in newest], self.program.device)
        return StepTokens(tokens, self._plain[1], None, None)

    def _commit(self, state: Any, step: StepTokens, rows: list[int], verdicts: Sequence[Verdict]) -> None:
        kept = [0] * self.request.batch
        for row, verdict in zip(rows, verdicts, strict=True):
            kept[row] = self._leads[row] + 1 + len(verdict.path)
            self._committed[row] += kept[row]
        if step.tokens.shape[1] == 1:
            state.commit(step.counts, kept)
            return
        accepted = upload(kept, self.program.device)
        if step.tree is None:
            state.commit(accepted, kept)
            return
        width = max(kept)
        paths = [[0] * width for _ in kept]
        for row, verdict in zip(rows, verdicts, strict=True):
            lead = self._leads[row]
            paths[row][: kept[row]] = [*range(lead + 1), *(node + lead + 1 for node in verdict.path)]
        state.commit_path(torch.tensor(paths, dtype=torch.int64), accepted, kept)

    @staticmethod
    def _observe(
        drafter: Drafter,
        logits: torch.Tensor,
        stream: ResidualStream | None,
        rows: list[int],
        drafts: Sequence[Draft],
        verdicts: Sequence[Verdict],
    ) -> None:
        for row, verdict in zip(rows, verdicts, strict=True):
            hidden = [] if stream is None else [kept[row] for kept in stream.kept]
            drafter.observe(row, Outcome(verdict.tokens, drafts[row], verdict.path, logits[row], hidden))

    def _stream(self) -> ResidualStream | None:
        """Takes the residual stream of the next step, if the drafter wants it."""
        if self.speculation is None or not self.speculation.drafter.wants_hidden:
            return None
        return ResidualStream()

    def _propose(self, state: DecodingState, rows: list[int]) -> list[Draft]:
        """One draft a row, each within what may still be generated and what still fits the cache."""
        assert self.speculation is not None
        speculation, rule, transcript = self.speculation, self.speculation.rule, self.transcript
        most = min(self.program.max_step_tokens, MAX_TREE_TOKENS) - 1
        drafting, budget = [], []
        fits, every = state.room(), self.program.refresh
        for row in rows:
            room = min(transcript.remaining(row), self._capacity - self._committed[row], fits[row]) - 1
            limit = min(rule.budget(row), speculation.tokens, room, most)
            if every:
                generated = len(transcript.tokens[row])
                limit = min(limit, until_pass(generated, every) - 1, most - dense_tokens(generated, every))
            if limit > 0:
                drafting.append(row)
                budget.append(limit)
        drafts: list[Draft] = [NO_DRAFT] * self.request.batch
        proposed = speculation.propose(drafting, budget) if drafting else []
        for row, limit, draft in zip(drafting, budget, proposed, strict=True):
            if len(draft.tokens) > limit:
                raise InputError(
                    f"{speculation.drafter} proposed {len(draft.tokens)} tokens, its budget was {limit}",
                    where=f"row {row}",
                    hint="propose() must respect its budget",
                )
            drafts[row] = draft
        return drafts

    def _count_drafting(self, speculation: Speculation, seconds: float) -> None:
        mine = self.stats.drafter(speculation.drafter.name)
        mine.cycles += 1
        mine.seconds += seconds

    def _count(self, rows: list[int], drafts: Sequence[Draft], verdicts: Sequence[Verdict]) -> None:
        self.stats.cycles += 1
        self.stats.row_steps += len(rows)
        self.stats.tokens = sum(len(row) for row in self.transcript.tokens)
        if self.speculation is None:
            return
        mine = self.stats.drafter(self.speculation.drafter.name)
        for row, verdict in zip(rows, verdicts, strict=True):
            proposed = len(drafts[row].tokens)
            if proposed:
                mine.record(proposed, len(verdict.path))
                self.speculation.rule.update(row, proposed, len(verdict.path))
