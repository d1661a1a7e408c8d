"""What the tests of the torch.compile backend share."""

from __future__ import annotations

import torch
from torch import nn

from graphwright.optimizer.report import Report, Status


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 48), nn.Linear(48, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def fallbacks(report: Report) -> list[str]:
    return [d.reason for d in report.by_status(Status.FALLBACK)]
