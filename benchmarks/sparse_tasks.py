"""Retrieval tasks: numbers hidden in long text, in the manner of RULER, made by this file alone.

``passkey``: one number among a few sentences that are repeated over and over, or in prose. ``key-value``:
several numbers, each with a name, and one name is asked for. Answers begin as the assistant would, so that
a small model only has to copy.

Source: Mohtashami and Jaggi 2023, "Landmark Attention", section 4.2 (passkeys); Hsieh et al. 2024, "RULER:
What's the Real Context Size of Your Long-Context Language Models?", section 3 (several keys).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Encode = Callable[[str], list[int]]

_FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
    "The wind is cold. The night is long. The road goes on. "
)
_NAMES = (
    "apple", "river", "candle", "mountain", "silver", "pencil", "garden", "window", "rocket", "basket",
    "lemon", "tiger", "castle", "ocean", "button", "ladder", "mirror", "pillow", "saddle", "turtle",
)  # fmt: skip
_HEAD = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n"
)
_TURN = "<|im_end|>\n<|im_start|>assistant\n"
_DIGITS = 5


@dataclass(frozen=True)
class Task:
    """What is hidden where.

    Attributes:
        name: ``passkey`` or ``key-value``.
        haystack: ``filler`` or ``prose``.
        length: tokens before the question.
        pairs: numbers that are hidden.
    """

    name: str
    haystack: str
    length: int
    pairs: int = 1

    def __str__(self) -> str:
        pairs = f"{self.pairs} pairs, " if self.pairs > 1 else ""
        return f"{self.name}, {pairs}{self.haystack}, {self.length:,} tokens"


@dataclass(frozen=True)
class Sample:
    """One question: token ids of what comes before it and of itself, and the number."""

    context: list[int]
    question: list[int]
    answer: str


def make(task: Task, seed: int, encode: Encode, prose: Sequence[int], ends: Sequence[bool]) -> Sample:
    """One sample; questions of a task all have the same number of tokens.

    Args:
        encode: text to token ids.
        prose: token ids of text to hide things in.
        ends: ``[V]``, which tokens end a sentence.
    """
    draw = random.Random(f"{task} {seed}")
    numbers = [str(draw.randrange(10 ** (_DIGITS - 1), 10**_DIGITS)) for _ in range(task.pairs)]
    if task.name == "passkey":
        needles = [f" The pass key is the number {n}. Remember it." * 2 for n in numbers]
        task_text = "There is a pass key hidden inside a lot of irrelevant text. Find it and memorize it.\n\n"
        asked, question = 0, f"\n\nWhat is the pass key?{_TURN}The pass key is the number"
    else:
        names = draw.sample(_short_names(encode), task.pairs)
        needles = [f" The special number for {a} is {n}." for a, n in zip(names, numbers, strict=True)]
        task_text = "Some special numbers are hidden inside the following text. Memorize them.\n\n"
        asked = draw.randrange(task.pairs)
        name = names[asked]
        question = f"\n\nWhat is the special number for {name}?{_TURN}The special number for {name} is"
    head, hidden = encode(_HEAD + task_text), [encode(needle) for needle in needles]
    room = task.length - len(head) - sum(map(len, hidden))
    if task.haystack == "filler":
        once = encode(_FILLER)
        hay = (once * (room // len(once) + 1))[:room]
    else:
        start = draw.randrange(len(prose) - room)
        hay = list(prose[start : start + room])
    places = sorted(draw.sample([i + 1 for i, token in enumerate(hay) if ends[token]], task.pairs))
    for place, needle in sorted(zip(places, hidden, strict=True), reverse=True):
        hay[place:place] = needle
    return Sample(head + hay, encode(question), numbers[asked])


def _short_names(encode: Encode) -> list[str]:
    """Names of one token, so that all questions are as long."""
    return [name for name in _NAMES if len(encode(f" {name}")) == 1]
