"""Storage x selection x eviction x shared prefixes x prefill masks: every combination runs, or is refused.

A pass that cannot follow another says so at every site, before anything runs; what remains is a program whose
tokens do not change with drafts, and whose rows do not depend on each other.
"""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from graphwright.passes.base import SiteRecord
from graphwright.runtime.model import OptimizedModel
from graphwright.runtime.speculation import Speculation
from tests.e2e.packed_programs import PackedModel, drafting, repetitive_prompts, windowed_model

LENGTHS = (150, 90)
OPTIONS = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
# In the order in which they follow one another.
PASSES = {
    "packed": "quantize_cache{codec=int,bits=8,page=16,recent=8}",
    "evicted": "evict_tokens{tokens=64,window=8}",
    "selected": "sparsify_attention{keep=0.25,refresh=5}",
    "shared": "share_prefix",
    "masked": "sparsify_prefill{mask=a_shape(block=16,sinks=64,recent=64)}",
}
CHOICES = [names for count in range(2, len(PASSES) + 1) for names in combinations(PASSES, count)]


@pytest.fixture(scope="module")
def tiny() -> PackedModel:
    return PackedModel(windowed_model())


def generated(fast: OptimizedModel, speculation: Speculation | None) -> torch.Tensor:
    """New tokens of ragged prompts that begin alike."""
    ids, mask = repetitive_prompts(LENGTHS)
    ids[:, -90:-60] = ids[0, -90:-60]
    fast.speculation = speculation
    return fast.generate(ids, attention_mask=mask, **OPTIONS)[:, ids.shape[1] :]


@pytest.mark.parametrize("names", CHOICES, ids="-".join)
def test_a_combination_runs_or_says_why_not(names: tuple[str, ...], tiny: PackedModel) -> None:
    graph, records = tiny.rewrite(["place_cache{cut=kv}", *(PASSES[name] for name in names)])
    for name in names:
        check_records(name, records)
    fast = tiny.run(graph)
    plain = generated(fast, None)
    assert torch.equal(generated(fast, drafting()), plain)
    assert fast.stats()["last"]["accepted"] > 0


def check_records(name: str, records: list[SiteRecord]) -> None:
    """Of the layer without a window: applied, or refused with a reason."""
    own = [r for r in records if r.pass_string.split("{")[0] == PASSES[name].split("{")[0]]
    whole = [r for r in own if "layers.1" in r.site or r.site == "program"]
    assert whole
    assert all(r.status == "applied" or (r.status == "illegal" and len(r.reason) > 20) for r in whole)
