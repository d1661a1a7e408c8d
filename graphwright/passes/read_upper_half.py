"""``read_upper_half``: read hierarchical codes of a packed cache by their upper halves.

The upper codes of ``hierarchical(upper=b)`` are those of ``uniform(bits=b)``, in a buffer of their own. What
reads the store then reads a store of the same pages without the buffer of lower codes, with a codec that
ends in ``uniform(bits=b)``: fewer bytes, by kernels that know nothing of the lower half. The other buffers
keep their names and contents, so that a draft and its verifier, which reads both halves, share the pages.
Source: Tiwari et al. 2025, "QuantSpec", section 4 (the draft's view of the cache).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx.node import Node

from graphwright.cost_model.cost import CACHE, B, C, Cost
from graphwright.cost_model.prediction import predict
from graphwright.cost_model.target import Target
from graphwright.cost_model.workload import Workload
from graphwright.ir.codecs import Codec, parse_codec
from graphwright.ir.codecs.parts.hierarchical import Hierarchical
from graphwright.ir.codecs.parts.uniform import Uniform
from graphwright.ir.graph import Graph, argument, value
from graphwright.ir.packed_ops import page_shape
from graphwright.passes.base import CostDelta, Fidelity, Pass, Site, Verdict, register_pass

_HINT = "pack the cache with quantize_cache{codec=quantspec}"


@register_pass
@dataclass(frozen=True)
class ReadUpperHalf(Pass):
    """Read the upper codes of hierarchical ones alone."""

    name: ClassVar[str] = "read_upper_half"
    summary: ClassVar[str] = "read the upper half of each hierarchical code: what a draft sees (QuantSpec)"
    fidelity: ClassVar[Fidelity] = "lossy"
    requires: ClassVar[frozenset[str]] = frozenset({"cache"})
    follows: ClassVar[frozenset[str]] = frozenset({"quantize_cache"})

    @classmethod
    def variants(cls) -> list[Pass]:
        """None: a program that always reads half of the codes does better to store no more."""
        return []

    def find(self, graph: Graph) -> list[Site]:
        reads = graph.calls("cache_read")
        if reads:
            return [Site(_store_name(read), (read,)) for read in reads]
        return [Site("program")] if graph.placeholders("state") else []

    def legal(self, site: Site) -> Verdict:
        if not site.nodes:
            return Verdict(False, f"no store of the cache is packed: {_HINT}")
        codec = _codec(site.nodes[0])
        quantizer = codec.quantizer
        if not isinstance(quantizer, Hierarchical):
            return Verdict(False, f"{quantizer} has no upper half: {_HINT}")
        if codec.parts[-1] is not quantizer:
            return Verdict(False, f"{codec.parts[-1]} corrects what both halves together leave")
        return Verdict(True, f"the upper {quantizer.upper} of {quantizer.upper + quantizer.lower} bits")

    def gain(self, site: Site, workload: Workload, target: Target) -> CostDelta:
        (read,) = site.nodes
        shape = page_shape(value(argument(read, "store")[1]), argument(read, "page"))
        codec = _codec(read)
        unread = (codec.page_bytes(shape) - _upper(codec).page_bytes(shape)) / shape.tokens
        cost = Cost(read={CACHE: B * C * 1.0})
        per_byte = predict(
            cost, target, batch=workload.batch, context=workload.mean_context, tokens=1
        ).seconds  # fmt: skip
        return CostDelta(-per_byte * unread, 0.0, f"{unread:.0f} bytes of a token not read")

    def apply(self, site: Site, graph: Graph) -> None:
        (read,) = site.nodes
        codec = _codec(read)
        upper, place = str(_upper(codec)), codec.parts.index(codec.quantizer)
        store = [part for part in argument(read, "store") if part.meta["store"]["buffer"] != f"{place}.lower"]
        for part in store:
            about = {**part.meta["store"], "codec": upper}
            if about["buffer"] == f"{place}.upper":
                about["buffer"] = f"{place}.codes"
            part.meta["store"] = about  # copies of a graph share the old one
        given = [argument(read, name) for name in ("constants", "slots", "lengths", "counts")]
        new = graph.emit("cache_read", store, *given, upper, argument(read, "page"), before=read)
        graph.replace(read, new)
        graph.fx.erase_node(read)


def _store_name(read: Node) -> str:
    name: str = argument(read, "store")[0].meta["store"]["name"]
    return name


def _codec(read: Node) -> Codec:
    return parse_codec(argument(read, "codec"))


def _upper(codec: Codec) -> Codec:
    """The codec whose buffers are those of hierarchical codes without the lower ones."""
    quantizer = codec.quantizer
    assert isinstance(quantizer, Hierarchical)
    return Codec((*codec.parts[:-1], Uniform(bits=quantizer.upper)))
