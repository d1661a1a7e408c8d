"""Attention whose queries read the pages of their lists: the Python side of ``listed.py``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from graphwright.kernels.triton.attention import Attention
from graphwright.kernels.triton.configs import AttendConfig, AttendShape
from graphwright.kernels.triton.launch import Launch
from graphwright.kernels.triton.listed import attend_listed

# Lists are on the device: splits are planned as if they held this share of the cache.
_EXPECTED = 1 / 8
_UNIT = 64  # slots that a dense cache is planned in


@dataclass(frozen=True)
class Lists:
    """Pages that each query reads; see ``cache_attention``.

    Attributes:
        pages: ``[B, T, G, N]`` int32, ascending.
        chosen: ``[B, T, G]`` int32.
        page, first: tokens of a page, and before the first page.
    """

    pages: torch.Tensor
    chosen: torch.Tensor
    page: int
    first: int


@dataclass
class ListedAttention(Attention):
    """One attention over lists; pages that are packed are those of the lists."""

    lists: Lists = field(kw_only=True)

    def _splits(self, config: AttendConfig) -> tuple[int, int]:
        """Of what lists are expected to hold. Packed pages leave one split for the tail."""
        count = max(1, -(-self._shape().slots // config.chunk))
        return (0, count) if self.pages is None else (count, 1)

    def _attend(
        self,
        config: AttendConfig,
        turned: torch.Tensor,
        part: torch.Tensor,
        lse: torch.Tensor,
        page_splits: int,
    ) -> None:
        batch, heads, tokens, splits, _ = part.shape
        groups, lists = self.keys.shape[1], self.lists
        arguments: dict[str, Any] = dict(pages=lists.pages, chosen=lists.chosen, splits=splits)
        Launch(
            attend_listed,
            (splits * tokens, -(-heads // groups // config.block_m) * groups, batch),
            dict(**self._arguments(turned, part, lse, page_splits), **arguments, limit=lists.pages.shape[3]),
            {
                **self._constants(config),
                "MOST_PAST": self._most_past(),
                "FIRST": lists.first,
                "PAGE": lists.page,
            },
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            label=self._label(config).replace("attend", f"attend listed p{lists.page}", 1),
        ).run()

    def _most_past(self) -> int:
        """A power of two, at least the pages that the tail has a part of; 1 without a tail."""
        if self.pages is None:
            return 1
        return 1 << (self.keys.shape[2] // self.lists.page + 1).bit_length()

    def _shape(self) -> AttendShape:
        """As of a step of one token, whatever it has, over the share that is expected to be read."""
        whole = super()._shape()
        unit = whole.page or _UNIT
        return replace(whole, tokens=1, slots=max(1, round(whole.slots * _EXPECTED / unit)) * unit)
