"""Which pages of a cache attention reads: selectors, each a page summary and a score.

``bounds`` and ``channels(count=16)`` are selectors. See :mod:`graphwright.ir.selectors.selector` for what
one is, and :mod:`graphwright.ir.sparse_ops` for how its scores become lists of pages.
"""

from graphwright.ir.selectors.selector import (
    Buffer,
    Selector,
    parse_selector,
    register_selector,
    registered_selectors,
)

__all__ = ["Buffer", "Selector", "parse_selector", "register_selector", "registered_selectors"]
