"""The text that quality is measured on: the caller's, prose that ships with Python, or the model's own.

Random tokens say little about what a rewrite loses: on text that no model expects, all programs are
equally lost. Nothing is downloaded here; a tokenizer is used where the model's own folder has one.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import DynamicCache, PreTrainedModel

from graphwright.ir.errors import InputError
from graphwright.optimizer import machine
from graphwright.optimizer.quality.prose import passage
from graphwright.optimizer.quality.tokenizer import find_tokenizer, fits
from graphwright.optimizer.validate import check_calibration

#: Fewer tokens than this have too little context in front of them to say anything about a cache.
MIN_TOKENS = 16
_CHARACTERS = 8  # of English for one token, with room; more are taken where a tokenizer needs them

Source = Literal["caller", "embedded", "generated"]


@dataclass(frozen=True)
class Calibration:
    """Token rows to measure on.

    Attributes:
        rows: token ids of each row; rows may differ in length. Empty only for a model on the meta device
            that has no tokenizer: it has no weights to write text with.
        source: the caller's text, prose of Python's own documentation, or text sampled from the model.
        fingerprint: SHA-256 over the ids, as hex; equal for equal rows.
        note: what was left out, or why the text is of this source; for the report.
    """

    rows: list[list[int]]
    source: Source
    fingerprint: str
    note: str = ""


def calibration_text(
    model: PreTrainedModel,
    calibration: Sequence[Any] | torch.Tensor | None,
    *,
    seed: int = 0,
    rows: int = 4,
    tokens: int = 256,
) -> Calibration:
    """Rows to measure quality on; the same for the same arguments.

    Args:
        model: a transformers model; its folder is where a tokenizer is looked for.
        calibration: the caller's rows, as :func:`check_calibration` takes them, or strings (each is one
            row); None for the embedded text.
        seed: of the choice of passages, or of the sampling.
        rows: most rows that are used.
        tokens: most tokens of a row; the model's positions may allow fewer.

    Raises:
        InputError: a text that is empty or shorter than 16 tokens, strings without a tokenizer, ids
            outside of the vocabulary.
    """
    width = min(tokens, positions(model) or tokens)
    if calibration is not None:
        return _from_caller(model, calibration, rows, width)
    embedded, missing = _embedded(model, seed, rows, width)
    if embedded:
        return make_calibration(embedded, "embedded")
    if model.device.type == "meta":
        return make_calibration([], "generated", f"{missing}, and the model has no weights to sample from")
    sampled = sample_rows(model, seed=seed, rows=rows, tokens=width)
    return make_calibration(sampled, "generated", f"{missing}: the text is sampled from the model")


def make_calibration(rows: list[list[int]], source: Source, note: str = "") -> Calibration:
    """Rows with their fingerprint."""
    digest = hashlib.sha256(repr([list(map(int, row)) for row in rows]).encode())
    return Calibration(rows, source, digest.hexdigest(), note)


def vocabulary_size(model: PreTrainedModel) -> int:
    """How many token ids the model takes and predicts."""
    sizes = [
        module.weight.shape[0]
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        if isinstance(getattr(module, "weight", None), torch.Tensor)
    ]
    return int(min(sizes)) if sizes else int(model.config.get_text_config().vocab_size)


def positions(model: PreTrainedModel) -> int | None:
    """Most tokens of a sequence that the model was made for; None if it does not say."""
    text = model.config.get_text_config()
    found = (getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return next((limit for limit in found if isinstance(limit, int) and limit > 0), None)


# --- the caller's rows ---------------------------------------------------------------------------


def _from_caller(model: PreTrainedModel, calibration: Any, rows: int, width: int) -> Calibration:
    if isinstance(calibration, Sequence) and not isinstance(calibration, str | bytes):
        calibration = _tokenized(model, calibration)
    checked = check_calibration(calibration, vocabulary_size(model))
    assert checked is not None
    for index, row in enumerate(checked):
        if len(row) < MIN_TOKENS:
            raise InputError(
                f"a calibration text has {len(row)} tokens, and at least {MIN_TOKENS} are needed",
                where=f"calibration[{index}]",
                hint="pass longer texts, or leave calibration out for the embedded one",
            )
    note = f"the first {rows} of {len(checked)} rows" if len(checked) > rows else ""
    return make_calibration([row[:width].tolist() for row in checked[:rows]], "caller", note)


def _tokenized(model: PreTrainedModel, calibration: Sequence[Any]) -> list[Any]:
    """Strings as the model's tokenizer encodes them; other rows as they are."""
    texts = [index for index, row in enumerate(calibration) if isinstance(row, str)]
    for index in texts:
        if not calibration[index].strip():
            raise InputError(
                "a calibration text is empty",
                where=f"calibration[{index}]",
                hint="pass texts, or leave calibration out for the embedded one",
            )
    if not texts:
        return list(calibration)
    tokenizer, missing = find_tokenizer(model, vocabulary_size(model))
    if tokenizer is None:
        raise InputError(
            f"calibration holds text, and {missing}",
            where=f"calibration[{texts[0]}]",
            hint="pass token ids: [tokenizer(text).input_ids for text in texts]",
        )
    return [tokenizer(row, verbose=False).input_ids if isinstance(row, str) else row for row in calibration]


