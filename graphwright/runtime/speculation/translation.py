"""The tokens of a draft model as those of the target, and the other way round.

Drafts are exact whatever the draft model reads, and sampling is as long as the distribution that tokens were
drawn from is stated over the target's tokens. So a model with another vocabulary can draft: from the tokens
that both have. Source: Timor et al. 2025, "Accelerating LLM Inference with Lossless Speculative Decoding
Algorithms for Heterogeneous Vocabularies" (token-level intersection, TLI).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from graphwright.ir.errors import InputError

# Tokens before a piece of text that are looked at when it is tokenized: where words begin depends on them.
_BEFORE = 8
# Put before a text that would merge with what precedes it: at the very start, tokenizers add a space.
_ASIDE = ("\n", ".", "x")


class Translation(ABC):
    """Between the target's tokens and a draft model's."""

    #: Draft tokens that a target token may become, as a rule.
    growth: ClassVar[int] = 1

    @abstractmethod
    def read(self, before: Sequence[int], tokens: Sequence[int]) -> list[int]:
        """What the draft model reads in place of the target's ``tokens``, which follow ``before``."""

    @abstractmethod
    def drafted(self, token: int) -> int:
        """The draft model's own token for one that :meth:`law` gave a chance."""

    @abstractmethod
    def law(self, logits: torch.Tensor) -> torch.Tensor:
        """Probabilities ``[R, V]`` over the target's tokens from the draft model's logits ``[R, D]``."""


class SameTokens(Translation):
    """One vocabulary; the models may have been given different numbers of unused ids at its end.

    Args:
        target, draft: V and D.
    """

    def __init__(self, target: int, draft: int) -> None:
        self._target, self._draft = target, draft

    def read(self, before: Sequence[int], tokens: Sequence[int]) -> list[int]:
        if self._target <= self._draft:
            return list(tokens)
        return [token for token in tokens if token < self._draft]

    def drafted(self, token: int) -> int:
        return token

    def law(self, logits: torch.Tensor) -> torch.Tensor:
        found = torch.softmax(logits[:, : self._target], dim=-1)
        missing = self._target - found.shape[1]
        return torch.nn.functional.pad(found, (0, missing)) if missing else found


class SharedTokens(Translation):
    """Two vocabularies: tokens are drafted that both have; all others are read as text.

    Args:
        pairs: a draft token for each target token that both have.
        target: V.
        retokenize: the target's tokens as the draft model's, by their text.
        device: of the draft model.
    """

    growth: ClassVar[int] = 2

    def __init__(
        self, pairs: Mapping[int, int], target: int, retokenize: Retokenizer, device: torch.device
    ) -> None:
        self._pairs, self._target, self._retokenize = dict(pairs), target, retokenize
        self._target_ids = torch.tensor(list(self._pairs), device=device)
        self._draft_ids = torch.tensor(list(self._pairs.values()), device=device)

    def read(self, before: Sequence[int], tokens: Sequence[int]) -> list[int]:
        if all(token in self._pairs for token in tokens) and before:
            return [self._pairs[token] for token in tokens]
        return self._retokenize(before, tokens)

    def drafted(self, token: int) -> int:
        return self._pairs[token]

    def law(self, logits: torch.Tensor) -> torch.Tensor:
        found = torch.softmax(logits[:, self._draft_ids], dim=-1)
        whole = found.new_zeros((found.shape[0], self._target))
        whole[:, self._target_ids] = found
        return whole


class Retokenizer:
    """Tokens of one tokenizer as those of another, by their text.

    Args:
        source, target: transformers tokenizers.
    """

    def __init__(self, source: Any, target: Any) -> None:
        self._source, self._target = source, target

    def __call__(self, before: Sequence[int], tokens: Sequence[int]) -> list[int]:
        """The text of ``tokens``, which follow ``before``, in the other tokens.

        Both tokenizers see the end of what comes before: decoding drops a leading space of a text, and words
        are split by what precedes them. The tokens before keep their own form; where the other tokenizer
        would join them with the text, it reads the text behind something that it does not join with it.
        """
        context = list(before[-_BEFORE:])
        start, whole = self._text(context), self._text([*context, *tokens])
        text = whole[len(start) :] if whole.startswith(start) else self._text(tokens)
        for ahead in (start, *_ASIDE):
            first, both = self._ids(ahead), self._ids(ahead + text)
            if both[: len(first)] == first:
                return both[len(first) :]
        return self._ids(text)

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._source.decode(list(ids), clean_up_tokenization_spaces=False)) if ids else ""

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self._target(text, add_special_tokens=False)["input_ids"] if text else []
        return found


def common_tokens(target: Any, draft: Any, sizes: tuple[int, int]) -> dict[int, int]:
    """The draft token of each target token whose string both vocabularies have.

    Args:
        target, draft: transformers tokenizers.
        sizes: V and D; ids beyond them cannot be chosen.

    Raises:
        InputError: there is none.
    """
    ours, theirs = _strings(target, sizes[0]), _strings(draft, sizes[1])
    both = sorted(ours.keys() & theirs.keys(), key=ours.__getitem__)
    found = {ours[text]: theirs[text] for text in both}
    if not found:
        raise InputError(
            "the draft model's vocabulary has no token in common with the program's",
            where="vocabulary=intersection",
            hint="draft as text: drafter=retokenized(path=...)",
        )
    return found


def _strings(tokenizer: Any, size: int) -> dict[str, int]:
    """A tokenizer's tokens by their strings, with plain spaces in place of the sign that it has for them.

    The one for unknown words is left out: it stands for no string.
    """
    known: dict[str, int] = tokenizer.get_vocab()
    signs = tokenizer.convert_ids_to_tokens(tokenizer(" ", add_special_tokens=False)["input_ids"])
    sign = signs[0][0] if signs and len(set(signs[0])) == 1 else " "  # a word such as "[UNK]" is no sign
    unknown = getattr(tokenizer, "unk_token", None)
    return {
        text.replace(sign, " "): token for text, token in known.items() if token < size and text != unknown
    }
