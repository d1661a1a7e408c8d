"""What calibrated selectors are given: keys and queries of a text, site by site, and ends of sentences."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphwright.ir.graph import Graph
from graphwright.ir.selectors import parse_selector
from graphwright.ir.selectors.selector import Samples
from graphwright.optimizer.quality.samples import StoreSamples
from graphwright.passes.base import parse_pass
from graphwright.passes.selector_samples import selector_samples
from tests.architectures import VOCAB
from tests.rewrite.cached_programs import TARGET, WORKLOAD, program, rewrite

KV, PACK = "place_cache{cut=kv}", "quantize_cache{codec=int,bits=8,page=16}"
TEXT = torch.randint(3, VOCAB, (3, 80), generator=torch.Generator().manual_seed(3))
ENDS = torch.arange(VOCAB) % 7 == 0
CHANNELS = parse_selector("channels(count=4)")


class Sampled:
    """A graph with text to calibrate on.

    Attributes:
        runs: how many programs the text ran through.
        asked: how often the tokenizer was asked for.
    """

    def __init__(self, found: Any, *passes: str) -> None:
        self.runs = self.asked = 0
        self.model = found.model
        self.graph, _ = rewrite(found, *passes)
        self.graph.samples = StoreSamples(self._program, TEXT.tolist, self._ends)

    def _program(self, graph: Graph) -> Any:
        self.runs += 1
        return program(self.model, graph)

    def _ends(self) -> torch.Tensor:
        self.asked += 1
        return ENDS

    def of_every_site(self, text: str = "channels(count=4)") -> list[Samples]:
        """What a selector is given, site by site."""
        given = selector_samples(self.graph, parse_selector(text))
        return [given(attention) for attention in self.graph.calls("cache_attention")]


def projected(found: Any, what: str) -> list[torch.Tensor]:
    """The stock model's queries or keys before their positions, ``[H, rows * tokens, D]`` by layer."""
    seen: list[torch.Tensor] = []
    hooks = [
        getattr(layer.self_attn, what).register_forward_hook(lambda _m, _i, out: seen.append(out))
        for layer in found.model.model.layers
    ]
    with torch.no_grad():
        found.model(TEXT)
    for hook in hooks:
        hook.remove()
    return [out.unflatten(-1, (-1, 16)).flatten(0, 1).transpose(0, 1) for out in seen]


@pytest.mark.parametrize("passes", [(KV,), (KV, PACK)])
def test_keys_and_queries_are_those_of_the_text(captured, passes: tuple[str, ...]) -> None:
    """Rotation leaves lengths as they are, and the first token of a row altogether."""
    found = captured("llama")
    sampled = Sampled(found, *passes)
    close = {"atol": 1e-4 if passes == (KV,) else 0.05, "rtol": 0.01}
    for layer, samples in enumerate(sampled.of_every_site()):
        for held, what in ((samples.queries, "q_proj"), (samples.keys, "k_proj")):
            wanted = projected(found, what)[layer]
            assert held is not None and held.shape == wanted.shape and held.dtype == torch.float32
            assert torch.allclose(held.norm(dim=-1), wanted.norm(dim=-1), **close)
            firsts = slice(None, None, TEXT.shape[1])
            assert torch.allclose(held[:, firsts], wanted[:, firsts], **close)
        assert samples.ends is None
    assert sampled.runs == 1, "one run is enough for all sites"
    before = sampled.of_every_site()
    assert sampled.runs == 1 and torch.equal(before[0].keys, sampled.of_every_site()[0].keys)


def test_nothing_runs_for_selectors_that_need_nothing_or_only_ends(captured) -> None:
    sampled = Sampled(captured("llama"), KV)
    assert sampled.of_every_site("bounds") == [Samples()] * 2
    assert sampled.runs == sampled.asked == 0
    ends = sampled.of_every_site("sentences")
    assert all(samples.ends is ENDS and samples.keys is None for samples in ends)
    assert sampled.runs == 0 and sampled.asked == 1


def test_a_site_is_read_as_it_was_found(captured) -> None:
    """Other sites may have been rewritten in between, and the graph itself shows nothing of the run."""
    sampled = Sampled(captured("llama"), KV)
    graph = sampled.graph
    second = graph.calls("cache_attention")[1]
    given = selector_samples(graph, CHANNELS)
    parse_pass("quantize_cache{codec=int,bits=8,page=16,layers=0}")(graph, WORKLOAD, TARGET, force=True)
    late, wanted = given(second), Sampled(captured("llama"), KV).of_every_site()[1]
    assert torch.equal(late.keys, wanted.keys) and torch.equal(late.queries, wanted.queries)
    assert not [n for n in graph.placeholders("state") if "queries" in n.meta["name"]]


def test_without_text_samples_are_empty(captured) -> None:
    graph, _ = rewrite(captured("llama"), KV)
    assert selector_samples(graph, CHANNELS)(graph.calls("cache_attention")[0]) == Samples()


def test_keys_that_are_computed_from_what_is_stored_are_not_known(captured) -> None:
    samples = Sampled(captured("llama"), "place_cache{cut=pre_rotary}").of_every_site()[0]
    assert samples.keys is None and samples.queries is not None
