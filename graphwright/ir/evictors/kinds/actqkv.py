"""``actqkv``: the queries that stand out speak for the window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from graphwright.ir.errors import PassError
from graphwright.ir.evictors.evictor import Evictor, Seen, register_evictor


@register_evictor
@dataclass(frozen=True)
class ActQKV(Evictor):
    """Attention of probe queries, those of the window whose activations deviate most.

    Source: Xiao et al., "Activation-aware Probe-Query: Effective Key-Value Retrieval for Long-Context LLMs
    Inference" (ACL Findings 2025): probe queries by the token-level Activation Bias within a window. The
    bias here is a query's squared distance from the window's mean, each feature in units of its variance
    over the window. The paper retrieves blocks from a full cache; here the same probes decide what stays.

    Options:
        probes: the fraction of the window's queries that are probes, at least one.
    """

    name: ClassVar[str] = "actqkv"
    summary: ClassVar[str] = "what the newest queries that stand out attend to"
    source: ClassVar[str] = "ActQKV, Xiao et al. 2025"

    probes: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.probes <= 1:
            raise PassError(f"probes={self.probes} is not a fraction of queries", hint="probes=0.25 is usual")

    def score(self, seen: Seen) -> torch.Tensor:
        """The mean over each head's probes."""
        if not seen.queries.shape[2]:
            return seen.attention()
        bias = activation_bias(seen.queries)
        count = max(1, round(self.probes * bias.shape[2]))
        probes = bias.sort(dim=2, descending=True, stable=True).indices[:, :, :count]
        return seen.attention(torch.zeros_like(bias).scatter_(2, probes, 1.0))


def activation_bias(queries: torch.Tensor) -> torch.Tensor:
    """How far each of ``[B, H, W, D]`` is from the others of its head: ``[B, H, W]`` float32."""
    x = queries.float()
    deviation = (x - x.mean(2, keepdim=True)).square()
    return (deviation / deviation.mean(2, keepdim=True).clamp(min=1e-12)).sum(-1)
