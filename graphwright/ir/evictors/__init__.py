"""Which cached tokens stay when a layer's cache is full, and what becomes of the others.

``snapkv`` and ``random(seed=1)`` are evictors. See :mod:`graphwright.ir.evictors.evictor` for what one is,
and :mod:`graphwright.runtime.evicted_storage` for when it is asked.
"""

from graphwright.ir.evictors.evictor import (
    Evictor,
    Kept,
    Seen,
    choose,
    parse_evictor,
    register_evictor,
    registered_evictors,
)

__all__ = [
    "Evictor",
    "Kept",
    "Seen",
    "choose",
    "parse_evictor",
    "register_evictor",
    "registered_evictors",
]
