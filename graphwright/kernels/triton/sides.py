"""Keys and values that lie in pages, as the attention and packing templates take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from graphwright.ir.codecs import PageShape
from graphwright.ir.packed_ops import page_shape
from graphwright.kernels.triton.tiles import TileCodec, tile_codec

# 8-bit floats are read as bytes.
_BYTES = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Side:
    """Keys or values of a packed store, as the template takes them.

    Attributes:
        tile: the codec's tiles; None without pages.
        buffers, constants: of the codec, in its order, with their names.
        width: D or E.
        parts: runs of the features that a tile is made of.
    """

    width: int
    tile: TileCodec | None = None
    names: tuple[str, ...] = ()
    buffers: tuple[torch.Tensor, ...] = ()
    constant_names: tuple[str, ...] = ()
    constants: tuple[torch.Tensor, ...] = ()
    shape: PageShape | None = None

    @classmethod
    def of(
        cls, store: Sequence[torch.Tensor], constants: Sequence[torch.Tensor], codec: str, page: int
    ) -> Side:
        """From an op's arguments."""
        _, tail, _, *buffers = store
        buffers = [b.view(torch.uint8) if b.dtype in _BYTES else b for b in buffers]
        shape = page_shape(tail, page)
        tile = tile_codec(codec, shape)
        names = tuple(tile.codec.layout(shape))
        table_names = tile.codec.constant_names(shape)
        return cls(shape.features, tile, names, tuple(buffers), table_names, tuple(constants), shape)

    @property
    def parts(self) -> int:
        """Runs of the features; those of codes, else powers of two that need no padding."""
        if self.tile is not None and not self.tile.level.is_float:
            return self.tile.level.parts
        run = self.width & -self.width
        return self.width // run if run >= 16 and self.tile is None else 1

    @property
    def tile_width(self) -> int:
        """Features of a part, padded to what a matrix instruction takes."""
        return max(16, 1 << (self.width // self.parts - 1).bit_length())

    @property
    def token_bytes(self) -> float:
        """Stored bytes of a token of one head."""
        if self.tile is None or self.shape is None:
            return 0.0
        return self.tile.codec.page_bytes(self.shape) / (self.shape.groups * self.shape.tokens)

    def matrix(self) -> torch.Tensor | None:
        """The orthogonal maps before the scaling as one float32 matrix ``[1 or G, D, D]``; None for none."""
        if self.tile is None or not self.tile.maps:
            return None
        return _matrix(self)

    def arguments(self, prefix: str) -> dict[str, Any]:
        """The tuples of pointers."""
        scales, codes = self._own(self.names, self.buffers)
        scale_constants, constants = self._own(self.constant_names, self.constants)
        return {
            f"{prefix}_codes": codes,
            f"{prefix}_constants": constants,
            f"{prefix}_scales": scales,
            f"{prefix}_scale_constants": scale_constants,
        }

    def _own(self, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> tuple[Any, Any]:
        """Those of the scaling and those of the quantizer; None where there are none."""
        if self.tile is None:
            return None, None
        quantizer = self.tile.maps + (self.tile.scale is not None)
        scales = self.tile.own(names, tensors, self.tile.maps) if self.tile.scale is not None else ()
        return scales or None, self.tile.own(names, tensors, quantizer) or None

    def constants_of(self, letter: str) -> dict[str, Any]:
        """The template's constants for this side, ``letter`` K or V."""
        scale = None if self.tile is None else self.tile.scale
        level = None if self.tile is None else self.tile.level
        own = {
            "LEVEL": level and level.decode,
            "OPTION": level.option if level else 0,
            "PARTS": self.parts,
            "UNIT": level.unit if level else 1.0,
            "SHIFT": level.shift if level else 0.0,
            "SCALE": scale and scale.decode,
            "AXIS": scale.axis if scale else "none",
            "SCALE_OPTION": scale.option if scale else 0,
            "FLOAT": bool(level and level.is_float and scale is None),
        }
        return {f"{letter}_{name}": value for name, value in own.items()}


_MATRICES: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _matrix(side: Side) -> torch.Tensor:
    """Kept beside the first map's table, for every chain of maps that starts with it."""
    assert side.tile is not None and side.shape is not None
    first = side.constants[0]
    chains = _MATRICES.setdefault(first, {})
    key = (str(side.tile.codec), side.shape)
    if key not in chains:
        chains[key] = _product(side)
    found: torch.Tensor = chains[key]
    return found


def _product(side: Side) -> torch.Tensor:
    assert side.tile is not None and side.shape is not None
    width, groups = side.width, side.shape.groups
    device = side.constants[0].device
    rows = torch.eye(width, device=device).expand(1, groups, width, width)
    for index, part in enumerate(side.tile.codec.transforms[: side.tile.maps]):
        own = side.tile.own(side.constant_names, side.constants, index)
        names = [n.split(".", 1)[1] for n in side.constant_names if n.split(".")[0] == str(index)]
        rows, _ = part.forward(rows, dict(zip(names, own, strict=True)))
    by_head = any(p.name == "reorder" for p in side.tile.codec.transforms[: side.tile.maps])
    return (rows[0] if by_head else rows[0, :1]).contiguous()


@dataclass(frozen=True)
class Pages:
    """What of a cache lies in pages.

    Attributes:
        keys, values: their sides.
        packed: ``[B]`` int64 tokens that are in pages or first.
        first: ``[B, G, F, D]`` and ``[B, G, F, E]``.
        page: P.
    """

    keys: Side
    values: Side
    packed: torch.Tensor
    first: tuple[torch.Tensor, torch.Tensor]
    page: int

    @property
    def places(self) -> int:
        """Pages of a row."""
        return int(self.keys.buffers[0].shape[1])
