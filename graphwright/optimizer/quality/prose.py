"""English prose that is on every machine with Python: the language reference in ``pydoc_data.topics``."""

from __future__ import annotations

import re
from functools import cache

_RULES = re.compile(r"^([*=\-+|~^.\"])\1{2,}|^[+|]|^\s|^\.\. |^>>>|::=|^\[\d+\]")
_EMPHASIS = re.compile(r"(?<![\w*\"])(\*{1,2})(\w[^*]*?)\1(?![\w*\"])")
_FOOTNOTE = re.compile(r"\s*\[\d+\]")
_SHORTEST = 100  # characters; headings and captions are shorter


@cache
def paragraphs() -> tuple[str, ...]:
    """The paragraphs of prose, in a fixed order, without markup; none where Python lacks the module."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # stripped-down distributions
        return ()
    found: dict[str, None] = {}  # topics share sections; each counts once
    for name in sorted(topics):
        for block in re.split(r"\n\s*\n", topics[name]):
            text = _prose(block)
            if text:
                found.setdefault(text)
    return tuple(found)


def passage(start: float, characters: int) -> str:
    """Whole paragraphs of at least ``characters`` characters, or all there are.

    Args:
        start: where to begin, as a share of all paragraphs (0 to 1); the end goes on at the beginning.
    """
    every = paragraphs()
    chosen: list[str] = []
    length = 0
    for index in range(len(every)):
        if length >= characters:
            break
        chosen.append(every[(int(start * len(every)) + index) % len(every)])
        length += len(chosen[-1]) + 2
    return "\n\n".join(chosen)


def _prose(block: str) -> str:
    """A block as one line of plain text; "" for code, tables, headings, grammar and lists."""
    lines = block.strip("\n").split("\n")
    if any(_RULES.search(line) for line in lines):
        return ""
    text = _FOOTNOTE.sub("", _EMPHASIS.sub(r"\2", " ".join(block.split())))
    return text if len(text) >= _SHORTEST and text.endswith((".", ":")) else ""
