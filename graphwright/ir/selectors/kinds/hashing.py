"""``hashing``: keys on the query's side of most random planes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from graphwright.ir.codecs.packing import pack, unpack
from graphwright.ir.codecs.part import PageShape
from graphwright.ir.errors import SelectorError
from graphwright.ir.selectors.selector import Buffer, Samples, Selector, Tensors, register_selector

#: Other random numbers than codecs draw.
_SEED = 0x48_41_58
#: How much less a key counts that is at the opposite side of every plane, as a logarithm. Bits that differ
#: are the angle's share of pi: near a right angle this is the slope of an inner product, times scale,
#: of vectors for which ``scale * |q| * |k|`` is about 10.
_SHARPNESS = 32.0


@lru_cache(maxsize=32)
def _planes(bits: int, features: int) -> torch.Tensor:
    """Normals of random planes, float32 ``[bits, D]``; shared by all layers: not to be written."""
    with unset_fake_temporarily():
        generator = torch.Generator().manual_seed(_SEED)
        return torch.randn(bits, features, generator=generator, dtype=torch.float32, device="cpu")


@register_selector
@dataclass(frozen=True)
class Hashing(Selector):
    """On which side of random planes each key lies; the score counts planes that part it from the query.

    The share of planes between two vectors estimates the angle between them. A key with h of b bits unlike
    the query's counts ``exp(-32 h / b)``, and a page scores the logarithm of the mean over its keys: nearly
    its best key, with less regard to chance than the best key alone. Of several rounds of planes, a key's
    best counts, as keys that share a bucket in any round of hashing meet. Nothing is known of the keys'
    norms, so that scores are an order and no estimate of attention.

    Args:
        bits: planes of a round, a multiple of 8.
        rounds: independent sets of planes.

    Source: the hashing attention of HAX ("Overcoming Long-Context Limitations of State-Space Models via
    Context-Dependent Sparse Attention", 2025); signs of random projections: Charikar 2002, "Similarity
    estimation techniques from rounding algorithms", section 3.
    """

    name: ClassVar[str] = "hashing"
    summary: ClassVar[str] = "locality-sensitive hashes: signs of random projections of every key"
    source: ClassVar[str] = "HAX, 2025; SimHash, Charikar 2002"
    estimates: ClassVar[bool] = False

    bits: int = 64
    rounds: int = 1

    def __post_init__(self) -> None:
        if self.bits < 8 or self.bits % 8:
            raise SelectorError(
                f"hashing has no hashes of {self.bits} bits",
                where="hashing",
                hint="choose a multiple of 8; 64 or more tell keys apart",
            )
        if self.rounds < 1:
            raise SelectorError(
                f"hashing in rounds={self.rounds} makes no hashes", where="hashing", hint="1 or more rounds"
            )

    def layout(self, shape: PageShape, dtype: torch.dtype) -> dict[str, Buffer]:
        size = (shape.groups, shape.tokens, self.rounds * self.bits // 8)
        return {"hashes": Buffer(size, torch.uint8)}

    def constants(self, shape: PageShape, heads: int, samples: Samples) -> dict[str, torch.Tensor]:
        """``planes [rounds * bits, D]`` float32, independent standard normal numbers."""
        return {"planes": _planes(self.rounds * self.bits, shape.features)}

    def summarize(
        self, keys: torch.Tensor, constants: Tensors, tokens: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        return {"hashes": pack(_sides(keys, constants["planes"]), 1)}

    def score(
        self,
        q: torch.Tensor,
        summary: Tensors,
        constants: Tensors,
        shape: PageShape,
        scale: float,
        closed: torch.Tensor,
    ) -> torch.Tensor:
        rounds = (self.rounds, self.bits)
        own = _signs(_sides(q, constants["planes"])).unflatten(-1, rounds)
        own = own.unflatten(1, (shape.groups, -1))  # [B, G, H / G, T, R, bits]
        packed = summary["hashes"]
        keys = _signs(unpack(packed, 1, self.rounds * self.bits)).unflatten(-1, rounds)
        agreement = torch.einsum("bghtrd,bngprd->bghtnpr", own, keys)  # small integers: exact
        apart = (self.bits - agreement.amax(-1)) / (2 * self.bits)
        mass = (apart.double() * -_SHARPNESS).logsumexp(-1) - math.log(shape.tokens)
        return mass.flatten(1, 2)


def _sides(x: torch.Tensor, planes: torch.Tensor) -> torch.Tensor:
    """On which side of each plane vectors lie, bool ``[..., planes]``."""
    return x.double() @ planes.double().T >= 0


def _signs(sides: torch.Tensor) -> torch.Tensor:
    return sides.float() * 2 - 1
