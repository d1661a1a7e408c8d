"""What a codec is made of: transforms, quantizers and correctors.

A codec stores *pages*: the keys or values (or whatever a cut stores) of P consecutive tokens, float32
``[N, G, P, D]`` for N pages of G heads with D features. Transforms turn a page into one that is easier
to quantize and keep what they need to turn it back; a quantizer turns it into packed codes; correctors
store something about what the quantizer lost. Whatever has to be kept is a *buffer*, ``[N, ...]`` in
its true, packed dtype: the bytes of the buffers are the bytes of the cache.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch

from graphwright.ir.spelling import spell

Buffers = dict[str, torch.Tensor]
Constants = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class PageShape:
    """The shape of one page: G heads, P tokens, D features."""

    groups: int
    tokens: int
    features: int

    @property
    def values(self) -> int:
        """Numbers in a page."""
        return self.groups * self.tokens * self.features


@dataclass(frozen=True)
class Part(ABC):
    """One link of a codec. Fields of the subclass are its options; it prints as ``name(option=value)``.

    Class attributes:
        needs_samples: its constants come from calibration; without samples they are a neutral stand-in
            of the right shapes, good for planning and not for running.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str] = ""
    needs_samples: ClassVar[bool] = False

    def obstacle(self, shape: PageShape) -> str | None:
        """Why this part cannot serve pages of this shape; None if it can."""
        return None

    def constants(self, shape: PageShape, samples: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Tables that encoding and decoding read: rotations, codebooks, orders of channels.

        Args:
            shape: of the pages that reach this part.
            samples: ``[N, G, P, D]`` pages that reach it in calibration, or None.
        """
        return {}

    def __str__(self) -> str:
        return spell(self)


class Transform(Part):
    """A change of coordinates, undone after decoding.

    Class attributes:
        orthogonal: whether it is an orthogonal map of each head's features that stores nothing, so that
            ``forward`` of queries gives the same inner products with transformed keys.
    """

    orthogonal: ClassVar[bool] = False

    def out_shape(self, shape: PageShape) -> PageShape:
        """The shape of what :meth:`forward` gives; the same by default."""
        return shape

    @abstractmethod
    def forward(self, x: torch.Tensor, constants: Constants) -> tuple[torch.Tensor, Buffers]:
        """``x [N, G, P, D]`` float32 transformed, and what must be kept to undo it."""

    @abstractmethod
    def inverse(
        self, y: torch.Tensor, buffers: Buffers, constants: Constants, shape: PageShape
    ) -> torch.Tensor:
        """Undo :meth:`forward`; ``shape`` is what went in."""


class Coder(Part):
    """Turns pages into buffers and back."""

    @abstractmethod
    def encode(self, y: torch.Tensor, constants: Constants) -> Buffers:
        """``y [N, G, P, D]`` float32 as packed buffers ``[N, ...]``."""

    @abstractmethod
    def decode(self, buffers: Buffers, constants: Constants, shape: PageShape) -> torch.Tensor:
        """``[N, G, P, D]`` float32 of pages of this shape."""


class Quantizer(Coder):
    """The link of a codec that turns numbers into codes; there is one.

    Quantizers expect what the scaling before them gives: ``uniform`` numbers in [-1, 1], ``lloyd_max``
    coordinates of unit variance. A NaN that reaches a quantizer may become any finite number: scalings
    keep it (their scale is NaN).
    """


class Corrector(Coder):
    """Stores something about what the quantizer (and the correctors before) lost, to be added back.

    ``encode`` gets the residual and ``decode`` returns what is added to the decoded page.
    """


_REGISTRY: dict[str, type[Part]] = {}
P = TypeVar("P", bound=type[Part])


def register_part(cls: P) -> P:
    """Class decorator: make a part known by its ``name``."""
    _REGISTRY[cls.name] = cls
    return cls


def registered_parts() -> dict[str, type[Part]]:
    """All parts by name."""
    import graphwright.ir.codecs.parts  # noqa: F401  the package imports its own parts

    return dict(_REGISTRY)
