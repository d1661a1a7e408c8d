"""``chunk_prefill``: prompts run in steps of a size that the memory allows.

What a step computes is the same for any number of tokens, so that the text stays the same; what its
activations take grows with them. Sources: Zhang et al. 2025, "MOM: Memory-Efficient Offloaded Mini-Sequence
Inference for Long Context Language Models"; Luo et al. 2024, "Mini-Sequence Transformer".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from graphwright.cost_model.memory import step_workspace, weights_bytes
from graphwright.cost_model.stores import cache_bytes, default_stores
from graphwright.cost_model.target import Target
from graphwright.cost_model.workload import Workload
from graphwright.ir.errors import PassError
from graphwright.ir.graph import Graph
from graphwright.ir.prefill_masks import DENSE_TOKENS
from graphwright.passes.base import CostDelta, Fidelity, Pass, Site, Verdict, register_pass

#: What a step of a prompt may have; the most is what it has without the pass (``runtime/storage.py``).
LEAST, MOST, UNIT = 64, 512, 16


@register_pass
@dataclass(frozen=True)
class ChunkPrefill(Pass):
    """Run prompts in smaller steps.

    The planner takes it where no plan is within the memory otherwise.

    Options:
        tokens: most tokens of a row in a step, 64 to 512, a multiple of 16; ``auto`` takes the most whose
            activations fit the memory beside weights and cache.
    """

    name: ClassVar[str] = "chunk_prefill"
    summary: ClassVar[str] = "run prompts in steps small enough for the memory"
    fidelity: ClassVar[Fidelity] = "exact"
    scope: ClassVar[Literal["site", "program"]] = "program"
    requires: ClassVar[frozenset[str]] = frozenset({"cache"})
    provides: ClassVar[frozenset[str]] = frozenset({"prefill_chunk"})

    tokens: str = "auto"

    def __post_init__(self) -> None:
        if self.tokens == "auto":
            return
        size = int(self.tokens) if self.tokens.isdecimal() else 0
        if not LEAST <= size <= MOST or size % UNIT:
            raise PassError(
                f"chunk_prefill cannot have tokens={self.tokens}",
                hint=f"auto, or a multiple of {UNIT} from {LEAST} to {MOST}",
            )

    @property
    def size(self) -> int:
        """Tokens of a step; what is not resolved leaves it as it is."""
        return MOST if self.tokens == "auto" else int(self.tokens)

    @classmethod
    def variants(cls) -> list[Pass]:
        """None: see the class."""
        return []

    def resolve(self, graph: Graph, workload: Workload, target: Target, memory: float | None) -> Pass:
        """The largest step whose workspace fits; the smallest if none does."""
        if self.tokens != "auto":
            return self
        limit = target.memory_bytes if memory is None else memory
        stores = default_stores(graph)
        left = limit - weights_bytes(graph) - cache_bytes(stores, workload.batch, workload.capacity)
        low, high = LEAST // UNIT, MOST // UNIT + 1  # low fits, or nothing does; high does not
        while high - low > 1:
            middle = (low + high) // 2
            step = step_workspace(graph, stores, middle * UNIT).bytes(workload.batch, workload.capacity)
            low, high = (middle, high) if step <= left else (low, middle)
        return replace(self, tokens=str(low * UNIT))

    def find(self, graph: Graph) -> list[Site]:
        return [Site("program", (), {"graph": graph})]

    def legal(self, site: Site) -> Verdict:
        graph: Graph = site.info["graph"]
        if not graph.placeholders("state"):
            return Verdict(False, "there is no cache: a prompt runs whole")
        if "prefill_chunk" in graph.annotations:
            return Verdict(
                False, f"prompts run in steps of {graph.annotations['prefill_chunk']} tokens already"
            )
        if self.size <= DENSE_TOKENS and graph.calls("prefill_attention"):
            return Verdict(False, f"no step of {self.size} tokens would attend under the mask of the plan")
        return Verdict(True, f"prompts run in steps of at most {self.size} tokens")

    def gain(self, site: Site, workload: Workload, target: Target) -> CostDelta:
        graph: Graph = site.info["graph"]
        stores = default_stores(graph)
        before, after = (
            step_workspace(graph, stores, min(workload.prompt, size)).bytes(workload.batch, workload.capacity)
            for size in (MOST, self.size)
        )
        note = (
            f"activations of a step take {after / 2**20:.3g} MiB, {before / 2**20:.3g} MiB in steps of {MOST}"
        )
        return CostDelta(0.0, float(after - before), note)

    def apply(self, site: Site, graph: Graph) -> None:
        graph.annotations["prefill_chunk"] = self.size
