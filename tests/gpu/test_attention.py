"""The attention template on the chip: every shipped specialization against the reference, bits in company."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from graphwright.ir.codecs import PageShape, parse_codec
from graphwright.kernels.triton import attention
from graphwright.kernels.triton.attention import Attention, Pages, Side, Step
from graphwright.kernels.triton.configs import AttendConfig, AttendShape
from graphwright.kernels.triton.shipped import CODECS
from tests.gpu.support import (
    DEVICE,
    DTYPES,
    SINGLE,
    TOLERANCE,
    USUAL,
    assert_near,
    kernel,
    moved,
    reference,
    same_bits,
    wide,
)
from tests.numerics import inputs
from tests.numerics.packed_inputs import Packing, packed_step

pytestmark = pytest.mark.gpu

INT4, TURNED = CODECS["int4"], CODECS["combined4"]


@pytest.fixture(autouse=True)
def _several_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short chunks, so that few tokens are split; everything else is as it is."""
    own = attention.attend_config

    def short(shape: AttendShape) -> AttendConfig:
        found = own(shape)
        block = min(found.block_n, 64)
        return AttendConfig(found.block_m, block, max(128, shape.page), found.num_warps, found.num_stages)

    monkeypatch.setattr(attention, "attend_config", short)


def run(op_name: str, arguments: dict[str, Any]) -> torch.Tensor:
    there = moved(arguments)
    return kernel(op_name, there)(**there)


def check(op_name: str, arguments: dict[str, Any]) -> None:
    """The kernel gives what the reference gives; NaN marks what no query may see."""
    dtype = arguments["q"].dtype
    kept = {n: x if n.endswith("constants") else _readable(x) for n, x in copy.deepcopy(arguments).items()}
    assert_near(run(op_name, arguments), reference(op_name, kept), dtype)


def _readable(value: Any) -> Any:
    """Wide, but for the buffers of a packed store."""
    return wide(value[:3]) + value[3:] if isinstance(value, list) else wide(value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", list(inputs.STEPS))
def test_every_step_over_slots(case: str, dtype: torch.dtype, poisoned: None) -> None:
    check("cache_attention", inputs.after_append(inputs.step(dtype, **inputs.STEPS[case])))


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize(
    ("width", "group"), [(128, 1), (128, 4), (128, 8), (64, 4), (80, 4), (96, 4), (256, 4)]
)
def test_one_token_over_slots_and_a_few(width: int, group: int, tokens: int, poisoned: None) -> None:
    """The heads of the shipped set."""
    step = inputs.step(USUAL, tokens=tokens, lengths=[200, 31], heads=(2 * group, 2), dims=(width, width))
    check("cache_attention", inputs.after_append(step))


@pytest.mark.parametrize("case", ["smollm2", "ring", "padding-row"])
def test_append_and_attend(case: str) -> None:
    step = inputs.step(USUAL, **inputs.STEPS[case])
    there = moved(step)
    assert_near(kernel("append_attention", there)(**there), reference("append_attention", wide(step)), USUAL)
    other = inputs.after_append(step)
    for store in ("keys", "values"):
        assert same_bits(there[store], other[store])


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(CODECS))
def test_every_codec(name: str, dtype: torch.dtype, tokens: int, poisoned: None) -> None:
    keys, values = (Packing(codec, page=64, first=4, lag=5) for codec in CODECS[name])
    step = dict(tokens=tokens, lengths=[403, 70], heads=(8, 2), dims=(128, 128))
    check("packed_attention", packed_step(dtype, keys, values, **step))


@pytest.mark.parametrize("codecs", [INT4, TURNED], ids=["int4", "turned"])
@pytest.mark.parametrize("options", [
    dict(tokens=1, lengths=[260], heads=(9, 3)),
    dict(tokens=21, lengths=[75, 140], heads=(4, 1), counts=[21, 2]),
    dict(tokens=3, lengths=[0, 5, 31, 36]),
    dict(tokens=4, lengths=[100, 130], counts=[4, 0], sinks=True),
    dict(tokens=7, lengths=[125, 0], tree=True),
    dict(tokens=63, lengths=[70], tree=True, heads=(4, 2)),
    dict(tokens=6, lengths=[500, 37], slots=106, window=100),
    dict(tokens=2, lengths=[190], softcap=3.0, dims=(64, 128)),
    dict(tokens=1, lengths=[150], heads=(16, 2), dims=(64, 64)),
], ids=str)  # fmt: skip
def test_every_option(codecs: tuple[str, str], options: dict[str, Any], poisoned: None) -> None:
    keys, values = (Packing(codec, page=32, first=4, lag=3) for codec in codecs)
    check("packed_attention", packed_step(USUAL, keys, values, **options))