# --- prose ---------------------------------------------------------------------------------------


def _embedded(model: PreTrainedModel, seed: int, rows: int, width: int) -> tuple[list[list[int]], str]:
    """Rows of ``width`` ids each, or none and the reason."""
    vocabulary = vocabulary_size(model)
    tokenizer, missing = find_tokenizer(model, vocabulary)
    if tokenizer is None:
        return [], missing
    # Rows start at equal distances, so that they overlap only where the text is shorter than all of them.
    first = random.Random(seed).random()
    found = [_encode(tokenizer, (first + row / rows) % 1.0, width) for row in range(rows)]
    if any(len(ids) < width for ids in found):
        return [], "the tokenizer makes too few tokens of English prose"
    if not fits(tokenizer, [token for ids in found for token in ids], vocabulary):
        return [], "the tokenizer does not know the words of English prose, or the model not its tokens"
    return found, ""


def _encode(tokenizer: Any, start: float, width: int) -> list[int]:
    """``width`` ids of the prose from ``start`` (a share of it) on; fewer if all of it is not enough."""
    characters = width * _CHARACTERS
    while True:
        text = passage(start, characters)
        ids: list[int] = tokenizer(text, truncation=True, max_length=width).input_ids[:width]
        if len(ids) >= width or len(text) < characters:
            return ids
        characters *= 2


# --- the model's own words -----------------------------------------------------------------------


@torch.no_grad()
def sample_rows(model: PreTrainedModel, *, seed: int, rows: int, tokens: int) -> list[list[int]]:
    """``rows`` rows of ``tokens`` ids, sampled from the stock model at temperature 1.

    Each row starts with the model's first-of-text token, or a random one if it has none; the end of the
    text is never drawn. The global random state is neither read nor changed, and the settings of the
    model's generation configuration (penalties, top-k) play no part: text that is typical of the model
    is text on which its own logits are most telling.
    """
    vocabulary = vocabulary_size(model)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (rows, 1), generator=generator)
    start = _token_ids(model, "bos_token_id", vocabulary)
    if start:
        ids.fill_(start[0])
    ends = _token_ids(model, "eos_token_id", vocabulary)
    drawn, cache, training = [ids], DynamicCache(config=model.config), model.training
    model.eval()
    try:
        with machine.safe_library(model.dtype, model.device):
            for _ in range(tokens - 1):
                out = model(input_ids=drawn[-1].to(model.device), past_key_values=cache, use_cache=True)
                logits = out.logits[:, -1, :vocabulary].float().cpu()
                if len(ends) < vocabulary:
                    logits[:, ends] = -torch.inf
                drawn.append(torch.multinomial(logits.softmax(-1), 1, generator=generator))
    finally:
        model.train(training)
    sampled: list[list[int]] = torch.cat(drawn, dim=1).tolist()
    return sampled


def _token_ids(model: PreTrainedModel, name: str, vocabulary: int) -> list[int]:
    """The ids that the configuration gives as ``name``: none, one or several."""
    found = getattr(model.config.get_text_config(), name, None)
    if found is None:
        found = getattr(getattr(model, "generation_config", None), name, None)
    several = found if isinstance(found, list | tuple) else [found]
    return sorted({int(i) for i in several if isinstance(i, int) and 0 <= i < vocabulary})
