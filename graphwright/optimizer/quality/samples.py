"""What a cache holds on calibration text: the data that calibrated codecs and predictions are fitted on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Literal

import torch

from graphwright.ir.graph import Graph
from graphwright.optimizer import machine
from graphwright.runtime.program import Program
from graphwright.runtime.storage import State

#: Tokens of a step while the text runs through.
_STEP = 64
#: Tokens of a row that are scored.
_SCORED = 128


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
            self._known.update(self.fresh(graph))
        return {name: self._known[name] for name in wanted if name in self._known}

    def fresh(self, graph: Graph) -> Mapping[str, torch.Tensor]:
        """The same, run now and not kept: for graphs whose stores hold what those of other graphs do not."""
        program, tokens, state = self._prepare(graph, None)
        for _ in self._steps(program, state, tokens, "last"):
            pass
        # A ring of a sliding window holds its newest tokens from some slot on; order does not matter here.
        kept = {name: store for name, store in state.stores.items() if name in state.windows}
        return {name: store[:, :, : tokens.shape[1]] for name, store in kept.items()}

    def loss(self, graph: Graph) -> float:
        """Mean negative log likelihood in nats of each row's first tokens, 128 at most: this runs often."""
        program, tokens, state = self._prepare(graph, _SCORED)
        total, count = 0.0, 0
        for start, logits in self._steps(program, state, tokens, "all"):
            targets = tokens[:, start + 1 : start + 1 + logits.shape[1]]
            likelihoods = logits[:, : targets.shape[1]].float().log_softmax(-1)
            total -= float(likelihoods.gather(2, targets[..., None]).double().sum())
            count += targets.numel()
        return total / count

    def _prepare(self, graph: Graph, most: int | None) -> tuple[Program, torch.Tensor, State]:
        """The program, the text ``[B, tokens]`` cut to the shortest row, and an empty cache for it."""
        rows = self._rows()
        length = min([len(row) for row in rows] + ([most] if most else []))
        program = self._make_program(graph)
        tokens = torch.tensor([list(row[:length]) for row in rows], device=program.device)
        return program, tokens, program.allocate(len(rows), length)

    @staticmethod
    def _steps(
        program: Program, state: State, tokens: torch.Tensor, logits: Literal["last", "all"]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Run and commit the text; the first token's number and the logits of each step."""
        for start in range(0, tokens.shape[1], _STEP):
            part = tokens[:, start : start + _STEP].contiguous()
            counts = torch.full((tokens.shape[0],), part.shape[1], device=program.device)
            with machine.safe_library(program.dtype, program.device):
                found = program.step(state, part, counts, logits=logits)
            yield start, found
            state.commit(counts)
