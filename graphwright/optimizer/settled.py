"""A program after its measurements."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from graphwright.optimizer.build import Built
from graphwright.optimizer.report import Decision

#: A measured difference smaller than this share is noise, and decides nothing.
NOISE = 0.03


@dataclass
class Settled:
    """A program, what was measured of it, and what followed from that.

    Attributes:
        built: the program that stays.
        measured: sections of the report: ``decode``, ``memory``, ``speculation``; ``quality`` where another
            program than the planner's stays.
        decisions: what was undone, and what the measurements settled.
        rows: the report's plans, with what was measured of each.
        times: measured seconds per token, by the passes of the plan.
    """

    built: Built
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    times: dict[tuple[str, ...], float] = field(default_factory=dict)

    @property
    def step_seconds(self) -> float:
        """Measured, of a step of one token."""
        return float(self.measured["decode"]["seconds_per_token"])

    @property
    def seconds_per_token(self) -> float:
        """Measured, with drafts where they stayed."""
        return float((self.measured.get("speculation") or self.measured["decode"])["seconds_per_token"])
