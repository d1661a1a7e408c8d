"""Masks of prompts: which blocks they keep, and attention under them, against a softmax written out here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphwright.ir.errors import MaskError
from graphwright.ir.ops import SEMANTIC_OPS
from graphwright.ir.prefill_masks import LongStep, parse_mask, registered_masks, visible_blocks
from graphwright.ir.prefill_ops import token_visibility
from graphwright.kernels.masked_attention import LongAttention
from tests.numerics.prefill_inputs import LONG_STEPS, MASKS, long_step

# float32: sums of 300 products in another order; bfloat16: one rounding of results up to 2.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-7}


def visibility(given: dict[str, Any]) -> torch.Tensor:
    """``[B, H, T, S]``: what each query sees, as the op has it."""
    return token_visibility(
        given["mask"], given["q"], given["keys"], given["lengths"], given["counts"], given["scale"]
    )


def written_out(given: dict[str, Any], visible: torch.Tensor) -> torch.Tensor:
    """Masked softmax in float64, query by query."""
    q, keys, values = (given[name].double() for name in ("q", "keys", "values"))
    batch, heads, tokens, _ = q.shape
    group = heads // keys.shape[1]
    out = torch.zeros(batch, tokens, heads, values.shape[3], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for t in range(int(given["counts"][b])):
                seen = visible[b, h, t].nonzero()[:, 0]
                scores = keys[b, h // group, seen] @ q[b, h, t] * given["scale"]
                if given.get("softcap"):
                    scores = given["softcap"] * torch.tanh(scores / given["softcap"])
                if given["sinks"] is not None:
                    scores = torch.cat([scores, given["sinks"][h : h + 1].double()])
                weights = torch.softmax(scores, 0)[: len(seen)]
                out[b, t, h] = weights @ values[b, h // group, seen]
    return out


def causal(given: dict[str, Any]) -> torch.Tensor:
    """``[B, T, S]``: what each query of a step may see."""
    slot = torch.arange(given["keys"].shape[2])
    valid = torch.arange(given["q"].shape[2]) < given["counts"][:, None]
    return (slot <= given["positions"][..., None]) & valid[..., None]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", LONG_STEPS)
def test_attention_is_a_softmax_over_what_the_mask_shows(name: str, mask: str) -> None:
    for dtype, tolerance in TOLERANCE.items():
        given = long_step(dtype, name, mask)
        expected = written_out(given, visibility(given))
        found = SEMANTIC_OPS["prefill_attention"].overload(**given)
        assert (found - expected).abs().max() < tolerance
        # Block by block; rows of few tokens are left to the kernel of short steps.
        own = LongAttention(False, parse_mask(mask), given["scale"], given.get("softcap", 0.0))
        blocks = own(*(given[n] for n in ("q", "keys", "values", "lengths", "counts", "sinks")))
        long = given["counts"] > 64
        assert (blocks - expected)[long].abs().max() < tolerance
        assert not blocks[torch.arange(blocks.shape[1]) >= given["counts"][:, None]].any()


def test_compiled_attention_is_the_same() -> None:
    """FlexAttention over ragged rows, compiled for this test."""
    given = long_step(torch.float32, "ragged", MASKS[2])
    attention = LongAttention(True, parse_mask(MASKS[2]), given["scale"], 0.0)
    found = attention(*(given[n] for n in ("q", "keys", "values", "lengths", "counts", "sinks")))
    expected = written_out(given, visibility(given))
    assert (found - expected)[:2].abs().max() < 3e-6
    assert not found[2, 20:].any()


@pytest.mark.parametrize("mask", MASKS)
def test_no_query_sees_the_future_and_all_see_their_own(mask: str) -> None:
    for name in LONG_STEPS:
        given = long_step(torch.float32, name, mask)
        visible, may = visibility(given), causal(given)
        assert not (visible & ~may[:, None]).any()
        own = torch.nn.functional.one_hot(given["positions"], given["keys"].shape[2]).bool()
        assert (visible | ~(own & may)[:, None]).all()
        assert visible[:, :, : int(given["counts"].min()), 0].all()  # the first block
        few = given["counts"] <= 64
        assert torch.equal(visible[few], may[few][:, None].expand_as(visible[few]))


def test_a_shape_keeps_its_sinks_and_a_window_of_whole_blocks() -> None:
    given = long_step(torch.float32, "one-row", "a_shape(block=16, sinks=32, recent=48)")
    visible = visibility(given)
    for t in (0, 17, 99):
        position = 160 + t
        # The window of the first query of the block of queries, from the start of its block of tokens.
        start = max(0, (160 + t // 16 * 16 - 47) // 16 * 16)
        expected = [n for n in range(300) if n <= position and (n < 32 or n >= start)]
        assert visible[0, 0, t].nonzero()[:, 0].tolist() == expected
    assert torch.equal(visible[:, 0], visible[:, 1])


def test_vertical_slash_finds_the_column_and_the_diagonal_that_matter() -> None:
    """One head looks at token 70, the other at the token 64 before the query."""
    tokens, length, slots = 80, 176, 256
    wave = torch.tensor([[torch.pi * 2 * f / slots for f in range(1, 9)]])
    at = torch.arange(slots)[:, None] * wave
    keys = torch.cat([at.cos(), at.sin(), torch.zeros(slots, 1)], 1)
    keys[70, -1] = 4.0
    back = (torch.arange(length, length + tokens) - 64)[:, None] * wave
    column = torch.zeros(tokens, 17)
    column[:, -1] = 4.0
    q = torch.stack([column, torch.cat([back.cos(), back.sin(), torch.zeros(tokens, 1)], 1)])[None] * 4
    step = LongStep(q, keys[None, None], torch.tensor([length]), torch.tensor([tokens]), 1.0, 16)
    # Beside the first column and the queries' own diagonal, which are always among them.
    blocks = visible_blocks(parse_mask("vertical_slash(block=16, verticals=32, slashes=32)"), step)[0]
    for i in range(step.query_blocks):
        own = 11 + i
        assert 4 in blocks[0, i].nonzero()[:, 0].tolist()
        assert {0, own - 4, own} <= set(blocks[1, i].nonzero()[:, 0].tolist())
        assert blocks[1, i].sum() <= 4


def test_chunked_takes_the_best_share_of_earlier_chunks() -> None:
    given = long_step(torch.float32, "one-row", "chunked(block=16, chunk=64, keep=0.25)")
    given["keys"][0, 0, 48:64] = given["q"][0, :, :64].mean((0, 1)) * 20  # what its queries look for
    step = LongStep(given["q"], given["keys"], given["lengths"], given["counts"], 0.25, 16)
    blocks = visible_blocks(parse_mask("chunked(block=16, chunk=64, keep=0.25)"), step)[0, 0]
    # Tokens 160..175 are in the third chunk: of the eight blocks before it two stay, and always the first.
    kept = blocks[0].nonzero()[:, 0].tolist()
    assert 3 in kept and 0 in kept
    assert len([n for n in kept if 0 < n < 8]) <= 2
    assert [n for n in kept if n >= 8] == [8, 9, 10]
    whole = parse_mask("chunked(block=16, chunk=64, keep=1.0)")
    assert torch.equal(
        token_visibility(str(whole), *(given[n] for n in ("q", "keys", "lengths", "counts", "scale"))),
        causal(given)[:, None].expand(-1, 2, -1, -1),
    )


@pytest.mark.parametrize("mask", MASKS)
def test_what_others_do_changes_no_choice(mask: str) -> None:
    given = long_step(torch.float32, "ragged", mask)
    visible = visibility(given)
    for row, count in enumerate([90, 70]):
        alone = {n: given[n][row : row + 1] for n in ("keys", "lengths", "counts")}
        q = given["q"][row : row + 1, :, :count]
        own = token_visibility(mask, q, alone["keys"], alone["lengths"], alone["counts"], given["scale"])
        assert torch.equal(own[0], visible[row, :, :count])


@pytest.mark.parametrize("mask", [*MASKS, "a_shape", "vertical_slash", "chunked"])
def test_the_price_knows_how_much_is_kept(mask: str) -> None:
    """The cost model's tokens in the blocks of a step, against those of random queries."""
    rule = parse_mask(mask)
    tokens, length, slots = 256, 1024, 1280
    q, keys = torch.randn(1, 4, tokens, 16), torch.randn(1, 2, slots, 16)
    step = LongStep(q, keys, torch.tensor([length]), torch.tensor([tokens]), 0.25, rule.block)
    kept = visible_blocks(rule, step).float().sum(-1).mean() * rule.block
    seen = float(rule.work(tokens, length, 4, 2, 16).seen)
    assert seen == pytest.approx(float(kept), rel=0.25)
    assert str(parse_mask(str(rule))) == str(rule)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("chunked(keep=0.0)", "keep=0.0 is not a share"),
        ("chunked(keep=1.5)", "keep=1.5 is not a share"),
        ("chunked(chunk=100)", "chunk=100 is not a multiple of the block of 128"),
        ("a_shape(block=48)", "block=48"),
        ("a_shape(recent=0)", "recent=0"),
        ("vertical_slash(slashes=-128)", "slashes=-128"),
        ("a_shpae", "there is no mask named 'a_shpae'"),
        ("chunked(depth=2)", "has no option 'depth'"),
    ],
)
def test_what_makes_no_mask_is_refused(text: str, says: str) -> None:
    with pytest.raises(MaskError, match="what to do") as caught:
        parse_mask(text)
    assert says in str(caught.value)
    assert set(registered_masks()) == {"a_shape", "chunked", "vertical_slash"}
