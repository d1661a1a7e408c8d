"""What has been generated so far, and what the caller has been told about it.

Rows may run ahead of one another: speculation accepts several tokens in one row and one in another. The
caller must not notice: stopping criteria and streamers see one step at a time, every row at the same
step, exactly as if tokens had been generated one by one. So the transcript *releases* a step when
every unfinished row has reached it; what a row has beyond its end is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphwright.runtime.decoding.request import Request
from graphwright.runtime.speculation.verifier import Verdict


class Transcript:
    """The tokens of a generation, row by row.

    Args:
        request: the generation.
        keep_text: keep a tensor of all tokens, which criteria and processors look at; by default if
            there are any.

    Attributes:
        tokens: new tokens of each row, in order; may run past what was released.
        calling: a criterion or streamer of the caller is running, or has raised an error.
    """

    def __init__(self, request: Request, keep_text: bool | None = None) -> None:
        self.request = request
        batch = request.batch
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self._end: list[int | None] = [None] * batch  # number of tokens the row ends with
        self._met: list[bool] = [False] * batch  # a criterion was met, but rows are not padded
        self._released = 0
        self._staged = bool(request.criteria) or request.streamer is not None
        self._keeps = request.keep_scores or request.keep_logits
        self._row_scores: list[list[torch.Tensor]] = [[] for _ in range(batch)]
        self._row_logits: list[list[torch.Tensor]] = [[] for _ in range(batch)]
        self.scores: tuple[torch.Tensor, ...] = ()
        self.logits: tuple[torch.Tensor, ...] = ()
        self._ids: torch.Tensor | None = None
        self.calling = False
        if bool(request.criteria or request.processors) if keep_text is None else keep_text:
            fill = request.ids.new_full((batch, request.max_new_tokens), request.pad)
            self._ids = torch.cat((request.ids, fill), dim=1)
        self._written = [0] * batch

    def active(self) -> list[int]:
        """Rows that need more tokens."""
        return [row for row, end in enumerate(self._end) if end is None]

    def remaining(self, row: int) -> int:
        """Tokens that ``row`` may still get."""
        return self.request.max_new_tokens - len(self.tokens[row])

    def append(self, rows: list[int], verdicts: Sequence[Verdict]) -> None:
        """Add one cycle's tokens and release the steps that are complete."""
        eos, most = self.request.eos, self.request.max_new_tokens
        for row, verdict in zip(rows, verdicts, strict=True):
            mine = self.tokens[row]
            mine.extend(verdict.tokens)
            if self._ids is not None:
                self.write(row, len(mine) - len(verdict.tokens), verdict.tokens)
            if self._keeps:
                self._row_scores[row].extend(verdict.scores)
                self._row_logits[row].extend(verdict.logits)
            if len(mine) >= most or mine[-1] in eos:
                self._end[row] = len(mine)
        if self._staged or self._keeps:
            self._release()

    def write(self, row: int, start: int, tokens: Sequence[int]) -> None:
        """Put ``tokens`` at positions ``start, ...`` after the prompt, where processors and criteria look."""
        assert self._ids is not None
        fresh = tokens[max(self._written[row] - start, 0) :]
        if fresh:
            at = self.request.ids.shape[1] + start + len(tokens) - len(fresh)
            self._ids[row, at : at + len(fresh)] = torch.tensor(fresh, device=self._ids.device)
            self._written[row] = start + len(tokens)

    def text(self, new_tokens: int) -> torch.Tensor:
        """A copy of the prompt and the first ``new_tokens`` steps: ``[B, L + new_tokens]``."""
        assert self._ids is not None
        return self._ids[:, : self.request.ids.shape[1] + new_tokens].clone()

    def _release(self) -> None:
        while True:
            step = self._released
            waiting = [end is None or step < end for end in self._end]
            ready = all(len(self.tokens[row]) > step for row, wait in enumerate(waiting) if wait)
            if not ready or not any(waiting):
                return
            column = [
                mine[step] if wait else self.request.pad
                for mine, wait in zip(self.tokens, waiting, strict=True)
            ]
            self._released += 1
            self._record(step, waiting)
            self.calling = True
            if self.request.criteria:
                self._apply_criteria(step, waiting)
            if self.request.streamer is not None:
                self.request.streamer.put(torch.tensor(column))
            self.calling = False

    def _record(self, step: int, waiting: list[bool]) -> None:
        """Assemble the step's scores and logits; rows that had ended before get zeros."""
        for kept, per_row, name in (
            (self.request.keep_scores, self._row_scores, "scores"),
            (self.request.keep_logits, self._row_logits, "logits"),
        ):
            if kept:
                blank = torch.zeros_like(per_row[waiting.index(True)][step])
                rows = zip(per_row, waiting, strict=True)
                stacked = torch.stack([row[step] if wait else blank for row, wait in rows])
                setattr(self, name, (*getattr(self, name), stacked))

    def _apply_criteria(self, step: int, waiting: list[bool]) -> None:
        scores = self.scores if self.request.keep_scores else None
        met = self.request.criteria(self.text(step + 1), scores).tolist()
        self._met = [before or now for before, now in zip(self._met, met, strict=True)]
        if self.request.pads:
            for row, wait in enumerate(waiting):
                if wait and self._met[row]:
                    self._finish(row, step + 1)
        elif all(self._met):
            for row in range(len(waiting)):
                self._finish(row, step + 1)

    def _finish(self, row: int, end: int) -> None:
        self._end[row] = end
        surplus = len(self.tokens[row]) - end
        if surplus > 0:
            del self.tokens[row][end:]
        if self._ids is not None:
            self._ids[row, self.request.ids.shape[1] + end :] = self.request.pad

    def sequences(self) -> torch.Tensor:
        """The prompt as given followed by the new tokens, padded after each row's end: ``[B, L + N]``."""
        width = max(len(row) for row in self.tokens)
        new = [row + [self.request.pad] * (width - len(row)) for row in self.tokens]
        ids = self.request.ids
        return torch.cat((ids, torch.tensor(new, dtype=ids.dtype, device=ids.device)), dim=1)
