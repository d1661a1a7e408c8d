"""The decode loop that does not wait for its tokens.

On a GPU a step is queued in less time than it takes. So the next token is chosen on the device and fed to
the next step there, and the host reads it a few steps later, when it has long arrived: where a row ends is
decided then, and what was computed beyond its end is thrown away. The caller sees what
:class:`~graphwright.runtime.decoding.loop.DecodeLoop` would have given: tokens, statistics, the order of
calls of streamers and criteria, and the random numbers that were used.
"""

from __future__ import annotations

from collections import deque
from contextlib import nullcontext
from typing import Any

import torch

from graphwright.runtime.decoding.loop import DecodeLoop
from graphwright.runtime.decoding.protocol import DecodingProgram
from graphwright.runtime.decoding.request import Request
from graphwright.runtime.decoding.transcript import Transcript
from graphwright.runtime.speculation import Speculation
from graphwright.runtime.speculation.draft import NO_DRAFT
from graphwright.runtime.speculation.verifier import Verdict
from graphwright.runtime.transfers import Readback, upload

#: Steps that the host may be behind. Two keep a GPU busy; one more is for the time a streamer takes.
LAG = 3

# transformers' processors whose scores depend on nothing but the logits, and that never wait for them.
_ON_LOGITS = frozenset(
    {
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "InfNanRemoveLogitsProcessor",
        "SuppressTokensLogitsProcessor",
        "LogitNormalization",
    }
)


def why_token_by_token(request: Request, speculation: Speculation | None) -> str | None:
    """Why the host has to see every token of this request before the next step, or None if it has not."""
    if speculation is not None:
        return "drafts follow from the tokens so far"
    if request.keep_scores or request.keep_logits:
        return "scores of every step are kept"
    for processor in request.processors:
        cls = type(processor)
        if cls.__module__ != "transformers.generation.logits_process" or cls.__name__ not in _ON_LOGITS:
            return f"{cls.__name__} may look at the tokens so far"
    return None


def make_loop(program: DecodingProgram, request: Request, speculation: Speculation | None) -> DecodeLoop:
    """The loop for a request on a program."""
    if program.runs_ahead and not program.refresh and why_token_by_token(request, speculation) is None:
        return DeviceLoop(program, request)
    return DecodeLoop(program, request, speculation)


class DeviceLoop(DecodeLoop):
    """Runs a request without drafts, at most :data:`LAG` steps ahead of what the host has seen."""

    def __init__(self, program: DecodingProgram, request: Request) -> None:
        super().__init__(program, request)
        self._arrivals = Readback(program.device, (request.batch,), LAG + 1)
        self._draws = _Draws(program.device) if request.sample else None
        self._rows = list(range(request.batch))
        self._aside = _Aside(program.device) if request.criteria else nullcontext()

    def _make_transcript(self) -> Transcript:
        return Transcript(self.request, keep_text=bool(self.request.criteria))

    def _decode(self, state: Any, logits: torch.Tensor) -> None:
        request, device = self.request, self.program.device
        counts = [1] * request.batch
        fed = upload(counts, device)
        for made in range(1, request.max_new_tokens + 1):
            tokens = self._choose(logits[:, 0], fed)
            self._arrivals.put(tokens)
            if len(self._arrivals) > LAG:
                self._receive()
                if not self._rows:
                    return
            if made < request.max_new_tokens:
                if sum(counts) != len(self._rows):
                    counts = [int(row in self._rows) for row in range(request.batch)]
                    fed = upload(counts, device)
                logits = self.program.step(state, tokens[:, None], fed)
                state.commit(fed, counts)
        while self._rows:
            self._receive()

    def _choose(self, logits: torch.Tensor, fed: torch.Tensor) -> torch.Tensor:
        """The next token ``[B]`` of every row from its logits ``[B, V]``, on the device.

        The same numbers as the verifiers' without drafts. Rows that have ended get any token.

        Args:
            fed: ``[B]``, 0 for the rows that are known to have ended.
        """
        scores = logits
        if self.request.processors or self._draws is not None:
            scores = logits.to(dtype=torch.float32, copy=True)
        if self.request.processors:
            scores = self.request.processors(self.request.ids, scores)
        if self._draws is None:
            return scores.argmax(-1)
        probabilities = torch.softmax(scores, dim=-1)
        if len(self._rows) < self.request.batch:
            # Logits of rows that take no part are not defined; every row gets its numbers all the same.
            probabilities = torch.where(fed[:, None] > 0, probabilities, 1.0)
        tokens = torch.multinomial(probabilities, 1).squeeze(1)
        self._draws.drawn()
        return tokens

    def _receive(self) -> None:
        """Take in the oldest tokens that are under way."""
        first = not any(self.transcript.tokens)
        rows, tokens = self._rows, self._arrivals.take()
        verdicts = [Verdict([tokens[row]]) for row in rows]
        if self._draws is not None:
            self._draws.used()
        with self._aside:
            self.transcript.append(rows, verdicts)
        if not first:
            self._count(rows, [NO_DRAFT] * self.request.batch, verdicts)
        self._rows = self.transcript.active()

    def run(self) -> Transcript:
        """Generate until every row has ended."""
        try:
            return super().run()
        finally:
            if self._draws is not None:
                self._draws.undo_unused()


class _Draws:
    """Keeps account of the random numbers that were drawn ahead, to give them back.

    Args:
        device: whose default generator is drawn from. The generator's state is on the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._generator = torch.default_generator
        if device.type == "cuda":
            torch.cuda.init()
            index = torch.cuda.current_device() if device.index is None else device.index
            self._generator = torch.cuda.default_generators[index]
        self._unused: deque[torch.Tensor] = deque()
        self._used: torch.Tensor | None = None

    def drawn(self) -> None:
        """A step's tokens were drawn."""
        self._unused.append(self._generator.get_state())

    def used(self) -> None:
        """The oldest of them were taken."""
        self._used = self._unused.popleft()

    def undo_unused(self) -> None:
        """Go back to where the generator was after the last step that was used."""
        if self._used is not None and self._unused:
            self._generator.set_state(self._used)


class _Aside:
    """Where criteria look at the text: on a GPU, not behind the steps that are queued."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:  # the text was begun on the current one
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def __enter__(self) -> None:
        if self._stream is not None:
            self._within = torch.cuda.stream(self._stream)
            self._within.__enter__()

    def __exit__(self, *error: object) -> None:
        if self._stream is not None:
            self._within.__exit__(*error)
            # What was freed meanwhile may be used again by what is queued from now on.
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
