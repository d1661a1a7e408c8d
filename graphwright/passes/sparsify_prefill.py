"""``sparsify_prefill``: prompts attend to blocks of their past, as a mask says.

Steps of more than 64 tokens, which only prompts have, skip the blocks of the cache that the mask leaves out;
shorter ones, and rows with fewer tokens in a step, attend as before. What is stored stays whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx.node import Node

from graphwright.cost_model.cost import Cost
from graphwright.cost_model.prediction import predict
from graphwright.cost_model.prefill_costs import dense_cost, masked_cost
from graphwright.cost_model.shapes import Call, Shapes
from graphwright.cost_model.target import Target
from graphwright.cost_model.workload import Workload
from graphwright.ir.graph import Graph, argument, module_path, op_name
from graphwright.ir.prefill_masks import DENSE_TOKENS, parse_mask
from graphwright.passes.base import CostDelta, Fidelity, Pass, Site, Verdict, register_pass

#: Tokens of a prompt's steps where nothing says otherwise, as ``runtime/storage.py`` has it.
STEP = 512
_BEFORE_MASK = ("q", "keys", "values", "positions", "lengths", "counts", "tree")
_BEHIND_MASK = ("scale", "window", "softcap", "sinks", "pages", "chosen", "page", "first")


@register_pass
@dataclass(frozen=True)
class SparsifyPrefill(Pass):
    """Let prompts attend under a mask of blocks.

    The planner chooses by the time of a decode step, which this leaves alone: it applies where it is named.

    Options:
        mask: which blocks a block of queries sees: ``a_shape(sinks=128, recent=1024)``,
            ``vertical_slash(verticals=512, slashes=512)`` or ``chunked(chunk=512, keep=0.25)``.
    """

    name: ClassVar[str] = "sparsify_prefill"
    summary: ClassVar[str] = "let prompts attend to blocks of their past only, as a mask says (FlexAttention)"
    fidelity: ClassVar[Fidelity] = "lossy"
    needs_context: ClassVar[bool] = True
    requires: ClassVar[frozenset[str]] = frozenset({"cache"})
    follows: ClassVar[frozenset[str]] = frozenset(
        {"quantize_cache", "evict_tokens", "sparsify_attention", "share_prefix"}
    )

    mask: str = "chunked"

    def __post_init__(self) -> None:
        parse_mask(self.mask)

    @classmethod
    def variants(cls) -> list[Pass]:
        """None: decode steps, by which plans are compared, stay the same."""
        return []

    def find(self, graph: Graph) -> list[Site]:
        found = graph.calls("cache_attention", "prefix_attention", "prefill_attention")
        info = {"graph": graph, "shapes": Shapes(graph) if found else None}
        return [Site(module_path(node) or f"attention.{i}", (node,), info) for i, node in enumerate(found)]

    def legal(self, site: Site) -> Verdict:
        (attention,) = site.nodes
        chunk = _chunk(site.info["graph"])
        if chunk <= DENSE_TOKENS:
            return Verdict(False, f"prompts run in steps of {chunk} tokens, which attend to everything")
        obstacle = _obstacle(attention)
        if obstacle is not None:
            return Verdict(False, obstacle)
        return Verdict(True, f"steps of more than {DENSE_TOKENS} tokens attend under {parse_mask(self.mask)}")

    def gain(self, site: Site, workload: Workload, target: Target) -> CostDelta:
        """The prompt's seconds, spread over the tokens that are generated after it."""
        (attention,) = site.nodes
        call, mask, chunk = (
            Call(attention, site.info["shapes"]),
            parse_mask(self.mask),
            _chunk(site.info["graph"]),
        )
        before = _prompt_seconds(dense_cost(call), target, workload, chunk)
        after = _prompt_seconds(masked_cost(call, mask), target, workload, chunk)
        note = (
            f"attention of a prompt of {workload.prompt:,} tokens takes {after * 1e3:.3g} ms, "
            f"{before * 1e3:.3g} ms without a mask; decode steps stay the same"
        )
        return CostDelta((after - before) / workload.generate, 0.0, note)

    def apply(self, site: Site, graph: Graph) -> None:
        (attention,) = site.nodes
        before = [argument(attention, name) for name in _BEFORE_MASK]
        behind = [argument(attention, name) for name in _BEHIND_MASK]
        # Spelled out: the mask of a saved plan stays what it was.
        new = graph.emit("prefill_attention", *before, str(parse_mask(self.mask)), *behind, before=attention)
        graph.replace(attention, new)
        graph.fx.erase_node(attention)


def _chunk(graph: Graph) -> int:
    """Tokens of a prompt's steps."""
    return int(graph.annotations.get("prefill_chunk", STEP))


def _obstacle(attention: Node) -> str | None:
    """Why blocks of these keys and values cannot be skipped; None if they can."""
    name = op_name(attention)
    if name == "prefill_attention":
        return f"it attends under {argument(attention, 'mask')} already"
    if name == "prefix_attention":
        return "the prefix that rows share is stored apart: blocks are counted from the first token"
    window = argument(attention, "window")
    if window:
        return f"a window of {window} tokens is short already: left alone"
    stores = [argument(attention, name) for name in ("keys", "values")]
    if any(op_name(store) == "cache_read" for store in stores):
        return "the cache is packed, and its attention decodes all pages in one go"
    if any(store.op != "placeholder" for store in stores):
        return "keys or values are computed from what is stored"
    if any("store" in store.meta for store in stores):
        return "the store does not keep every token in the slot of its number"
    return None


def _prompt_seconds(cost: Cost, target: Target, workload: Workload, chunk: int) -> float:
    """What one attention takes for the workload's prompts, which run in steps of so many tokens."""
    return sum(
        predict(
            cost, target, batch=workload.batch, context=start, tokens=min(chunk, workload.prompt - start),
            op="cache_attention",
        ).seconds
        for start in range(0, workload.prompt, chunk)
    )  # fmt: skip
