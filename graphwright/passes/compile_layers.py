"""``compile_layers``: hand what is not a kernel to Inductor, one decoder layer for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from graphwright.cost_model.graph_cost import graph_cost
from graphwright.cost_model.prediction import predict
from graphwright.cost_model.target import Target
from graphwright.cost_model.workload import Workload
from graphwright.ir.graph import Graph, is_tensor, op_name
from graphwright.passes.base import CostDelta, Fidelity, Pass, Site, Verdict, register_pass

# Calls that do no work of their own: views and sizes.
_FREE = (
    "view",
    "transpose",
    "permute",
    "unsqueeze",
    "squeeze",
    "slice",
    "select",
    "expand",
    "sym_size",
    "getitem",
)
# Kernels stay calls of their own, compiled or not.
_KERNELS = (
    "linear", "routed_linear", "gated_mlp", "mlp", "attention", "cache_attention", "cache_append",
    "prefix_attention", "prefill_attention",
)  # fmt: skip


@register_pass
@dataclass(frozen=True)
class CompileLayers(Pass):
    """Fuse the arithmetic between kernels; alike layers share one compiled function."""

    name: ClassVar[str] = "compile_layers"
    summary: ClassVar[str] = "fuse everything that is not a kernel with Inductor, one layer for all alike"
    fidelity: ClassVar[Fidelity] = "reordered"
    scope: ClassVar[Literal["site", "program"]] = "program"
    provides: ClassVar[frozenset[str]] = frozenset({"compiled"})

    def find(self, graph: Graph) -> list[Site]:
        work = [n for n in graph.nodes if op_name(n) is not None and is_tensor(n)]
        calls = sum(1 for n in work if not any(word in (op_name(n) or "") for word in _FREE))
        kernels = sum(1 for n in work if op_name(n) in _KERNELS)
        info = {"calls": calls, "kernels": kernels, "graph": graph}
        return [Site("program", (), info)] if calls > kernels else []

    def legal(self, site: Site) -> Verdict:
        return Verdict(
            True, f"{site.info['calls'] - site.info['kernels']} calls between kernels can be fused"
        )

    def gain(self, site: Site, workload: Workload, target: Target) -> CostDelta:
        place: dict[str, Any] = {"batch": workload.batch, "context": workload.mean_context, "phase": "decode"}
        steps = [
            predict(graph_cost(site.info["graph"], fused=fused), target, **place) for fused in (False, True)
        ]
        before, after = steps
        note = f"{before.launches:,.0f} launches a step become {after.launches:,.0f}"
        return CostDelta(after.seconds - before.seconds, 0.0, note)

    def apply(self, site: Site, graph: Graph) -> None:
        graph.annotations["compile"] = True
