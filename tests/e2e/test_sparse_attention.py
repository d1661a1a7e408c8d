"""Selected pages compose: with drafts, trees, ragged batches, packed caches, windows and dense passes.

Selectors come from the registry, so that a new one is tested by being there.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from graphwright.cost_model.stores import cache_bytes, default_stores
from graphwright.ir.selectors import registered_selectors
from graphwright.runtime.model import OptimizedModel
from graphwright.runtime.speculation import FixedLength, Speculation
from tests.architectures import VOCAB
from tests.e2e.packed_programs import (
    PAGE,
    PackedModel,
    drafting,
    random_text,
    repetitive_prompts,
    windowed_model,
)
from tests.e2e.test_speculation_exact import Oracle

LENGTHS = (200, 90, 40)
NEW = 32
OPTIONS = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
KV = "place_cache{cut=kv}"
INT8 = f"quantize_cache{{codec=int,bits=8,page={PAGE},first=4,recent=8}}"
STORES = {"plain": (KV,), "packed": (KV, INT8)}


@pytest.fixture(scope="module")
def tiny() -> PackedModel:
    return PackedModel(windowed_model())


def tokens(
    fast: OptimizedModel, speculation: Speculation | None, rows: Sequence[int] = (0, 1, 2)
) -> torch.Tensor:
    """New tokens ``[B, NEW]`` of ragged prompts."""
    ids, mask = repetitive_prompts(LENGTHS)
    fast.speculation = speculation
    out = fast.generate(ids[list(rows)], attention_mask=mask[list(rows)], **OPTIONS)
    return out[:, ids.shape[1] :]


@pytest.mark.parametrize("stores", STORES)
@pytest.mark.parametrize("selector", sorted(registered_selectors()))
def test_a_selector_composes(selector: str, stores: str, tiny: PackedModel) -> None:
    """Drafts change no token, nor do the other rows; a layer with a window is left alone."""
    graph, records = tiny.rewrite([*STORES[stores], f"sparsify_attention{{selector={selector},keep=0.25}}"])
    window, whole = (r for r in records if r.pass_string.startswith("sparsify_attention"))
    assert (window.status, whole.status) == ("illegal", "applied")
    assert "window of" in window.reason and "left alone" in window.reason
    fast = tiny.run(graph)
    plain = tokens(fast, None)
    assert torch.equal(tokens(fast, drafting()), plain)
    drafts = fast.stats()["last"]
    assert 0 < drafts["accepted"] < drafts["draft_tokens"]
    assert torch.equal(tokens(fast, drafting(), rows=[1])[0], plain[1])


@pytest.mark.parametrize("stores", STORES)
@pytest.mark.parametrize("every", [0, 6])
def test_trees_and_dense_passes_change_no_token(every: int, stores: str, tiny: PackedModel) -> None:
    fast = tiny.program([*STORES[stores], f"sparsify_attention{{keep=0.25,refresh={every}}}"])
    plain = tokens(fast, None)
    oracle = Oracle(plain.tolist(), wrong=5, width=2, vocab=VOCAB)
    assert torch.equal(tokens(fast, Speculation(oracle, FixedLength(12))), plain)
    assert fast.stats()["last"]["accepted"] > NEW // 2


def test_everything_is_read_where_everything_may_be(tiny: PackedModel) -> None:
    text = random_text(2, 230)
    exact = tiny.program([KV]).score(text)
    torch.testing.assert_close(tiny.program([KV, "sparsify_attention{keep=1.0}"]).score(text), exact)


def test_dense_passes_rectify(tiny: PackedModel) -> None:
    """The token of a dense pass has the dense program's logits; those in between drift."""
    errors = {}
    for every in (0, 1, 4):
        fast = tiny.program([KV, f"sparsify_attention{{keep=0.02,refresh={every}}}"])
        options = {**OPTIONS, "output_logits": True, "return_dict_in_generate": True}
        out = fast.generate(random_text(1, 200), **options)
        exact = tiny.program([KV]).score(out.sequences)[0, 199:-1]
        errors[every] = (torch.cat(out.logits) - exact).abs().amax(-1)
    assert errors[0][1:].min() > 1e-3
    assert errors[1].max() < 1e-5
    # Logits of generated token n + 1 come from the step of token n; the fourth, eighth, ... run densely.
    assert errors[4][4::4].max() < 1e-5 < 1e-3 < errors[4][5::4].min()


def test_a_share_of_the_attention_reads_less(tiny: PackedModel) -> None:
    """Fewer pages than `keep` allows, and the logits move away from dense ones."""
    text = random_text(1, 230)
    exact = tiny.program([KV]).score(text)
    errors = []
    for options in ("keep=0.9", "keep=0.9,share=0.5", "keep=0.05"):
        out = tiny.program([KV, f"sparsify_attention{{{options}}}"]).score(text)
        errors.append(float((out - exact).pow(2).mean()))
    assert 0 < errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("stores", STORES)
def test_summaries_take_the_memory_that_was_predicted(stores: str, tiny: PackedModel) -> None:
    passes = [*STORES[stores], "sparsify_attention{selector=bounds}"]
    graph, _ = tiny.rewrite(passes)
    program = tiny.run(graph).program
    state = program.allocate(3, 250)
    assert state.nbytes() == cache_bytes(default_stores(graph), 3, 250)
    summaries = program.cache_parts()["summaries"]
    first = 4 if stores == "packed" else 0
    assert summaries == 3 * -(-(250 - first) // PAGE) * 2 * 64 * 2 * 4  # 2 heads of 64, two extremes, float32


def test_a_row_that_is_cut_selects_as_one_that_never_was_longer(tiny: PackedModel) -> None:
    """Summaries of pages that are cut are written again when the row grows other tokens."""
    program = tiny.program([KV, "sparsify_attention{keep=0.2,recent=16}"]).program
    text, other = random_text(1, 160), random_text(1, 160, seed=5)
    mixed = torch.cat((text[:, :70], other[:, 70:]), dim=1)
    results = []
    for runs in ((text, mixed), (mixed,)):
        state = program.allocate(1, 200)
        for run in runs:
            if int(state.lengths[0]):
                state.truncate(torch.tensor([70]))
            start = int(state.lengths[0])
            for at in range(start, 160, 10):
                logits = program.step(state, run[:, at : at + 10].contiguous(), torch.tensor([10]))
                state.commit(torch.tensor([10]))
        results.append(logits)
    assert torch.equal(*results)
