"""A new pass in one file: attention that sees only the newest tokens.

Each attention without a window gets one, so the cache keeps that many tokens and no more. It is the
simplest sparse attention there is. It acts before the cache is placed, and is lossy, so it runs because it
is asked for by name. A pass that the planner shall weigh by itself acts on a graph that has a cache, and says
in ``variants`` which of its settings to price ("Adding to it" in docs/architecture.md). Everything else
(kernels, the ring storage, generation, measurement, the report) comes for free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import graphwright as gw
from graphwright.cost_model.target import Target
from graphwright.cost_model.workload import Workload
from graphwright.ir.graph import Graph, argument, module_path, value
from graphwright.passes.base import CostDelta, Fidelity, Pass, Site, Verdict, register_pass


@register_pass
@dataclass(frozen=True)
class SlideWindow(Pass):
    """Let every attention see the newest tokens only.

    Options:
        tokens: how many, the current one included.
    """

    name: ClassVar[str] = "slide_window"
    summary: ClassVar[str] = "attend to the newest tokens only, and store no others"
    fidelity: ClassVar[Fidelity] = "lossy"

    tokens: int = 128

    def find(self, graph: Graph) -> list[Site]:
        """Every attention op; it has not met its cache yet."""
        return [Site(module_path(node), (node,)) for node in graph.calls("attention")]

    def legal(self, site: Site) -> Verdict:
        """A layer that the model itself gave a narrower window keeps it."""
        window = argument(site.nodes[0], "window")
        if 0 < window <= self.tokens:
            return Verdict(False, f"the model's own window of {window} tokens is narrower")
        return Verdict(True, f"sees the newest {self.tokens} tokens")

    def gain(self, site: Site, workload: Workload, target: Target) -> CostDelta:
        """The keys and values that are neither read nor stored any more."""
        stored = [value(argument(site.nodes[0], name)) for name in ("k", "v")]
        per_token = sum(t.shape[1] * t.shape[3] * t.element_size() for t in stored) * workload.batch
        unread = max(workload.mean_context - self.tokens, 0) * per_token
        unstored = max(workload.capacity - self.tokens, 0) * per_token
        return CostDelta(-unread / target.bandwidth, -unstored)

    def apply(self, site: Site, graph: Graph) -> None:
        """The same op with a window; a pass never edits a node in place."""
        old = site.nodes[0]
        q, k, v, scale, softcap, sinks = (
            argument(old, name) for name in ("q", "k", "v", "scale", "softcap", "sinks")
        )
        new = graph.emit("attention", q, k, v, scale, self.tokens, softcap, sinks, before=old)
        graph.replace(old, new)
        graph.fx.erase_node(old)


def tiny_llama() -> LlamaForCausalLM:
    """Four layers with random weights: nothing to download."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    return LlamaForCausalLM(config).eval()


def main() -> None:
    """Optimize with and without the pass; compare what is stored and what is lost."""
    model = tiny_llama()
    tokens = torch.randint(3, 512, (1, 300))
    workload = gw.Workload(prompt=256, generate=64)
    with torch.no_grad():
        expected = model(tokens).logits.float().log_softmax(-1)

    for passes in (["place_cache"], ["slide_window{tokens=64}", "place_cache"]):
        fast = gw.optimize(model, target="cpu", workload=workload, budget=gw.Budget(kl=10.0), passes=passes)
        lost = fast.score(tokens).float().log_softmax(-1)
        kl = (expected.exp() * (expected - lost)).sum(-1)
        print(" + ".join(passes))
        print(f"  mean KL against the stock model: {kl.mean():.2e} nats a token")
        print(f"  of which while the window holds everything: {kl[:, :64].mean():.2e}")
        print(f"  bytes of the cache: {fast.report.measured['memory']['cache_bytes']:,.0f}\n")

    print(fast.report)


if __name__ == "__main__":
    main()
