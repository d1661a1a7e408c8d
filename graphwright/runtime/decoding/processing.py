"""Logits processors over rows of different lengths."""

from __future__ import annotations

import torch

from graphwright.runtime.decoding.transcript import Transcript


class RaggedProcessors:
    """Calls a ``LogitsProcessorList`` as stock generation would, though rows are at different lengths.

    A processor may look at the length of ``input_ids`` (minimum length, forced eos) and at the row number
    (encoder penalties, prefix constraints). So it is always given the whole batch, in order, once for
    each length that occurs; the scores of rows at other lengths are discarded.
    """

    def __init__(self, transcript: Transcript) -> None:
        self._transcript = transcript
        self._processors = transcript.request.processors

    def __call__(self, logits: torch.Tensor, rows: list[int], taken: list[list[int]]) -> torch.Tensor:
        """Processed scores ``[R, V]``.

        Args:
            logits: ``[R, V]`` float32; may be written to.
            rows: the batch row of each.
            taken: the tokens each row took in this cycle, before they are in the transcript.
        """
        transcript = self._transcript
        lengths = []
        for row, tokens in zip(rows, taken, strict=True):
            start = len(transcript.tokens[row])
            transcript.write(row, start, tokens)
            lengths.append(start + len(tokens))
        batch = transcript.request.batch
        if len(rows) == batch and len(set(lengths)) == 1:
            return self._processors(transcript.text(lengths[0]), logits)
        out = torch.empty_like(logits)
        for length in sorted(set(lengths)):
            places = [place for place, other in enumerate(lengths) if other == length]
            whole = logits.new_zeros((batch, logits.shape[1]))
            at = [rows[place] for place in places]
            whole[at] = logits[places]
            out[places] = self._processors(transcript.text(length), whole)[at]
        return out
