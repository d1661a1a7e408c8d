"""The Triton linear kernels in the interpreter: float64's numbers, and a row's bits whatever its company."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.ir.errors import InputError
from graphwright.ir.ops import SEMANTIC_OPS
from graphwright.kernels import registry
from graphwright.kernels.triton import configs, launch, skinny
from tests.numerics import inputs

os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

DTYPES = (torch.float32, torch.float16)  # the interpreter gets bfloat16 wrong
# Absolute and relative: results of size 1 to 4 are rounded once to the dtype; sums are float32.
TOLERANCE = {torch.float32: (4e-6, 4e-6), torch.float16: (1e-3, 1e-3)}


def kernel(op_name: str, **arguments: Any) -> Any:
    """The result of the Triton kernel, asked for by name."""
    found = registry.select(op_name, "cpu", ("triton",), **arguments)
    assert found.provider == "triton", found.reason
    return found.op(**arguments)


def doubled(value: Any) -> Any:
    """The same in float64."""
    if isinstance(value, list):
        return [doubled(v) for v in value]
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def check(op_name: str, arguments: dict[str, Any], dtype: torch.dtype) -> None:
    """Results are those of float64, contiguous, in the dtype."""
    found = kernel(op_name, **arguments)
    expected = SEMANTIC_OPS[op_name].overload(**{k: doubled(v) for k, v in arguments.items()})
    absolute, relative = TOLERANCE[dtype]
    pairs = zip(found, expected, strict=True) if isinstance(expected, list) else [(found, expected)]
    for mine, wanted in pairs:
        assert mine.is_contiguous() and mine.dtype == dtype
        torch.testing.assert_close(mine.double(), wanted, atol=absolute, rtol=relative)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op_name", ["linear", "linear_group"])
def test_against_float64(op_name: str, dtype: torch.dtype, poisoned: None) -> None:
    """Odd sizes, 0 to 70 rows, one column, row strides, a strided input, mixed biases; all is written."""
    for _, arguments in inputs.CASES[op_name](dtype):
        if arguments["x"].shape[-1] < 1000:  # the interpreter takes long
            check(op_name, arguments, dtype)


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 70), k=st.integers(1, 150), n=st.integers(1, 70), row_stride=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_any_size(rows: int, k: int, n: int, row_stride: int, dtype: torch.dtype) -> None:
    """What lies beside a weight is NaN and does not show."""
    wide = torch.full((n, k + row_stride), torch.nan, dtype=dtype)
    wide[:, :k] = inputs.randn(n, k, dtype=dtype, scale=k**-0.5)
    x = torch.full((rows, k + 3), torch.nan, dtype=dtype)
    x[:, :k] = inputs.randn(rows, k, dtype=dtype)
    bias = inputs.randn(2 * n, dtype=dtype)[::2]
    check("linear", dict(x=x[:, :k], weight=wide[:, :k], bias=bias), dtype)


SHAPES = [(576, 40), (300, 33), (90, 1), (64, 70)]
SPLIT = {torch.float32: 2304, torch.float16: 4608}  # input features that few output features split


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "n"), [*SHAPES, (SPLIT[torch.float32], 5)])
def test_row_alone_and_among_others(dtype: torch.dtype, k: int, n: int, fair_dots: None) -> None:
    """In float32 too, where the rounding of results hides nothing."""
    x, weight = inputs.randn(66, k, dtype=dtype), inputs.randn(n, k, dtype=dtype, scale=k**-0.5)
    bias = inputs.randn(n, dtype=dtype)
    among = kernel("linear", x=x, weight=weight, bias=bias)
    for i in (0, 7, 16, 65):
        assert torch.equal(kernel("linear", x=x[i : i + 1], weight=weight, bias=bias)[0], among[i]), i
    for rows in (2, 8, 17, 33):
        assert torch.equal(kernel("linear", x=x[:rows], weight=weight, bias=bias), among[:rows]), rows
    steps = kernel("linear", x=x[:64].view(2, 32, k), weight=weight, bias=bias)
    assert torch.equal(steps.view(64, n), among[:64])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_split_sum_is_right_and_written_whole(dtype: torch.dtype, poisoned: None) -> None:
    """Long rows and few columns: two launches, whose sums go through a workspace."""
    k = SPLIT[dtype]
    weights = [inputs.randn(n, k, dtype=dtype, scale=k**-0.5) for n in (20, 3)]
    biases = [None, inputs.randn(3, dtype=dtype)]
    arguments = dict(x=inputs.randn(3, k, dtype=dtype), weights=weights, biases=biases)
    with launch.recording() as launches:
        kernel("linear_group", **arguments)
    assert len(launches) == 2 and launches[0].constants["SPLIT"] > 1
    check("linear_group", arguments, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_group_has_the_bits_of_the_single_linears_of_its_width(dtype: torch.dtype) -> None:
    """One launch for four weights; a weight's columns are the same wherever it stands in the group."""
    x = inputs.randn(2, 5, 96, dtype=dtype)
    weights = [inputs.randn(n, 96, dtype=dtype, scale=0.1) for n in (40, 1, 33, 64)]
    biases = [None, inputs.randn(1, dtype=dtype), None, inputs.randn(64, dtype=dtype)]
    with launch.recording() as launches:
        kernel("linear_group", x=x, weights=weights, biases=biases)
    assert len(launches) == 1
    forward = kernel("linear_group", x=x, weights=weights, biases=biases)
    backward = kernel("linear_group", x=x, weights=weights[::-1], biases=biases[::-1])
    for mine, other in zip(forward, backward[::-1], strict=True):
        assert torch.equal(mine, other)


