"""What a mask is: for each block of a step's queries, the blocks of the cache that they attend to.

Block n of a row holds the tokens ``n * block .. (n + 1) * block`` by number. Block i of the queries is the
columns ``i * block .. (i + 1) * block`` of the step, whose tokens may lie in two blocks of the cache, since a
row may begin its step anywhere. Whatever a mask says, every query sees the blocks of its own query block, the
first block, and nothing after itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, TypeVar

import sympy
import torch

from graphwright.ir.errors import MaskError
from graphwright.ir.spelling import PartParser, spell

#: A row with at most so many valid tokens in its step attends to everything: decoding, verification, and the
#: end of a prompt. As ``runtime/storage.py`` has it for the former two.
DENSE_TOKENS = 64
BLOCKS = (16, 32, 64, 128, 256)
_Expr = Any  # of sympy, which carries no types


@dataclass(frozen=True)
class LongStep:
    """What a mask is made from.

    Attributes:
        q: ``[B, H, T, D]``, rows ``t >= counts[b]`` are padding.
        keys: ``[B, G, S, D]``, token p in slot p; the step's own tokens are there. Slots behind them hold
            anything.
        lengths: ``[B]`` int64, tokens before the step; counts: ``[B]`` int64, valid tokens of the step.
        scale: of the scores.
        block: tokens of a block.
    """

    q: torch.Tensor
    keys: torch.Tensor
    lengths: torch.Tensor
    counts: torch.Tensor
    scale: float
    block: int

    @property
    def query_blocks(self) -> int:
        """Q: blocks of queries."""
        return -(-self.q.shape[2] // self.block)

    @property
    def key_blocks(self) -> int:
        """N: blocks of the cache, the last one perhaps cut short."""
        return -(-self.keys.shape[2] // self.block)

    @property
    def first(self) -> torch.Tensor:
        """``[B, Q]``: the number of the first token of each query block."""
        steps = torch.arange(self.query_blocks, device=self.q.device) * self.block
        return self.lengths[:, None] + steps

    @property
    def last(self) -> torch.Tensor:
        """``[B, Q]``: the number of its last valid token; below ``first`` if it has none."""
        total = self.lengths + self.counts
        return torch.minimum(self.first + self.block, total[:, None]) - 1


@dataclass(frozen=True)
class Work:
    """What a long step under a mask takes, as expressions.

    Attributes:
        seen: tokens that the blocks hold that a query block attends to, on average.
        flops: operations of the estimate, of one sequence.
        reads_keys: whether the estimate reads all keys once more.
    """

    seen: _Expr
    flops: _Expr = 0
    reads_keys: bool = False


@dataclass(frozen=True)
class Mask(ABC):
    """A rule over blocks. Fields of the subclass are its options; prints as ``name(option=value)``."""

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]

    block: int = 128

    def __post_init__(self) -> None:
        if self.block not in BLOCKS:
            raise MaskError(
                f"block={self.block} is not a size of blocks",
                hint=f"choose one of {', '.join(map(str, BLOCKS))}",
            )
        self.check()

    @abstractmethod
    def check(self) -> None:
        """Refuse options that make no mask.

        Raises:
            MaskError: naming the option.
        """

    @abstractmethod
    def keeps(self, step: LongStep) -> torch.Tensor:
        """``[B, 1 or G or H, Q, N]`` bool; what lies after a query may be True, nobody will see it."""

    @abstractmethod
    def work(self, tokens: _Expr, past: _Expr, heads: int, groups: int, features: int) -> Work:
        """Of a step with so many tokens after so many past ones."""

    def check_tokens(self, name: str, tokens: int, least: int) -> None:
        """Refuse a number of tokens that is not a multiple of the block.

        Raises:
            MaskError: with the nearest one that is.
        """
        if tokens < least or tokens % self.block:
            near = max(least, round(tokens / self.block) * self.block)
            raise MaskError(
                f"{name}={tokens} is not a multiple of the block of {self.block} tokens, of at least {least}",
                where=self.name,
                hint=f"{name}={near} is the nearest",
            )

    def __str__(self) -> str:
        return spell(self)


def causal_tokens(tokens: _Expr, past: _Expr, block: int) -> _Expr:
    """Tokens in the blocks up to a query block's end, on average over the step."""
    return past + (tokens + block) / sympy.Integer(2)


def visible_blocks(mask: Mask, step: LongStep) -> torch.Tensor:
    """``[B, M, Q, N]`` bool, M 1 or G or H: what a query block attends to at all.

    A query block without valid tokens has the first block alone. Within the blocks, a query at position p
    sees the tokens up to p.
    """
    number = torch.arange(step.key_blocks, device=step.q.device)
    low = torch.div(step.first, step.block, rounding_mode="floor")[..., None]
    high = torch.div(step.last, step.block, rounding_mode="floor")[..., None]
    always = (number == 0) | (number >= low)
    idle = (step.last < step.first)[..., None]
    reach = torch.where(idle, number == 0, number <= high)
    return (mask.keeps(step) | always[:, None]) & reach[:, None]


_REGISTRY: dict[str, type[Mask]] = {}
M = TypeVar("M", bound=type[Mask])


def register_mask(cls: M) -> M:
    """Class decorator: make a mask known by its ``name``."""
    _REGISTRY[cls.name] = cls
    return cls


def registered_masks() -> dict[str, type[Mask]]:
    """All masks by name."""
    import graphwright.ir.prefill_masks.kinds  # noqa: F401  the package imports its own modules

    return dict(_REGISTRY)


@cache
def parse_mask(text: str) -> Mask:
    """A mask from its text; ``str(parse_mask(text))`` parses to the same one.

    Raises:
        MaskError: it does not parse; the message points at the character.
    """
    return PartParser(text, registered_masks(), MaskError, "mask", "a_shape(sinks=128, recent=2048)").whole()
