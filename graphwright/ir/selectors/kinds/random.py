"""``random``: what a choice is worth that knows nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from graphwright.ir.codecs.part import PageShape
from graphwright.ir.selectors.selector import Buffer, Selector, Tensors, register_selector

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
#: 2**64 divided by the golden ratio, as a signed number.
_STRIDE = -0x61C8_8646_80B5_83EB


@register_selector
@dataclass(frozen=True)
class Random(Selector):
    """Scores at random, from the bits of the query and the numbers of the head and of the page.

    The same query chooses the same pages in every step, whatever else the step has. The summary is a byte
    that says that the page is there. A baseline: no selector should be worse.

    Source: SplitMix (Steele et al. 2014, "Fast splittable pseudorandom number generators", section 3).
    """

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "pages at random: the baseline of the others"
    source: ClassVar[str] = "SplitMix, Steele et al. 2014"
    estimates: ClassVar[bool] = False

    def layout(self, shape: PageShape, dtype: torch.dtype) -> dict[str, Buffer]:
        return {"written": Buffer((1,), torch.uint8)}

    def summarize(
        self, keys: torch.Tensor, constants: Tensors, tokens: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        return {"written": torch.ones((keys.shape[0], 1), dtype=torch.uint8, device=keys.device)}

    def score(
        self,
        q: torch.Tensor,
        summary: Tensors,
        constants: Tensors,
        shape: PageShape,
        scale: float,
        closed: torch.Tensor,
    ) -> torch.Tensor:
        plain = q + 0.0  # there is one zero
        bits = plain.view(_BITS[q.element_size()]).long()
        seed = _mixed(bits + _strides(q.shape[3], q.device)).sum(-1)  # [B, H, T]
        seed = _mixed(seed + _strides(q.shape[1], q.device)[:, None])
        drawn = _mixed(seed[..., None] + _strides(summary["written"].shape[1], q.device))
        return _shifted(drawn, 11).double() * 2.0**-53


def _strides(count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(1, count + 1, device=device) * _STRIDE


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """Integers whose every bit depends on every bit of ``x``; products wrap around."""
    x = (x ^ _shifted(x, 30)) * -0x40A7_B892_E31B_1A47
    x = (x ^ _shifted(x, 27)) * -0x6B2F_B644_ECCE_EE15
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """A shift to the right that brings in zeros."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
