"""The attention template in Triton's interpreter against the ops' reference bodies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from graphwright.ir.ops import SEMANTIC_OPS, cache_visibility
from graphwright.kernels import registry
from graphwright.kernels.triton import attention
from graphwright.kernels.triton.attention import Attention, Step
from graphwright.kernels.triton.configs import AttendConfig, AttendShape
from tests.numerics import inputs
from tests.numerics.packed_inputs import Packing, packed_step

# Relative error (norms). float32: sums in another order. float16: queries, probabilities and levels are
# rounded to 11 bits (2^-11) where they meet codes, and the result once more.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3}
DTYPES = tuple(TOLERANCE)
SCALINGS = ("token_scale", "token_range", "channel_scale", "channel_range")
CODECS = (
    *(f"{scaling} >> uniform(bits={bits})" for scaling in SCALINGS for bits in (2, 3, 4, 8)),
    *(f"token_range >> uniform(bits={bits})" for bits in (1, 5, 6, 7)),
    *(f"token_norm >> lloyd_max(bits={bits})" for bits in (1, 2, 3, 4, 8)),
    "token_scale(group=32) >> uniform(bits=4)",
    "token_range(group=16) >> uniform(bits=8)",
    "hadamard >> token_norm >> lloyd_max(bits=3)",
    "random_rotation(seed=3) >> token_norm >> lloyd_max(bits=4)",
    "reorder >> token_scale(group=32) >> uniform(bits=4)",
    "reorder >> random_rotation >> channel_range >> uniform(bits=8)",
    "float(bits=16)",
    "hadamard >> float(bits=16)",
    "fp8",
    "fp8(format=e5m2)",
    "token_scale >> fp8(top=1)",
)
WIDTHS = (64, 128, 96, 64, 256)  # one codec after the other gets the next
PLAIN, TURNED = "token_range >> uniform(bits=4)", "random_rotation >> token_norm >> lloyd_max(bits=3)"


@pytest.fixture(autouse=True)
def _several_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short chunks, so that few tokens are split; everything else is as it would be on a GPU."""
    own = attention.attend_config

    def short(shape: AttendShape) -> AttendConfig:
        found = own(shape)
        block = min(found.block_n, 64)
        return AttendConfig(found.block_m, block, max(128, shape.page), found.num_warps, found.num_stages)

    monkeypatch.setattr(attention, "attend_config", short)


def triton(op_name: str, **arguments: Any) -> torch.Tensor:
    """The kernel's result; fails where another would run."""
    kernel = registry.select(op_name, "cpu", ("triton",), **arguments)
    assert kernel.provider == "triton", kernel.reason
    return kernel.op(**arguments)


def wide(value: Any) -> Any:
    """The same numbers in float32; what no query may see stays poisoned for the kernel only."""
    if isinstance(value, list):
        return [wide(v) for v in value[:3]] + value[3:]
    is_number = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.float().nan_to_num() if is_number else value


def check(op_name: str, arguments: dict[str, Any]) -> torch.Tensor:
    """The kernel gives what the reference gives, everywhere, and writes to nothing but its stores."""
    before, dtype = copy.deepcopy(arguments), arguments["q"].dtype
    mine = triton(op_name, **arguments)
    assert mine.dtype == dtype and mine.is_contiguous() and not mine.isnan().any()
    kept = {name: x if name.endswith("constants") else wide(x) for name, x in before.items()}
    expected = SEMANTIC_OPS[op_name].overload(**kept)
    error = (mine.float() - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error < TOLERANCE[dtype], error
    assert torch.equal(mine == 0, expected.to(dtype) == 0) or bool((expected != 0).all())
    if op_name != "append_attention":
        for a, b in zip(tree_leaves(before), tree_leaves(arguments), strict=True):
            assert not isinstance(a, torch.Tensor) or torch.equal(_bits(a), _bits(b))
    return mine


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8) if x.is_floating_point() and x.numel() else x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [name for name in inputs.STEPS if name != "prefill"])
def test_every_step_over_slots(case: str, dtype: torch.dtype, poisoned: None) -> None:
    step = inputs.step(dtype, **inputs.STEPS[case])
    check("cache_attention", inputs.after_append(step))


@pytest.mark.parametrize("case", ["smollm2", "ring", "padding-row"])
def test_append_and_attend(case: str, poisoned: None) -> None:
    step = inputs.step(torch.float16, **inputs.STEPS[case])
    other = copy.deepcopy(step)
    check("append_attention", step)
    SEMANTIC_OPS["append_attention"].overload(**other)
    for store in ("keys", "values"):
        assert torch.equal(_bits(step[store]), _bits(other[store]))


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec(codec: str, poisoned: None) -> None:
    number = CODECS.index(codec)
    width, group = WIDTHS[number % len(WIDTHS)], (1, 2, 4, 8)[number % 4]
    store = Packing(codec, page=32, first=(0, 4)[number % 2], lag=5)
    step = dict(tokens=3, lengths=[203, 70], heads=(group * 2, 2), dims=(width, width))
    check("packed_attention", packed_step(torch.float16, store, store, **step))
    if number % 3:
        return
    check("packed_attention", packed_step(torch.float32, store, store, **{**step, "dims": (80, 80)}
          if "group=32" not in codec else step))  # fmt: skip


