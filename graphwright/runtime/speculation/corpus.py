"""Texts that a user gives to look drafts up in, as token ids.

A corpus is one file:

- ``.npy``: integer ids ``[N]``, or ``[documents, N]``;
- ``.jsonl``: a document a line, a list of ids or a text;
- anything else is one text in UTF-8.

Texts are tokenized by the tokenizer in the model's folder. Documents are kept apart by :data:`END`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from graphwright.ir.errors import InputError

#: Follows every document: no token.
END = -1

Tokenize = Callable[[str], list[int]]


def check_corpus(path: str) -> None:
    """Raise :class:`InputError` unless there is such a file."""
    if not Path(path).is_file():
        raise InputError(
            f"there is no corpus '{path}'", where="corpus", hint="a file of text, .jsonl or .npy"
        )


def read_corpus(path: str, program: Any) -> npt.NDArray[np.int64]:
    """The ids ``[N]`` of a corpus, every document followed by :data:`END`.

    Args:
        path: of the file.
        program: whose tokens they are; None if the file has ids and nobody checks them.

    Raises:
        InputError: there is no such file, it is empty, not of its kind, or has tokens that the model does not
            know; or it is a text and the model's tokenizer cannot be loaded.
    """
    check_corpus(path)
    readers = {".npy": _read_array, ".jsonl": _read_lines}
    read = readers.get(Path(path).suffix, _read_text)
    documents = [ids for ids in read(Path(path), lambda text: _tokenizer(_folder(program))(text)) if len(ids)]
    if not documents:
        raise InputError("the corpus has no tokens", where=path, hint="give one with some text")
    ids = np.concatenate([np.append(np.asarray(one, dtype=np.int64), END) for one in documents])
    tokens = ids[ids != END]
    known = np.inf if program is None else program.vocab_size
    if len(tokens) != len(ids) - len(documents) or tokens.min() < 0 or tokens.max() >= known:
        raise InputError(
            f"the corpus has token ids from {ids.min()} to {ids.max()}, the model's are below {known}",
            where=path,
            hint="tokenize it with the model's own tokenizer",
        )
    return ids


def _read_array(path: Path, tokenize: Tokenize) -> list[Any]:
    try:
        ids = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"not an array: {error}", where=str(path), hint="save it with numpy.save") from error
    if not isinstance(ids, np.ndarray) or ids.ndim not in (1, 2) or ids.dtype.kind not in "iu":
        raise InputError("not an array of token ids", where=str(path), hint="integers [N], or [documents, N]")
    return list(np.atleast_2d(ids))


def _read_lines(path: Path, tokenize: Tokenize) -> list[Any]:
    documents = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"not JSON: {error}", where=f"{path}:{number}") from error
        if isinstance(document, str):
            document = tokenize(document)
        # JSON has no other integers; true and false count as such in Python.
        if not isinstance(document, list) or not all(type(token) is int for token in document):
            raise InputError(
                "neither a list of token ids nor a text",
                where=f"{path}:{number}",
                hint='[1, 2, 3] or "text"',
            )
        documents.append(document)
    return documents


def _read_text(path: Path, tokenize: Tokenize) -> list[Any]:
    text = _text(path)
    return [tokenize(text)] if text.strip() else []


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"not a text: {error}", where=str(path), hint="UTF-8, or .npy for ids") from error


def _folder(program: Any) -> str:
    """Where the model was loaded from, and with it the tokenizer."""
    folder = getattr(getattr(program, "config", None), "_name_or_path", "")
    if not folder:
        raise InputError(
            "a corpus of text needs the model's tokenizer, and the model does not say where it is from",
            where="corpus",
            hint="give token ids: lists in .jsonl, or .npy",
        )
    return str(folder)


@lru_cache(maxsize=4)
def _tokenizer(folder: str) -> Tokenize:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(
            f"a corpus of text needs the model's tokenizer, and none can be loaded from '{folder}'",
            where="corpus",
            hint="give token ids: lists in .jsonl, or .npy",
        ) from error
    return lambda text: list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