def test_prompts_go_to_the_library_whatever_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(8, 16)
    for shape, is_prompt in (
        ((1, 65, 16), True),
        ((2, 64, 16), False),
        ((130, 16), False),
        ((70, 1, 16), False),
    ):
        x = torch.randn(shape)
        with launch.recording() as launches:
            out = kernel("linear", x=x, weight=weight)
        assert (not launches) == is_prompt, shape
        if is_prompt:
            assert torch.equal(out, F.linear(x, weight))


def test_what_decides_the_order_of_sums_does_not_depend_on_rows() -> None:
    """On every GPU that plans know; and tiles fit its shared memory."""
    for name in ("a100", "h100", "b200", "l4", "mi300x"):
        device = configs.planned_device(name)
        for columns, features in (
            (4096, 4096),
            (28672, 4096),
            (4096, 14336),
            (128256, 4096),
            (128, 7168),
            (1, 3),
        ):
            for dtype in (torch.bfloat16, torch.float32):
                found = [skinny.linear_config(columns, features, dtype, device, n) for n in (1, 2, 4)]
                assert len({(c.tile_n, c.tile_k, c.split, c.num_warps) for c in found}) == 1
                for row_tiles, c in zip((1, 2, 4), found, strict=True):
                    stage = 2 * c.tile_k * (c.tile_n + 16 * row_tiles) * dtype.itemsize
                    assert c.split * c.span(features) >= features
                    assert stage * (c.num_stages - 1) <= device.shared_memory


def test_refusals() -> None:
    x, weight = torch.randn(2, 8), torch.randn(4, 8)
    for arguments, said in (
        (dict(x=x.half(), weight=weight), "several dtypes"),
        (dict(x=x.double(), weight=weight.double()), "not float32, float16 or bfloat16"),
        (dict(x=x, weight=torch.randn(8, 4).t()), "stride"),
    ):
        found = registry.select("linear", "cpu", ("triton",), **arguments)
        assert found.provider == "reference" and said in found.reason
    with pytest.raises(InputError, match=r"a weight \[4, 8\] does not take x \[2, 7\]"):
        kernel("linear", x=torch.randn(2, 7), weight=weight)
