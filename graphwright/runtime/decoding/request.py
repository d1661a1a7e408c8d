"""One generation, spelled out: what the loop needs to know after transformers prepared the call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from graphwright.ir.errors import InputError
from graphwright.runtime.decoding.inputs import compact_rows

# transformers' processors whose output depends on (input_ids, scores) alone. With speculation rows of
# a batch are at different lengths, so a processor is called once per length: harmless for these.
_STATELESS = frozenset(
    {
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TopHLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "RepetitionPenaltyLogitsProcessor",
        "EncoderRepetitionPenaltyLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "EncoderNoRepeatNGramLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "NoBadWordsLogitsProcessor",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "InfNanRemoveLogitsProcessor",
        "ExponentialDecayLengthPenalty",
        "SuppressTokensLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor",
        "LogitNormalization",
        "WatermarkLogitsProcessor",
    }
)


def is_stateless(processor: Any) -> bool:
    """Whether a logits processor may be called out of step order: known, or marked ``stateless = True``."""
    cls = type(processor)
    if cls.__module__ == "transformers.generation.logits_process" and cls.__name__ in _STATELESS:
        return True
    return bool(getattr(processor, "stateless", False))


@dataclass(frozen=True)
class Request:
    """One generation.

    Args:
        ids: ``[B, L]`` the prompt as the caller laid it out, padding included.
        prompts: each row's real tokens.
        max_new_tokens: most tokens a row may get.
        eos: end-of-sequence tokens; a row ends with the first.
        pads: whether a finished row is filled up with ``pad`` (stock does so only if an eos criterion
            exists; otherwise a finished row goes on until all are finished).
        pad: the fill token.
        processors, criteria: the rest of transformers' lists, eos and length taken out of the latter.
        sample: draw instead of taking the most likely token.
        streamer: gets every step's tokens ``[B]`` in order.
        keep_scores, keep_logits: record the processed scores and the raw logits of every step.
    """

    ids: torch.Tensor
    prompts: list[list[int]]
    max_new_tokens: int
    eos: frozenset[int]
    pads: bool
    pad: int
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    sample: bool
    streamer: Any
    keep_scores: bool
    keep_logits: bool

    @property
    def temperature(self) -> float:
        """By which scores are divided before a token is drawn."""
        found = [p.temperature for p in self.processors if type(p).__name__ == "TemperatureLogitsWarper"]
        return float(found[-1]) if found else 1.0

    @property
    def batch(self) -> int:
        """Rows of the request."""
        return self.ids.shape[0]

    @property
    def stateful_processors(self) -> list[str]:
        """Names of the processors that may keep state between calls."""
        return [type(processor).__name__ for processor in self.processors if not is_stateless(processor)]


def make_request(
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    processors: LogitsProcessorList,
    criteria: Sequence[Any],
    config: Any,
    streamer: Any,
) -> Request:
    """Build the request from what ``GenerationMixin.generate`` prepared.

    End-of-sequence tokens and the maximum length are checked for every token anyway, so their criteria
    become plain numbers and the loop need not build a tensor of all tokens for them.

    Raises:
        InputError: rows can end at different times and there is no pad token.
    """
    limit: int = config.max_length
    eos: set[int] = set()
    others = StoppingCriteriaList()
    for criterion in criteria:
        if type(criterion) is MaxLengthCriteria:
            limit = min(limit, criterion.max_length)
        elif type(criterion) is EosTokenCriteria:
            eos.update(torch.as_tensor(criterion.eos_token_id).reshape(-1).tolist())
        else:
            others.append(criterion)
    pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
    pad_tensor = getattr(config, "_pad_token_tensor", None)
    pad = config.pad_token_id if pad_tensor is None else int(pad_tensor.reshape(-1)[0])
    if pads and pad is None and ids.shape[0] > 1:
        raise InputError(
            "rows can end at different times and there is no pad token",
            where="generate",
            hint="set pad_token_id",
        )
    wants = bool(config.return_dict_in_generate)
    return Request(
        ids=ids,
        prompts=compact_rows(ids, mask),
        max_new_tokens=max(limit - ids.shape[1], 1),
        eos=frozenset(eos),
        pads=pads,
        pad=pad or 0,
        processors=processors,
        criteria=others,
        sample=bool(config.do_sample),
        streamer=streamer,
        keep_scores=wants and bool(config.output_scores),
        keep_logits=wants and bool(config.output_logits),
    )
