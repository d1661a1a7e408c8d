"""What a cache holds on calibration text: the data that calibrated codecs and predictions are fitted on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch

from graphwright.ir.graph import Graph
from graphwright.optimizer import machine
from graphwright.runtime.program import Program

#: Tokens of a step while the text runs through.
_STEP = 64


class StoreSamples:
    """Runs the calibration text through a program and keeps what its stores hold.

    Args:
        make_program: lowers a graph, op by op.
        rows: gives the token ids; called when samples are first asked for.
        ends: gives which tokens end a sentence, ``[V]`` bool; called when that is first asked for.
    """

    def __init__(
        self,
        make_program: Callable[[Graph], Program],
        rows: Callable[[], Sequence[Sequence[int]]],
        ends: Callable[[], torch.Tensor | None] = lambda: None,
    ) -> None:
        self._make_program, self._rows = make_program, rows
        self._known: dict[str, torch.Tensor] = {}
        self.ends = cache(ends)

    def __call__(self, graph: Graph) -> Mapping[str, torch.Tensor]:
        """``[B, G, tokens, D]`` by store, for every store of ``graph`` that is not packed; kept.

        Stores of one name hold the same in every program: passes rename what they change.
        """
        wanted = [n.meta["name"] for n in graph.placeholders("state") if "store" not in n.meta]
        if any(name not in self._known for name in wanted):
            self._known.update(self._run(graph))
        return {name: self._known[name] for name in wanted if name in self._known}

    def _run(self, graph: Graph) -> dict[str, torch.Tensor]:
        rows = self._rows()
        length = min(len(row) for row in rows)
        program = self._make_program(graph)
        tokens = torch.tensor([list(row[:length]) for row in rows], device=program.device)
        state = program.allocate(len(rows), length)
        with machine.safe_library(program.dtype, program.device):
            for start in range(0, length, _STEP):
                part = tokens[:, start : start + _STEP].contiguous()
                counts = torch.full((len(rows),), part.shape[1], device=program.device)
                program.step(state, part, counts, logits="last")
                state.commit(counts)
        # A ring of a sliding window holds its newest tokens from some slot on; order does not matter here.
        kept = {name: store for name, store in state.stores.items() if name in state.windows}
        return {name: store[:, :, :length] for name, store in kept.items()}
