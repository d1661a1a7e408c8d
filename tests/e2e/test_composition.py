"""Every way to pack a cache composes: with drafts, ragged batches, sliding windows and compiled layers.

The methods come from the registry, so that a new one is tested by being there.
"""

from __future__ import annotations

import pytest
import torch

from graphwright.ir.codecs.methods import Method, methods
from graphwright.ir.packed_ops import tail_slots
from graphwright.passes.base import SiteRecord
from graphwright.runtime.model import OptimizedModel
from graphwright.runtime.packed_storage import PackedLayout
from graphwright.runtime.storage import MAX_STEP_TOKENS
from tests.e2e.packed_programs import (
    PAGE,
    WINDOW,
    PackedModel,
    drafting,
    full_model,
    passes_of,
    random_text,
    repetitive_prompts,
    windowed_model,
)

# The first row is longer than the pages of a sliding window's ring. None has 64 tokens or fewer: linears over
# so few rows are another kernel's, and their last bits decide which code a value gets.
LENGTHS = (200, 90, 70)
# Prompts that are run in one step of at most 64 rows: without AMX, linears over more go to the library.
FEW_ROWS = (32, 25)
OPTIONS = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
# Of logits, relative to their variance: with one or two bits of each number, and with a method's most bits.
COARSE, FINE = 0.5, 0.03
# Bits hardly count where what is stored is a projection, whose error is the same with any.
SLACK = 1.02
CHAINS = {
    "sinks and newest tokens": "codec=hadamard >> token_scale >> uniform(bits=4),first=4,recent=10,page=8",
    "a corrector, one store": "codec=token_range >> uniform(bits=3) >> low_rank(rank=2),only=keys,page=16",
    "two codecs": "codec=channel_range >> uniform(bits=4),values=prune(keep=0.5) >> fp8(format=e5m2),page=8",
    "one layer": "codec=outliers(fraction=0.05) >> token_norm >> lloyd_max(bits=3),layers=0,page=16",
}
# By what compiling does with them: a kernel of its own, the reference, a streamed region, predictions.
COMPILED = {"int": "windowed", "octopus": "full", "rotatekv": "full", "xquant_cl": "full"}

# Two that a kernel serves, whose sums are the same for any number of tokens in a step, and two that
# only the reference serves, which adds up in float64.
BFLOAT16 = {"int": "cpp", "turboquant": "cpp", "oscar": "reference", "gear": "reference"}


@pytest.fixture(scope="module")
def windowed() -> PackedModel:
    return PackedModel(windowed_model())


@pytest.fixture(scope="module")
def full() -> PackedModel:
    return PackedModel(full_model())


@pytest.fixture(scope="module")
def exact(windowed: PackedModel) -> torch.Tensor:
    """Logits of the windowed model with a cache that loses nothing."""
    return windowed.program(["place_cache{cut=kv}"]).score(random_text(2, 230))


@pytest.mark.parametrize("name", methods())
def test_a_method_composes(name: str, windowed: PackedModel, exact: torch.Tensor) -> None:
    """With its fewest and its most bits, on layers with and without a window; more bits lose less."""
    method = methods()[name]
    errors = []
    for bits in sorted({min(method.bits), max(method.bits)}):
        graph, records = windowed.rewrite(passes_of(method, bits))
        check_window_record(method, records)
        fast = windowed.run(graph)
        check_tokens(fast)
        errors.append(error_of(fast, exact))
    assert errors[0] < COARSE
    assert errors[-1] < min(FINE, SLACK * errors[0])


@pytest.mark.parametrize("name", methods())
def test_a_method_is_stored_as_in_its_paper(name: str, full: PackedModel) -> None:
    """Every pass of a method applies where the model allows it, and composes there."""
    method = methods()[name]
    graph, records = full.rewrite(passes_of(method, min(method.bits)))
    assert [(r.pass_string, r.site, r.reason) for r in records if r.status != "applied"] == []
    fast = full.run(graph)
    stored = {layout.name.rsplit("self_attn.", 1)[1] for layout in layouts(fast)}
    kinds = {name.removesuffix(".residual").rstrip("_0123456789") for name in stored}
    assert (
        kinds
        == {
            "kv": {"keys", "values"},
            "minimum": {"rms_norm"},
            "pre_rotary": {"pre_rotary_keys", "values"},
            "keys": {"pre_rotary_keys"},
        }[method.place]
    )
    assert any(name.endswith(".residual") for name in stored) == method.predict
    if method.place != "kv":  # keys and values of a layer without a window were run above
        check_tokens(fast)


