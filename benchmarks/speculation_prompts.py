"""Prompts by category, from files in the formats of Spec-Bench and HumanEval."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Conversation:
    """The user's turns of one conversation."""

    category: str
    turns: tuple[str, ...]


def read_conversations(files: list[Path]) -> dict[str, list[Conversation]]:
    """Conversations by category, in the files' order.

    Args:
        files: JSON lines with ``category`` and ``turns`` (Spec-Bench), or with ``prompt`` (HumanEval: the
            category is ``humaneval``).
    """
    found: dict[str, list[Conversation]] = {}
    for file in files:
        if not file.is_file():
            raise SystemExit(
                f"{file} is not a file: pass --data FILE.jsonl, in Spec-Bench's or HumanEval's format"
            )
        for line in file.read_text().splitlines():
            conversation = _conversation(json.loads(line), file)
            found.setdefault(conversation.category, []).append(conversation)
    return found


def _conversation(entry: dict[str, Any], file: Path) -> Conversation:
    if "turns" in entry and "category" in entry:
        return Conversation(entry["category"], tuple(entry["turns"]))
    if "prompt" in entry:
        return Conversation("humaneval", (f"Complete this Python function:\n\n{entry['prompt']}",))
    raise SystemExit(f"{file}: a line has neither 'turns' and 'category' nor 'prompt'")


def spread(conversations: list[Conversation], count: int) -> list[Conversation]:
    """``count`` of them at even distances, so that they do not all come from one source."""
    count = min(count, len(conversations))
    return [conversations[index * len(conversations) // count] for index in range(count)]


def split(
    categories: dict[str, list[Conversation]], measured: int, calibration: int
) -> tuple[dict[str, list[Conversation]], list[Conversation]]:
    """What is measured, and other conversations to calibrate on, one from each of some categories."""
    chosen = {name: spread(all_, measured) for name, all_ in categories.items()}
    left: Iterator[list[Conversation]] = (
        [one for one in all_ if one not in chosen[name]] for name, all_ in categories.items()
    )
    spare = [some[0] for some in left if some]
    step = max(1, len(spare) // max(calibration, 1))
    return chosen, spare[::step][:calibration]
