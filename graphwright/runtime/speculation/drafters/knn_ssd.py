"""Layers to leave out by the kind of text, recognized by its hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from graphwright.ir.errors import InputError
from graphwright.runtime.speculation.drafter import Generation, Outcome, drafter
from graphwright.runtime.speculation.program_drafter import ProgramSession
from graphwright.runtime.speculation.skip_calibration import Domain, load_domains
from graphwright.runtime.speculation.skipping import SkipDrafter


@drafter("knn_ssd")
@dataclass
class KnnSkip(SkipDrafter):
    """The program itself without the layers that a calibrated kind of text can do without, the nearest one.

    The first token of a generation is not drafted for; from its hidden state on, the domain is the one whose
    anchor is nearest in cosine similarity to the mean last hidden state of what was generated, over all rows.

    Options:
        path: a file that ``skip_calibration.save_domains`` wrote for this model.

    Source: Song et al. 2025, "KNN-SSD: Enabling Dynamic Self-Speculative Decoding via Nearest Neighbor Layer
    Set Optimization". There the prompt's last hidden state is looked up once, among many anchors
    of each domain.
    """

    wants_hidden: ClassVar[bool] = True

    path: str
    _domains: list[Domain] = field(default_factory=list, init=False, repr=False, compare=False)
    _anchors: torch.Tensor = field(init=False, repr=False, compare=False)  # [domains, H]
    _sum: torch.Tensor | None = field(default=None, init=False, repr=False, compare=False)  # [H]

    def open(self, generation: Generation) -> ProgramSession:
        session = super().open(generation)
        self._domains = load_domains(self.path)
        for domain in self._domains:
            self._blocks.check(domain.skip, f"drafter=knn_ssd, domain {domain.name}")
        self._anchors = torch.tensor([domain.anchor for domain in self._domains], device=session.device)
        self._sum = None
        return session

    def observe(self, row: int, outcome: Outcome) -> None:
        super().observe(row, outcome)
        if outcome.hidden:
            new = outcome.hidden[-1][outcome.nodes].float().sum(0)
            if len(new) != self._anchors.shape[1]:
                raise InputError(
                    f"{self.path} was made for hidden states of {self._anchors.shape[1]} numbers, "
                    f"these have {len(new)}",
                    where="drafter=knn_ssd",
                    hint="calibrate with this model",
                )
            self._sum = new if self._sum is None else self._sum + new

    def prepare(self, rows: Sequence[int]) -> None:
        if self._sum is not None:
            nearest = int(torch.cosine_similarity(self._anchors, self._sum[None], dim=-1).argmax())
            self.skip = frozenset(self._domains[nearest].skip)

    def goes_beyond(self, ask: object) -> bool:
        return self._sum is not None
