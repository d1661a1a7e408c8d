"""A second model to draft with, and the options of drafters that have one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from graphwright.ir.errors import InputError
from graphwright.runtime.speculation.translation import (
    Retokenizer,
    SameTokens,
    SharedTokens,
    Translation,
    common_tokens,
)

VOCABULARIES = ("auto", "same", "intersection")


@dataclass(frozen=True)
class DraftModel:
    """A second model, and what is known of both vocabularies.

    Args:
        program: the model, compiled; a
            :class:`~graphwright.runtime.decoding.protocol.DecodingProgram`.
        tokenizer: its tokenizer, if it is known.
        target_tokenizer: that of the program that it drafts for, if it is known.
    """

    program: Any
    tokenizer: Any = None
    target_tokenizer: Any = None
    _translations: dict[Any, Translation] = field(default_factory=dict, init=False, repr=False, compare=False)

    def check_device(self, target: Any) -> None:
        """Refuse to draft for a program on another device.

        Raises:
            InputError: it is on another one.
        """
        mine, theirs = torch.device(self.program.device), torch.device(target.device)
        if (mine.type, mine.index or 0) != (theirs.type, theirs.index or 0):
            raise InputError(
                f"the draft model is on {mine}, the program on {theirs}",
                where="draft model",
                hint=f"load it with .to('{theirs}')",
            )

    def translation(self, target: Any, vocabulary: str = "auto") -> Translation:
        """From and to the tokens of the program that it drafts for; worked out once.

        Args:
            target: that program.
            vocabulary: ``same``: ids mean the same; ``intersection``: tokens are paired by their strings;
                ``auto``: find out from the tokenizers, or without them from the numbers of tokens.

        Raises:
            InputError: the vocabularies differ and the tokenizers are missing, or have nothing in common.
        """
        sizes = target.vocab_size, self.program.vocab_size
        found = self._translations.get((sizes, vocabulary))
        if found is None:
            found = self._translations[sizes, vocabulary] = self._translation(sizes, vocabulary)
        return found

    def _translation(self, sizes: tuple[int, int], vocabulary: str) -> Translation:
        known = self.tokenizer is not None and self.target_tokenizer is not None
        if vocabulary == "auto":
            same = sizes[0] == sizes[1]
            if known:
                same = self.tokenizer.get_vocab() == self.target_tokenizer.get_vocab()
            vocabulary = "same" if same else "intersection"
        if vocabulary == "same":
            return SameTokens(*sizes)
        self.require_tokenizers(sizes)
        pairs = common_tokens(self.target_tokenizer, self.tokenizer, sizes)
        return SharedTokens(
            pairs, sizes[0], Retokenizer(self.target_tokenizer, self.tokenizer), self.program.device
        )

    def require_tokenizers(self, sizes: tuple[int, int]) -> None:
        """Refuse to go on without both tokenizers.

        Args:
            sizes: tokens that the program and the draft model know.

        Raises:
            InputError: one is missing.
        """
        if self.tokenizer is None or self.target_tokenizer is None:
            missing = "the draft model's" if self.tokenizer is None else "the program's"
            raise InputError(
                f"the program knows {sizes[0]} tokens and the draft model {sizes[1]}, and {missing} "
                "tokenizer is missing, which says what they have in common",
                where="draft model",
                hint="generate(..., tokenizer=..., assistant_tokenizer=...), or folders with tokenizers; "
                "vocabulary=same where only unused ids differ",
            )


@dataclass
class NeedsModel:
    """The options of drafters that have a second model.

    Options:
        path: folder or name of a transformers model, loaded when the program is built; or empty, and
            :meth:`use` gives the model.
    """

    path: str = ""
    _model: DraftModel | None = field(default=None, init=False, repr=False, compare=False)

    def use(self, model: DraftModel) -> None:
        """Draft with this model."""
        self._model = model

    def check(self, target: Any) -> None:
        """Refuse to draft for a program that the model does not go with.

        Raises:
            InputError: there is no model or no program, the model is on another device, or its vocabulary
                cannot be translated.
        """
        if target is None:
            raise InputError("there is no program to draft for", where=f"drafter={self}")
        self.model.check_device(target)

    @property
    def given(self) -> DraftModel | None:
        """The model, if there is one yet."""
        return self._model

    @property
    def model(self) -> DraftModel:
        """The model.

        Raises:
            InputError: there is none.
        """
        if self._model is None:
            raise InputError(
                "there is no draft model",
                where=f"drafter={self}",
                hint="optimize with speculate{drafter=model(path=folder)}, or generate(assistant_model=...)",
            )
        return self._model
