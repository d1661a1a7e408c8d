"""Tiny models with packed caches: how a method is asked for, and programs that are quick to build."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphwright.cost_model.target import resolve_target
from graphwright.cost_model.workload import Workload
from graphwright.ir.codecs.methods import Method
from graphwright.ir.graph import Graph
from graphwright.optimizer.build import make_program
from graphwright.optimizer.driver import capture_step
from graphwright.optimizer.quality.samples import StoreSamples
from graphwright.passes.base import SiteRecord, parse_pass
from graphwright.runtime.lowering import LoweringOptions, lower
from graphwright.runtime.model import OptimizedModel
from graphwright.runtime.program import Program
from graphwright.runtime.speculation import Speculation, make_speculation
from tests.architectures import VOCAB, tiny_model

PAGE = 16
#: Longer than the unpacked tail of a method that keeps no further tokens: a page and a step of 64.
WINDOW = 96
_WORKLOAD, _TARGET = Workload(), resolve_target("h100")
_SIZE = {"head_dim": 64, "hidden_size": 128, "max_position_embeddings": 512}


class PackedModel:
    """A stock model and the programs that passes make of it, wherever they are legal.

    Attributes:
        model: the stock model.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._graph, _ = capture_step(model)
        self._graph.samples = StoreSamples(self._lowered, _text, lambda: torch.arange(VOCAB) % 7 == 0)

    def rewrite(self, passes: Sequence[str]) -> tuple[Graph, list[SiteRecord]]:
        """The graph after the passes, and what each of them did at each site."""
        graph = self._graph.copy()
        records = []
        for text in passes:
            records += parse_pass(text)(graph, _WORKLOAD, _TARGET, force=True)
        return graph, records

    def program(self, passes: Sequence[str], compiled: bool = False) -> OptimizedModel:
        """What :meth:`rewrite` gives as a program."""
        return self.run(self.rewrite(passes)[0], compiled)

    def run(self, graph: Graph, compiled: bool = False) -> OptimizedModel:
        """A graph as a program, op by op or compiled."""
        own = self.model
        program = self._lowered(graph, compiled)
        return OptimizedModel(program, config=own.config, generation_config=own.generation_config)

    def _lowered(self, graph: Graph, compiled: bool = False) -> Program:
        step = lower(graph, self.model.device, LoweringOptions(compile=compiled))
        return make_program(self.model, graph, step)


def windowed_model(seed: int = 0) -> Any:
    """A layer with a sliding window and one without, grouped heads, in float32."""
    kinds = ["sliding_attention", "full_attention"]
    return tiny_model("gemma3_text", seed=seed, sliding_window=WINDOW, layer_types=kinds, **_SIZE)


def full_model(seed: int = 0) -> Any:
    """Multi-head attention over everything: the layer input is the minimum cut, and keys give values."""
    return tiny_model("llama", seed=seed, num_attention_heads=2, **_SIZE)


def passes_of(method: Method, bits: int) -> list[str]:
    """The passes that store a cache as the method's paper does, in small pages."""
    cut = {"minimum": "minimum", "pre_rotary": "pre_rotary", "keys": "pre_rotary"}.get(method.place, "kv")
    found = [f"place_cache{{cut={cut}}}"]
    found += ["rebuild_values"] * (method.place == "keys")
    found += ["predict_cache{map=linear}"] * method.predict
    return [*found, f"quantize_cache{{codec={method.name},bits={bits},page={PAGE}}}"]


def drafting() -> Speculation:
    """Drafts from the text so far, up to a page long."""
    return make_speculation({"drafter": "ngram", "tokens": PAGE, "tree": "chain", "rule": "fixed"})


def repetitive_prompts(lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded prompts that repeat themselves, so that drafts are accepted and refused, and their mask."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.zeros((len(lengths), max(lengths)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        pattern = torch.randint(3, VOCAB, (7,), generator=generator)
        ids[row, -length:] = pattern.repeat(length // 7 + 1)[:length]
        mask[row, -length:] = 1
    return ids, mask


def random_text(rows: int, tokens: int, seed: int = 2) -> torch.Tensor:
    """Token ids ``[rows, tokens]``."""
    return torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def _text() -> list[list[int]]:
    return random_text(4, 128, seed=3).tolist()
