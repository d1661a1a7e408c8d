"""The calls of a lowered step, run one after the other: whole, without some layers, or the head alone."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import torch

from graphwright.ir.errors import InputError
from graphwright.runtime.lowering.early_exit import STREAM, LoweredExit
from graphwright.runtime.lowering.lower import LoweredStep
from graphwright.runtime.residual import Visit


class StepCalls:
    """Runs the calls of a lowered step over its slots.

    Args:
        step: the lowered graph.
    """

    def __init__(self, step: LoweredStep) -> None:
        self._step = step
        self._calls = [(call, tuple(ins), tuple(outs)) for call, ins, outs in step.calls]
        self._blocks = {block.call: block for block in step.blocks.found.values()}

    def run(
        self,
        values: list[Any],
        rows: torch.Tensor | None,
        skip: Set[int] = frozenset(),
        visit: Visit | None = None,
        exits: bool = True,
    ) -> torch.Tensor:
        """The logits ``[B, T, V]``, or those of some rows.

        Args:
            values: the content of all slots; inputs and states are in place.
            rows: ``[B, R]`` which of the T rows are wanted; None for all.
            skip, visit: as in ``Program.step``; the layers can be left out.
            exits: whether any token may exit early, where the program lets them.
        """
        tail = self._step.tail if rows is not None else None
        blocks = self._blocks if skip or visit is not None else {}
        leaving = self._step.exit
        for index, (call, ins, outs) in enumerate(self._calls):
            if index == tail:
                assert self._step.tail_slot is not None and rows is not None
                values[self._step.tail_slot] = _take_rows(values[self._step.tail_slot], rows)
            if leaving is not None and index in (leaving.head, leaving.decision) and not exits:
                values[leaving.passing] = _nobody(values[leaving.stream])
                continue
            block = blocks.get(index)
            if block is not None and block.layer in skip:
                values[block.exit] = values[block.entry]
            else:
                results = call(*[values[i] for i in ins])
                for out, result in zip(outs, results, strict=True):
                    values[out] = result
            # The only number of a step that the host reads.
            if leaving is not None and index == leaving.decision and bool(values[leaving.passing].all()):
                self._run_rest(leaving, values)
                logits: torch.Tensor = values[leaving.logits]
                return logits if rows is None else _take_rows(logits, rows)
            if block is not None and visit is not None:
                values[block.exit] = visit(block.layer, values[block.entry], values[block.exit])
        logits = values[self._step.result]
        return logits if rows is None or tail is not None else _take_rows(logits, rows)

    def _run_rest(self, leaving: LoweredExit, values: Sequence[Any]) -> None:
        """Where all tokens have exited: what the layers above keep of them."""
        rest = leaving.rest
        inner = list(rest.slots)
        for name, slot in rest.inputs.items():
            inner[slot] = values[leaving.stream if name == STREAM else self._step.inputs[name]]
        for name, slot in rest.states.items():
            inner[slot] = values[self._step.states[name]]
        for call, ins, outs in rest.calls:
            for out, result in zip(outs, call(*[inner[i] for i in ins]), strict=True):
                inner[out] = result

    def read_out(self, stream: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, T, V]``, were ``stream [B, T, H]`` the residual stream after the last layer.

        Raises:
            InputError: what follows the layers reads more than that.
        """
        step = self._step
        last = list(step.blocks.found.values())[-1:]
        if step.tail is None or [block.exit for block in last] != [step.tail_slot]:
            raise InputError(
                "what follows the layers reads more than the last one's result", where="Program.read_out"
            )
        values = list(step.slots)
        values[last[0].exit] = stream
        for call, ins, outs in self._calls[step.tail :]:
            for out, result in zip(outs, call(*[values[i] for i in ins]), strict=True):
                values[out] = result
        logits: torch.Tensor = values[step.result]
        return logits


def _nobody(stream: torch.Tensor) -> torch.Tensor:
    return torch.zeros(stream.shape[:2], dtype=torch.bool, device=stream.device)


def _take_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows ``[B, R]`` of ``x [B, T, F]``."""
    if x.shape[0] == 1:
        return x[:, rows[0]]
    return x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[2]))