@pytest.mark.parametrize("options", CHAINS.values(), ids=CHAINS)
def test_a_chain_composes(options: str, windowed: PackedModel, exact: torch.Tensor) -> None:
    """Codecs that no method has, with other pages, and some stores left as they are."""
    graph, records = windowed.rewrite(["place_cache{cut=kv}", f"quantize_cache{{{options}}}"])
    assert {r.status for r in records} == {"applied"}
    fast = windowed.run(graph)
    check_tokens(fast)
    assert error_of(fast, exact) < COARSE


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_gives_the_same_tokens(name: str, windowed: PackedModel, full: PackedModel) -> None:
    """As op by op, in a ragged batch and with drafts."""
    method, own = methods()[name], {"windowed": windowed, "full": full}[COMPILED[name]]
    graph, _ = own.rewrite(passes_of(method, min(method.bits)))
    compiled = own.run(graph, compiled=True)
    assert torch.equal(check_tokens(compiled), check_tokens(own.run(graph)))


@pytest.mark.parametrize("name", BFLOAT16)
def test_bfloat16_tokens_do_not_depend_on_the_step(name: str) -> None:
    """Where sums are rounded to 8 bits, drafts and other rows still change nothing."""
    own, method = PackedModel(windowed_model().to(torch.bfloat16)), methods()[name]
    fast = own.run(own.rewrite(passes_of(method, min(method.bits)))[0])
    assert {use.provider for use in fast.program.lowered.kernels if use.op == "packed_attention"} == {
        BFLOAT16[name]
    }
    check_tokens(fast, FEW_ROWS, new=90)


# --- what must hold ------------------------------------------------------------------------------


def check_tokens(
    fast: OptimizedModel, lengths: tuple[int, ...] = LENGTHS, new: int = OPTIONS["max_new_tokens"]
) -> torch.Tensor:
    """Drafts change no token, nor do the other rows of a batch; returns the new tokens ``[B, new]``."""
    options = {**OPTIONS, "max_new_tokens": new}
    ids, mask = repetitive_prompts(lengths)
    fast.speculation = None
    plain = fast.generate(ids, attention_mask=mask, **options)
    assert packs_something(fast, max(lengths) + new - 1)
    fast.speculation = drafting()
    assert torch.equal(fast.generate(ids, attention_mask=mask, **options), plain)
    drafts = fast.stats()["last"]
    assert 0 < drafts["accepted"] < drafts["draft_tokens"]
    for row in (0, len(lengths) - 1):
        alone = fast.generate(ids[row : row + 1], attention_mask=mask[row : row + 1], **options)
        assert torch.equal(alone[0], plain[row])
    return plain[:, max(lengths) :]


def check_window_record(method: Method, records: list[SiteRecord]) -> None:
    """The layer with a window is packed, unless the window is no longer than the tail: then it says so."""
    window, whole = (r for r in records if r.pass_string.startswith("quantize_cache"))
    tail = tail_slots(PAGE, method.first, method.recent, MAX_STEP_TOKENS)
    assert whole.status == "applied"
    assert window.status == ("applied" if tail < WINDOW else "illegal")
    if window.status == "illegal":
        assert f"window of {WINDOW} tokens is no longer than the unpacked tail of {tail}" in window.reason


def error_of(fast: OptimizedModel, exact: torch.Tensor) -> float:
    """Mean squared error of logits over their variance, every token read from the cache."""
    logits = fast.score(random_text(2, 230))
    assert bool(logits.isfinite().all())
    return float((logits - exact).square().mean() / exact.var())


def layouts(fast: OptimizedModel) -> tuple[PackedLayout, ...]:
    return fast.program.lowered.packed


def packs_something(fast: OptimizedModel, length: int) -> bool:
    """Whether a row that has run so many tokens fills pages of every packed store."""
    return bool(layouts(fast)) and all(layout.packable(length) > 0 for layout in layouts(fast))
