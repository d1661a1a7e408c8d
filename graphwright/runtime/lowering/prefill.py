"""Sparse prefill, lowered: one opaque op that runs short steps by the kernel of ``cache_attention``.

Long steps attend under their mask (:mod:`graphwright.kernels.masked_attention`). Which of the two a row takes
depends on its own tokens alone, so that a row gives the same whatever the others do.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.node import Node

from graphwright.ir.graph import Graph, argument
from graphwright.ir.ops import SEMANTIC_OPS
from graphwright.ir.prefill_masks import DENSE_TOKENS, parse_mask
from graphwright.kernels.masked_attention import LongAttention
from graphwright.kernels.registry import select
from graphwright.runtime.lowering.kernels import KernelUse

_NAMESPACE = "graphwright_prefill"
_LIBRARY = torch.library.Library(_NAMESPACE, "FRAGMENT")
_OP = "prefill_attention"
_SHORT_ARGUMENTS = (
    "q", "keys", "values", "positions", "lengths", "counts", "tree", "scale", "window", "softcap", "sinks",
    "pages", "chosen", "page", "first",
)  # fmt: skip


def lower_prefill(graph: Graph, device: torch.device, compiled: bool) -> list[KernelUse]:
    """Give every ``prefill_attention`` what runs it on the device; the choices come back for the report.

    Args:
        compiled: whether the program may compile: FlexAttention is only sparse compiled.
    """
    uses: Counter[KernelUse] = Counter()
    for node in graph.calls(_OP):
        given = {name: _fake(argument(node, name)) for name in _SHORT_ARGUMENTS}
        short = select("cache_attention", device, **given)
        obstacle = _flex_obstacle(device, compiled, argument(node, "sinks"))
        node.target = _op(_Runner(short.op, obstacle is None))
        way = ("flex", "FlexAttention") if obstacle is None else ("blocks", f"block by block: {obstacle}")
        uses[KernelUse(_OP, way[0], 0, f"steps of more than {DENSE_TOKENS} tokens: {way[1]}")] += 1
        reason = f"steps of up to {DENSE_TOKENS} tokens: {short.reason}"
        uses[KernelUse("cache_attention", short.provider, 0, reason)] += 1
    return [KernelUse(use.op, use.provider, n, use.reason) for use, n in uses.items()]


def _fake(given: Any) -> Any:
    return given.meta["val"] if isinstance(given, Node) else given


def _flex_obstacle(device: torch.device, compiled: bool, sinks: Node | None) -> str | None:
    """Why FlexAttention does not run the long steps; None if it does."""
    if not compiled:
        return "the program runs op by op, and FlexAttention skips nothing unless it is compiled"
    if device.type == "cpu" and sinks is not None:
        return "on CPUs FlexAttention does not give the sums that attention sinks are part of"
    return None


@dataclass(frozen=True)
class _Runner:
    """The body of the op.

    Attributes:
        short: runs ``cache_attention``.
        flex: whether FlexAttention runs the rest.
    """

    short: torch._ops.OpOverload
    flex: bool

    @property
    def name(self) -> str:
        return f"{_OP}_{self.short.namespace}_{'flex' if self.flex else 'blocks'}"

    def __call__(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        lengths: torch.Tensor,
        counts: torch.Tensor,
        tree: torch.Tensor,
        mask: str,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        sinks: torch.Tensor | None = None,
        pages: torch.Tensor | None = None,
        chosen: torch.Tensor | None = None,
        page: int = 0,
        first: int = 0,
    ) -> torch.Tensor:
        numbers = (scale, window, softcap, sinks)

        def short(rows: slice, columns: slice) -> torch.Tensor:
            listed = None if pages is None else pages[rows, columns]
            count = None if chosen is None else chosen[rows, columns]
            out: torch.Tensor = self.short(
                q[rows, :, columns], keys[rows], values[rows], positions[rows, columns],
                lengths[rows], counts[rows], tree[rows], *numbers, listed, count, page, first,
            )  # fmt: skip
            return out

        # On the meta device only launches are recorded, and FlexAttention's are Inductor's own.
        if q.shape[2] <= DENSE_TOKENS or q.is_meta:
            listed = (pages, chosen, page, first)
            dense: torch.Tensor = self.short(
                q, keys, values, positions, lengths, counts, tree, *numbers, *listed
            )
            return dense
        attention = LongAttention(self.flex, parse_mask(mask), scale, softcap)
        out = attention(q, keys, values, lengths, counts, sinks)
        for row, count in enumerate(counts.tolist()):
            if 0 < count <= DENSE_TOKENS:
                out[row : row + 1, :count] = short(slice(row, row + 1), slice(count))
        return out


_OPS: dict[str, torch._ops.OpOverload] = {}


def _op(runner: _Runner) -> torch._ops.OpOverload:
    """The op that runs it; equal runners share one, so that alike layers stay alike."""
    if runner.name not in _OPS:
        semantic = SEMANTIC_OPS[_OP]
        _LIBRARY.define(runner.name + semantic.schema.removeprefix(_OP), tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(runner.name, runner, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{_NAMESPACE}::{runner.name}", semantic.overload, lib=_LIBRARY)
        _OPS[runner.name] = getattr(getattr(torch.ops, _NAMESPACE), runner.name).default
    return _OPS[runner.name]
