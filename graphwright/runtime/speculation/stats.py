"""Counters of a generation, in the terms of vLLM's speculative decoding metrics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class DraftStats:
    """What one drafter proposed and what was kept of it.

    ``seconds`` is the host's time in the drafter, over ``cycles`` in which it was asked: guessing, and taking
    notes of what was verified.
    """

    drafts: int = 0
    draft_tokens: int = 0
    accepted: int = 0
    accepted_per_position: list[int] = field(default_factory=list)
    cycles: int = 0
    seconds: float = 0.0

    def record(self, proposed: int, accepted: int) -> None:
        """One row's draft of ``proposed`` tokens had a path of ``accepted`` tokens kept."""
        self.drafts += 1
        self.draft_tokens += proposed
        self.accepted += accepted
        counts = self.accepted_per_position
        while len(counts) < accepted:
            counts.append(0)
        for position in range(accepted):
            counts[position] += 1

    def add(self, other: DraftStats) -> None:
        """Add another's counts to these."""
        self.drafts += other.drafts
        self.draft_tokens += other.draft_tokens
        self.accepted += other.accepted
        self.cycles += other.cycles
        self.seconds += other.seconds
        mine, theirs = self.accepted_per_position, other.accepted_per_position
        mine.extend([0] * (len(theirs) - len(mine)))
        for position, count in enumerate(theirs):
            mine[position] += count

    def as_dict(self) -> dict[str, Any]:
        """Counts, the share of draft tokens accepted, mean tokens a drafted step yields, and overhead."""
        return {
            "drafts": self.drafts,
            "draft_tokens": self.draft_tokens,
            "accepted": self.accepted,
            "accepted_per_position": list(self.accepted_per_position),
            "acceptance_rate": self.accepted / self.draft_tokens if self.draft_tokens else 0.0,
            "mean_acceptance_length": 1.0 + self.accepted / self.drafts if self.drafts else 1.0,
            "drafting_seconds_per_cycle": self.seconds / self.cycles if self.cycles else 0.0,
        }


@dataclass
class GenerationStats:
    """Counters of one ``generate`` call, or of all calls so far.

    ``tokens`` are the tokens returned; ``cycles`` the steps of the program after the prompt, whatever
    the number of rows; ``row_steps`` the rows that took part in them, summed; ``shared_prefix_tokens`` the
    prompt tokens that were run and stored once for all rows, counted once a call. ``speculation_off`` says
    why the last call did not speculate although the program can, or is None.
    """

    calls: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    cycles: int = 0
    row_steps: int = 0
    shared_prefix_tokens: int = 0
    speculation_off: str | None = None
    by_drafter: dict[str, DraftStats] = field(default_factory=dict)

    def drafter(self, name: str) -> DraftStats:
        """The counters of drafter ``name``."""
        return self.by_drafter.setdefault(name, DraftStats())

    def add(self, other: GenerationStats) -> None:
        """Add another's counts to these."""
        self.calls += other.calls
        self.prompt_tokens += other.prompt_tokens
        self.tokens += other.tokens
        self.cycles += other.cycles
        self.row_steps += other.row_steps
        self.shared_prefix_tokens += other.shared_prefix_tokens
        self.speculation_off = other.speculation_off
        for name, stats in other.by_drafter.items():
            self.drafter(name).add(stats)

    def as_dict(self) -> dict[str, Any]:
        """Plain data: the counters, the sums over drafters, and ``by_drafter``."""
        total = DraftStats()
        for stats in self.by_drafter.values():
            total.add(stats)
        return {
            "calls": self.calls,
            "prompt_tokens": self.prompt_tokens,
            "tokens": self.tokens,
            "cycles": self.cycles,
            "row_steps": self.row_steps,
            "shared_prefix_tokens": self.shared_prefix_tokens,
            **total.as_dict(),
            "by_drafter": {name: stats.as_dict() for name, stats in self.by_drafter.items()},
            "speculation_off": self.speculation_off,
        }
