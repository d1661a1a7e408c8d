"""``channels``: inner products of the few features that matter most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from graphwright.ir.codecs.packing import pack, packed_width, unpack
from graphwright.ir.codecs.part import PageShape
from graphwright.ir.errors import SelectorError
from graphwright.ir.selectors.products import key_products
from graphwright.ir.selectors.selector import Buffer, Samples, Selector, Tensors, register_selector

_BITS = (4, 8, 16)


@register_selector
@dataclass(frozen=True)
class Channels(Selector):
    """Some features of every key, its labels, chosen once for each key/value head on calibration text.

    Those with the largest mean ``|q_c k_c|`` over tokens and the group's query heads are kept; without
    queries, those with the largest mean ``|k_c|``. The score takes the labels' part of each inner product
    for the whole, at attention's own scale: what the other features add is taken to be 0, which is its
    mean where their signs are not known. That is flatter than attention, never sharper on average.

    Args:
        count: labels of a key.
        bits: of a label: 4 or 8, in steps from a token's lowest to its highest label, or 16: as in the
            cache, in the cache's dtype.

    Source: Yang et al. 2024, "Post-Training Sparse Attention with Double Sparsity", section 3.
    """

    name: ClassVar[str] = "channels"
    summary: ClassVar[str] = "few channels of every key, chosen on calibration text"
    source: ClassVar[str] = "Double Sparsity, Yang et al. 2024"
    needs_samples: ClassVar[bool] = True

    count: int = 16
    bits: int = 16

    def __post_init__(self) -> None:
        if self.count < 1:
            raise SelectorError(
                f"channels keeps count={self.count} channels of a key",
                where="channels",
                hint="keep 1 or more; an eighth of the key's width is usual",
            )
        if self.bits not in _BITS:
            raise SelectorError(
                f"channels has no labels of {self.bits} bits",
                where="channels",
                hint="choose bits=4, 8 or 16",
            )

    def obstacle(self, shape: PageShape) -> str | None:
        if self.count > shape.features:
            return f"a key has {shape.features} channels, and count={self.count} are to be kept"
        return None

    def layout(self, shape: PageShape, dtype: torch.dtype) -> dict[str, Buffer]:
        self._check(shape)
        tokens = (shape.groups, shape.tokens)
        if self.bits == 16:
            return {"labels": Buffer((*tokens, self.count), dtype)}
        width = packed_width(self.count, self.bits)
        return {"codes": Buffer((*tokens, width), torch.uint8), "range": Buffer((*tokens, 2), dtype)}

    def constants(self, shape: PageShape, heads: int, samples: Samples) -> dict[str, torch.Tensor]:
        """``channels [G, count]`` int64, ascending; the first ones without samples."""
        self._check(shape)
        if samples.keys is None:
            first = torch.arange(self.count).expand(shape.groups, self.count)
            return {"channels": first.contiguous()}
        weight = samples.keys.abs().double()  # [G, n, D]
        if samples.queries is not None:
            grouped = samples.queries.unflatten(0, (shape.groups, heads // shape.groups))
            weight = weight * grouped.abs().double().mean(1)
        best = weight.mean(1).argsort(dim=-1, descending=True, stable=True)[:, : self.count]
        return {"channels": best.sort(-1).values.contiguous()}

    def summarize(
        self, keys: torch.Tensor, constants: Tensors, tokens: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        chosen = constants["channels"][None, :, None, :].expand(*keys.shape[:3], self.count)
        labels = keys.gather(-1, chosen)
        if self.bits == 16:
            return {"labels": labels}
        exact, top = labels.double(), 2**self.bits - 1
        low = exact.amin(-1, keepdim=True).to(keys.dtype)
        step = ((exact.amax(-1, keepdim=True) - low.double()) / top).to(keys.dtype)
        size = torch.where(step == 0, 1.0, step.double())
        codes = ((exact - low.double()) / size).round().clamp(0, top)
        return {"codes": pack(codes, self.bits), "range": torch.cat((low, step), dim=-1)}

    def score(
        self,
        q: torch.Tensor,
        summary: Tensors,
        constants: Tensors,
        shape: PageShape,
        scale: float,
        closed: torch.Tensor,
    ) -> torch.Tensor:
        grouped = q.unflatten(1, (shape.groups, -1))  # [B, G, H / G, T, D]
        chosen = constants["channels"][:, None, None, :].expand(*grouped.shape[:4], self.count)
        part = grouped.gather(-1, chosen).flatten(1, 2)
        return (key_products(part, self._labels(summary)) * scale).logsumexp(-1)

    def _labels(self, summary: Tensors) -> torch.Tensor:
        """``[B, N, G, P, count]``."""
        if self.bits == 16:
            return summary["labels"]
        low, step = summary["range"].double().split(1, dim=-1)
        return unpack(summary["codes"], self.bits, self.count) * step + low

    def _check(self, shape: PageShape) -> None:
        reason = self.obstacle(shape)
        if reason is not None:
            raise SelectorError(
                reason, where=str(self), hint=f"keep at most {shape.features}: channels(count=...)"
            )
