"""Codecs as text: ``hadamard >> token_scale >> uniform(bits=4)``."""

from __future__ import annotations

from functools import cache

from graphwright.ir.codecs.codec import Codec
from graphwright.ir.codecs.part import registered_parts
from graphwright.ir.errors import CodecError
from graphwright.ir.spelling import PartParser

_EXAMPLE = "hadamard >> token_scale >> uniform(bits=4)"


@cache
def parse_codec(text: str) -> Codec:
    """A codec from its text; ``str(parse_codec(text))`` parses to the same codec.

    Raises:
        CodecError: it does not parse; the message points at the character.
    """
    parts = PartParser(text, registered_parts(), CodecError, "part", _EXAMPLE).chain(">>")
    try:
        return Codec(tuple(parts))
    except CodecError as error:
        raise CodecError(error.what, where=text, hint=error.hint) from None
