"""The tokenizer that lies beside a model's weights. Nothing is downloaded."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel


def find_tokenizer(model: PreTrainedModel, vocabulary: int) -> tuple[Any | None, str]:
    """The tokenizer of the folder or cached repository that the model was loaded from.

    A folder whose tokenizer is inside of its only GGUF file counts too; reading that takes seconds.
    Code that a repository brings along is not run.

    Args:
        vocabulary: how many ids the model knows; a tokenizer with more is another model's.

    Returns:
        The tokenizer, or None and why there is none.
    """
    name = str(getattr(model, "name_or_path", "") or "")
    if not name:
        return None, "the model was not loaded from a place that has a tokenizer"
    tokenizer = _load(name)
    if tokenizer is None:
        return None, "no tokenizer was found where the model was loaded from"
    if not fits(tokenizer, (), vocabulary):
        return None, "the tokenizer found with the model has another vocabulary than the model"
    return tokenizer, ""


def fits(tokenizer: Any, ids: Sequence[int], vocabulary: int) -> bool:
    """Whether the model knows the tokenizer's ids, and the tokenizer knows most of these ``ids``' words.

    Tokens added to a tokenizer later (for images, say) may lie beyond the model's vocabulary; they do
    not occur in text.
    """
    if int(tokenizer.vocab_size) > vocabulary or max(ids, default=0) >= vocabulary:
        return False
    unknown = getattr(tokenizer, "unk_token_id", None)
    return unknown is None or 2 * sum(i == unknown for i in ids) <= len(ids)


def _load(name: str) -> Any | None:
    local = {"local_files_only": True, "trust_remote_code": False}
    files: list[dict[str, str]] = [{}]
    with contextlib.suppress(OSError):
        packed = [path.name for path in Path(name).glob("*.gguf")]
        if len(packed) == 1:
            files.append({"gguf_file": packed[0]})
    for file in files:
        # What can go wrong in a stranger's folder has no common exception class.
        with contextlib.suppress(Exception):
            return AutoTokenizer.from_pretrained(name, **local, **file)
    return None