@pytest.mark.parametrize("page", [16, 48, 128])
def test_pages_of_every_size(page: int) -> None:
    store = Packing(INT4[0], page=page)
    check("packed_attention", packed_step(USUAL, store, store, tokens=2, lengths=[300, 130]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("by_head", [False, True])
def test_only_listed_pages_are_read(by_head: bool, dtype: torch.dtype, poisoned: None) -> None:
    batch, groups, group, width, page, places = 2, 2, 3, 64, 32, 7
    number = torch.float32 if dtype == SINGLE else torch.bfloat16  # what `float` keeps
    lengths = torch.tensor([places * page, 3 * page])
    q = torch.randn(batch, groups * group, 1, width).to(dtype)
    keys, values = torch.randn(2, batch, groups, places * page + 40, width).to(number)
    chosen = torch.tensor([[[1, 4, 5], [0, 6, 2]], [[2, 0, 1], [1, 2, 0]]], dtype=torch.int32)
    counts = torch.tensor([[3, 2], [1, 3]], dtype=torch.int32)
    visible = torch.zeros(batch, groups, keys.shape[2], dtype=torch.bool)
    for b in range(batch):
        visible[b, :, lengths[b]] = True
        for g in range(groups):
            for place in chosen[b, g, : counts[b, g]].tolist():
                visible[b, g, place * page : (place + 1) * page] = True
    scores = torch.einsum("bghd,bgsd->bghs", q.double().view(batch, groups, group, width), keys.double())
    scores = (scores * 0.1).masked_fill(~visible[:, :, None], float("-inf"))
    expected = torch.einsum("bghs,bgsd->bghd", scores.softmax(-1), values.double())
    sides = []
    for store in (keys, values):
        pages = store[:, :, : places * page].unflatten(2, (-1, page))
        pages = (pages if by_head else pages.transpose(1, 2)).contiguous().to(DEVICE)
        tail = store.to(dtype).to(DEVICE)
        codec = f"float(bits={number.itemsize * 8})"
        assert parse_codec(codec).layout(PageShape(groups, page, width))["0.values"][1] == number
        sides.append(Side.of([lengths.to(DEVICE), tail, tail, pages], [], codec, page))
    there = moved([q, keys.to(dtype), values.to(dtype), lengths, chosen, counts])
    q, keys, values, lengths, chosen, counts = there
    first = (q.new_empty(batch, groups, 0, width),) * 2
    step = Step(lengths[:, None], lengths, torch.ones_like(lengths), lengths[:, None][:, :0], 0.1)
    made = Pages(sides[0], sides[1], lengths, first, page, (chosen, counts), by_head)
    attended = Attention(q, keys, values, step, made, with_lse=True)
    assert_near(attended.run(), expected.reshape(batch, 1, -1, width), dtype)
    assert attended.lse is not None
    lse = attended.lse.cpu().double().view(batch, groups, group)
    torch.testing.assert_close(lse, scores.logsumexp(-1), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


# --- bits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [None, "int4", "int2", "combined3", "float16"])
@pytest.mark.parametrize("group", [4, 8])
def test_a_token_alone_and_in_a_step(name: str | None, dtype: torch.dtype, group: int) -> None:
    """The same bits: the verification of a draft computes what single steps would, across tiles of rows."""
    options = dict(tokens=24, lengths=[411], heads=(2 * group, 2), dims=(128, 128))
    if name is None:
        op_name, whole = "cache_attention", inputs.after_append(inputs.step(dtype, **options, slots=600))
    else:
        keys, values = (Packing(codec, page=64, lag=64) for codec in CODECS[name])
        op_name, whole = "packed_attention", packed_step(dtype, keys, values, **options)
    among = run(op_name, whole)
    for width in (1, 2, 8):
        for start in (0, 3, 16):
            some = dict(whole)
            some["q"] = whole["q"][:, :, start : start + width]
            some["positions"] = whole["positions"][:, start : start + width]
            some["lengths"] = whole["lengths"] + start
            some["counts"] = torch.full_like(whole["counts"], width)
            assert same_bits(run(op_name, some), among[:, start : start + width]), (width, start)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_alone_and_in_a_batch(dtype: torch.dtype) -> None:
    """With the same cut of the cache, which this file fixes."""
    step = inputs.after_append(inputs.step(dtype, tokens=2, lengths=[300, 7, 120], heads=(6, 2), slots=320))
    among = run("cache_attention", step)
    rows = ("q", "keys", "values", "positions", "lengths", "counts", "tree")
    for row in range(3):
        alone = {name: x[row : row + 1] if name in rows else x for name, x in step.items()}
        assert same_bits(run("cache_attention", alone)[0], among[row])
