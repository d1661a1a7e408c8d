"""The residual stream of a step, seen from outside: who looks at it between the decoder layers."""

from __future__ import annotations

from collections.abc import Callable

import torch

#: (layer, stream ``[B, T, H]`` before it, and after it) -> what goes on in the place of the latter. Called
#: after each layer in order; where a layer is left out, before and after are the same tensor.
Visit = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


class ResidualStream:
    """Keeps the residual stream of one step, unchanged; a :data:`Visit`.

    Attributes:
        kept: ``[B, T, H]`` before the first layer and after each one.
    """

    def __init__(self) -> None:
        self.kept: list[torch.Tensor] = []

    def __call__(self, layer: int, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        if not self.kept:
            self.kept.append(before)
        self.kept.append(after)
        return after
