"""Which blocks of a cache a long step attends to: masks, each of them a rule over blocks of tokens.

``a_shape(sinks=128, recent=2048)`` is a mask. See :mod:`graphwright.ir.prefill_masks.mask` for what one is
and :mod:`graphwright.ir.prefill_ops` for the attention under it.
"""

from graphwright.ir.prefill_masks.mask import (
    DENSE_TOKENS,
    LongStep,
    Mask,
    Work,
    parse_mask,
    register_mask,
    registered_masks,
    visible_blocks,
)

__all__ = [
    "DENSE_TOKENS",
    "LongStep",
    "Mask",
    "Work",
    "parse_mask",
    "register_mask",
    "registered_masks",
    "visible_blocks",
]
