"""The device functions of codec parts: what a fused kernel needs to decode or encode a page.

A part that kernels can fuse registers here, from a module of its family in ``parts/``: a quantizer as a
:class:`LevelTile`, a scaling as a :class:`ScaleTile`. Orthogonal maps need nothing: queries and results
are turned instead (``combine.py``). :func:`tile_codec` puts the tiles of a codec
together, and :func:`obstacle` says why there is none.

Conventions of device functions. ``row`` is the number of a page of one head, ``(b * N + place) * G + g``,
int64. ``t`` are tokens in the page and ``d`` features of the head, int32 tensors that broadcast against
each other, so that one function serves tiles of keys (features by tokens) and of values (tokens by
features). ``buffers`` and ``constants`` are the part's own, as tuples of pointers in the codec's order;
buffers are contiguous. ``OPTION`` is an integer of the part's choice, ``PAGE`` the tokens of a page (P)
and ``FEATURES`` those of a head (D), all ``tl.constexpr``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from graphwright.ir.codecs import Codec, PageShape, parse_codec
from graphwright.ir.codecs.part import Part
from graphwright.ir.errors import CodecError

#: Along what a scaling has one scale: tokens of a page, features, both (groups of features), or nothing.
Axis = Literal["token", "channel", "group", "none"]


@dataclass(frozen=True)
class LevelTile:
    """A quantizer in a kernel: codes to levels and back.

    A decoded number is ``unit * (level + shift)``; the two numbers are folded into scales.

    Attributes:
        decode: ``(buffers, constants, row, t, d, OPTION, PART, PARTS, PAGE, FEATURES, HALF)``, gives
            levels. ``d`` counts within part ``PART`` of the features; past its end levels are finite and
            not used.
            ``HALF``: levels are float16, else float32.
        encode: ``(y, buffers, constants, row, t, d, OPTION, PAGE, FEATURES, RUNS, GAIN)``, see ``encode.py``;
            None: pages are packed by the reference.
        option: of the device functions.
        parts: equal runs of features whose codes share bytes: byte j holds feature j of every part.
        unit, shift: see above.
        is_float: levels are numbers in the dtype in which they are stored.
        scaled: needs a scaling before it.
        runs: equal runs of the features that ``encode`` takes: those of the narrowest plane of codes.
        gain: what numbers are multiplied by before they are rounded.
    """

    decode: Any
    encode: Any = None
    option: int = 0
    parts: int = 1
    unit: float = 1.0
    shift: float = 0.0
    is_float: bool = False
    scaled: bool = True
    runs: int = 1
    gain: float = 1.0


@dataclass(frozen=True)
class ScaleTile:
    """A scaling in a kernel: ``x = scale * y + middle``.

    Attributes:
        decode: ``(buffers, constants, row, g, t, d, OPTION, PAGE, FEATURES) -> (scale, middle)`` float32; of
            ``t`` alone for axis token, of ``d`` alone for axis channel.
        encode: ``(x, buffers, row, g, t, d, OPTION, PAGE, FEATURES) -> y``, see ``encode.py``; None: pages
            are packed by the reference.
        axis: what the scale depends on.
        option: of the device functions.
    """

    decode: Any
    encode: Any = None
    axis: Axis = "token"
    option: int = 0


@dataclass(frozen=True)
class TileCodec:
    """A codec as a kernel runs it: orthogonal maps, at most one scaling, one quantizer.

    Attributes:
        codec: the codec.
        maps: how many maps stand before the scaling.
        scale: None where the quantizer takes numbers as they are.
        level: the quantizer's tile.
    """

    codec: Codec
    maps: int
    scale: ScaleTile | None
    level: LevelTile

    def own(self, names: Sequence[str], tensors: Sequence[Any], index: int) -> tuple[Any, ...]:
        """Of tensors with these names (``"1.codes"``), those of part ``index``."""
        return tuple(x for name, x in zip(names, tensors, strict=True) if name.split(".")[0] == str(index))


_LEVELS: dict[str, Callable[[Any, PageShape], LevelTile | str]] = {}
_SCALES: dict[str, Callable[[Any, PageShape], ScaleTile | str]] = {}


def level_tile(name: str) -> Callable[[Callable], Callable]:
    """Decorator: how the quantizer of this name runs in a kernel, from the part and the page's shape.

    The function returns a :class:`LevelTile`, or text that says why the kernel cannot.
    """
    return _register(_LEVELS, name)


def scale_tile(name: str) -> Callable[[Callable], Callable]:
    """Decorator: how the scaling of this name runs in a kernel; as :func:`level_tile`."""
    return _register(_SCALES, name)


def _register(table: dict[str, Any], name: str) -> Callable[[Callable], Callable]:
    def add(make: Callable) -> Callable:
        table[name] = make
        return make

    return add


@cache
def _discover() -> None:
    from graphwright.kernels.triton import parts

    for module in pkgutil.iter_modules(parts.__path__):
        importlib.import_module(f"{parts.__name__}.{module.name}")


@cache
def tile_codec(text: str, shape: PageShape) -> TileCodec:
    """The tiles of a codec for pages of this shape.

    Raises:
        CodecError: no kernel decodes this codec; the reason names the part.
    """
    _discover()
    codec = parse_codec(text)
    transforms = codec.transforms
    maps = [p for p in transforms if p.orthogonal]
    if list(transforms[: len(maps)]) != maps or len(transforms) - len(maps) > 1:
        raise CodecError(f"{codec} is not orthogonal maps, one scaling and a quantizer")
    correctors = codec.parts[len(transforms) + 1 :]
    if correctors:
        raise CodecError(f"no kernel decodes the corrector {correctors[0]}")
    scaling = transforms[len(maps)] if len(transforms) > len(maps) else None
    level = _made(_LEVELS, codec.quantizer, shape)
    scale = None if scaling is None else _made(_SCALES, scaling, shape)
    if scale is None and level.scaled and not level.is_float:
        raise CodecError(f"there is no scaling before {codec.quantizer}")
    return TileCodec(codec, len(maps), scale, level)


def _made(table: dict[str, Any], part: Part, shape: PageShape) -> Any:
    if part.name not in table:
        raise CodecError(f"no kernel has a device function for {part}")
    made = table[part.name](part, shape)
    if isinstance(made, str):
        raise CodecError(f"{part}: {made}")
    return made


def code_parts(bits: int) -> int:
    """Features that share a byte of the widest plane of codes of so many bits."""
    return 8 // (1 << (bits.bit_length() - 1))


def code_runs(bits: int) -> int:
    """Features that share a byte of the narrowest plane of codes of so many bits."""
    return 8 // (bits & -bits)


def obstacle(text: str, shape: PageShape) -> str | None:
    """Why no kernel decodes pages of this codec; None if one does."""
    try:
        tile_codec(text, shape)
    except CodecError as error:
        return error.what
    return None
