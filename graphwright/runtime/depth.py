"""Dynamic depth at run time: which layers no token of a step uses, as the host knows before it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from graphwright.ir.depth_ops import ENDLESS
from graphwright.runtime.lowering.lower import LoweredStep
from graphwright.runtime.storage import State


class DepthLimits:
    """The layers of a program that only the first generated tokens of a row use.

    Args:
        limits: by layer, the last generated token that uses it; see ``ir/depth_ops.py`` for their numbers.
            Later ones never do.
    """

    def __init__(self, limits: Mapping[int, int]) -> None:
        self._limits = dict(limits)

    def __bool__(self) -> bool:
        return bool(self._limits)

    def idle(
        self, known: Sequence[int], prompts: Sequence[int], taking_part: Sequence[int] | None
    ) -> frozenset[int]:
        """Layers that no token of a step uses.

        Args:
            known: ``[B]`` committed tokens of each row; the step's tokens come after them.
            prompts: ``[B]`` how many of a row's tokens are its prompt.
            taking_part: the rows that have tokens in the step; None: any may have.
        """
        rows = range(len(known)) if taking_part is None else taking_part
        first = min((known[row] - prompts[row] + 1 for row in rows), default=-ENDLESS)
        return frozenset(layer for layer, limit in self._limits.items() if limit < first)


class DynamicDepth:
    """What a step over a state is told about depth.

    Args:
        step: the lowered graph.
    """

    def __init__(self, step: LoweredStep) -> None:
        found = step.blocks.found  # a layer that cannot be left out runs, whoever uses it
        self._limits = DepthLimits({layer: limit for layer, limit in step.depth.items() if layer in found})
        self._has_exit = step.exit is not None

    def inputs(self, state: State, counts: torch.Tensor, width: int) -> dict[str, Any]:
        """``prompts``, ``idle`` and ``exits`` of a step, see ``StepInputs``.

        Args:
            counts: ``[B]`` valid tokens of each row.
            width: the step's tokens, with padding.
        """
        given: dict[str, Any] = {"prompts": state.prompt_lengths}
        if self._limits:
            # On a GPU counts are not worth waiting for: rows that have ended may keep a layer running.
            rows = counts.nonzero()[:, 0].tolist() if counts.device.type == "cpu" else None
            given["idle"] = self._limits.idle(state.known, state.prompts, rows)
        if self._has_exit:
            pairs = zip(state.known, state.prompts, strict=True)
            given["exits"] = any(length + width > prompt for length, prompt in pairs)
        return given
