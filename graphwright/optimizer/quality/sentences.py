"""Which tokens end a sentence, as the tokenizer spells them."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import PreTrainedModel

from graphwright.optimizer.quality.text import vocabulary_size
from graphwright.optimizer.quality.tokenizer import find_tokenizer

#: A full stop, an exclamation or question mark or a new line, also of other scripts; then perhaps quotes
#: and brackets that close, and spaces.
_END = re.compile(r"[.!?…\n\r。．｡！？।؟][\"'”’»)\]}」』）］】〉》]*[ \t\u3000]*\Z")


def sentence_ends(model: PreTrainedModel) -> torch.Tensor | None:
    """``[V]`` bool for the tokenizer that lies beside the model's weights; None if there is none."""
    vocabulary = vocabulary_size(model)
    tokenizer, _ = find_tokenizer(model, vocabulary)
    return None if tokenizer is None else ending_tokens(tokenizer, vocabulary)


def ending_tokens(tokenizer: Any, vocabulary: int) -> torch.Tensor:
    """``[V]`` bool, which of a model's V tokens end a sentence; those the tokenizer lacks do not."""
    known = min(len(tokenizer), vocabulary)
    words = tokenizer.batch_decode([[i] for i in range(known)], clean_up_tokenization_spaces=False)
    ends = torch.zeros(vocabulary, dtype=torch.bool)
    ends[:known] = torch.tensor([_END.search(word) is not None for word in words], dtype=torch.bool)
    return ends