@pytest.mark.parametrize("codecs", [(PLAIN, PLAIN), (TURNED, "channel_range >> uniform(bits=2)")])
@pytest.mark.parametrize("options", [
    dict(tokens=1, lengths=[260], heads=(9, 3)),
    dict(tokens=21, lengths=[75, 140], heads=(4, 1), counts=[21, 2]),
    dict(tokens=3, lengths=[0, 5, 31, 36]),
    dict(tokens=4, lengths=[100, 130], counts=[4, 0], sinks=True),
    dict(tokens=7, lengths=[125, 0], tree=True),
    dict(tokens=63, lengths=[70], tree=True, heads=(4, 2)),
    dict(tokens=6, lengths=[500, 37], slots=106, window=100),
    dict(tokens=2, lengths=[190], softcap=3.0, dims=(64, 128)),
], ids=str)  # fmt: skip
def test_every_option(codecs: tuple[str, str], options: dict[str, Any], poisoned: None) -> None:
    keys, values = (Packing(codec, page=32, first=4, lag=3) for codec in codecs)
    check("packed_attention", packed_step(torch.float16, keys, values, **options))


@pytest.mark.parametrize("page", [16, 48, 64, 128])
def test_pages_of_every_size(page: int) -> None:
    store = Packing(PLAIN, page=page)
    check("packed_attention", packed_step(torch.float16, store, store, tokens=2, lengths=[300, 130]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codecs", [(PLAIN, PLAIN), (TURNED, TURNED)])
def test_a_token_alone_and_in_a_step(codecs: tuple[str, str], dtype: torch.dtype, fair_dots: None) -> None:
    """The same bits: the verification of a draft computes what single steps would."""
    keys, values = (Packing(codec, page=32, lag=8) for codec in codecs)
    whole = packed_step(dtype, keys, values, tokens=8, lengths=[207], heads=(8, 2))
    among = triton("packed_attention", **whole)
    for t in (0, 3, 7):
        alone = copy.deepcopy(whole)
        alone["q"], alone["tree"] = whole["q"][:, :, t : t + 1], whole["tree"]
        alone["positions"] = whole["positions"][:, t : t + 1]
        alone["lengths"], alone["counts"] = whole["lengths"] + t, torch.ones_like(whole["counts"])
        assert torch.equal(triton("packed_attention", **alone)[:, 0], among[:, t]), t


def test_a_row_alone_and_in_a_batch(fair_dots: None) -> None:
    step = inputs.after_append(inputs.step(torch.float32, tokens=2, lengths=[300, 7, 120], heads=(6, 2)))
    among = triton("cache_attention", **step)
    rows = ("q", "keys", "values", "positions", "lengths", "counts", "tree")
    for row in range(3):
        alone = {name: x[row : row + 1] if name in rows else x for name, x in step.items()}
        assert torch.equal(triton("cache_attention", **alone)[0], among[row])


def test_the_log_sum_exp_of_scores(poisoned: None) -> None:
    step = inputs.after_append(inputs.step(torch.float32, tokens=2, lengths=[290, 40], heads=(4, 2)))
    where = (step[name] for name in ("positions", "lengths", "counts", "tree", "scale"))
    run = Attention(step["q"], step["keys"], step["values"], Step(*where), with_lse=True)
    run.run()
    visible = cache_visibility(*(step[name] for name in ("positions", "lengths", "counts", "tree")), 300, 0)
    grouped = step["q"].unflatten(1, (2, 2))
    scores = torch.einsum("bghtd,bgsd->bghts", grouped, step["keys"].nan_to_num()) * step["scale"]
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    torch.testing.assert_close(run.lse, scores.logsumexp(-1).flatten(1, 2), atol=2e-6, rtol=1e-5)


# --- what the kernel does not take -----------------------------------------------------------------


def refused(op_name: str, arguments: dict[str, Any]) -> str:
    kernel = registry.select(op_name, "cpu", ("triton",), **arguments)
    assert kernel.provider == registry.REFERENCE
    return kernel.reason


def test_refusals_say_why() -> None:
    wide_heads = inputs.after_append(inputs.step(torch.float16, tokens=1, lengths=[3], dims=(264, 64)))
    assert "a head of 264 features is above 256" in refused("cache_attention", wide_heads)
    step = inputs.after_append(inputs.step(torch.float16, tokens=2, lengths=[3]))
    tree = {**step, "tree": torch.zeros(1, 64, dtype=torch.int64)}
    assert "a tree of 64 tokens is above the 63" in refused("cache_attention", tree)
    assert "several dtypes" in refused("cache_attention", {**step, "keys": step["keys"].float()})
    assert "not contiguous" in refused("cache_attention", {**step, "keys": step["keys"].transpose(1, 2)})
    double = {**step, **{name: step[name].double() for name in ("q", "keys", "values")}}
    assert "float64 is not" in refused("cache_attention", double)


@pytest.mark.parametrize(("keys", "values", "reason"), [
    (Packing(PLAIN), Packing(PLAIN, page=64), "pages of keys have 32 tokens, those of values 64"),
    (Packing(PLAIN, page=24), Packing(PLAIN, page=24), "not multiples of 16"),
    (Packing(PLAIN, first=2), Packing(PLAIN), "different numbers of first tokens"),
    (Packing(f"{PLAIN} >> sign_sketch"), Packing(PLAIN), "corrector sign_sketch"),
    (Packing(PLAIN), Packing("balance >> token_scale >> uniform(bits=4)"), "not orthogonal maps"),
    (Packing(PLAIN), Packing("token_norm >> octahedral(bits=3)"), "device function for octahedral"),
])  # fmt: skip
def test_stores_that_are_refused(keys: Packing, values: Packing, reason: str) -> None:
    arguments = packed_step(torch.float16, keys, values, tokens=1, lengths=[100], dims=(64, 64))
    assert reason in refused("packed_attention", arguments)
