"""The Triton kernel of routed layers in the interpreter: float64's numbers, bits whatever else is routed."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.ir.errors import InputError
from graphwright.ir.ops import SEMANTIC_OPS
from graphwright.kernels import registry
from graphwright.kernels.triton import launch
from tests.numerics import inputs

os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

DTYPES = (torch.float32, torch.float16)  # the interpreter gets bfloat16 wrong
# Absolute and relative: results of size 1 to 4 are rounded once to the dtype; sums are float32.
TOLERANCE = {torch.float32: (4e-6, 4e-6), torch.float16: (1e-3, 1e-3)}


def kernel(**arguments: Any) -> torch.Tensor:
    """The result of the Triton kernel, asked for by name."""
    found = registry.select("routed_linear", "cpu", ("triton",), **arguments)
    assert found.provider == "triton", found.reason
    return found.op(**arguments)


def is_sorted(**arguments: Any) -> bool:
    """Whether pairs are sorted by expert first."""
    with launch.recording() as launches:
        kernel(**arguments)
    (only,) = launches
    return bool(only.constants["SORTED"])


def check(arguments: dict[str, Any]) -> None:
    """The result is float64's, contiguous, in the dtype of ``x``."""
    found = kernel(**arguments)
    wide = {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in arguments.items()
    }
    dtype = arguments["x"].dtype
    assert found.is_contiguous() and found.dtype == dtype
    absolute, relative = TOLERANCE[dtype]
    expected = SEMANTIC_OPS["routed_linear"].overload(**wide)
    torch.testing.assert_close(found.double(), expected, atol=absolute, rtol=relative)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(dtype: torch.dtype, poisoned: None) -> None:
    """Both layouts, odd sizes, strided parts of larger matrices, few pairs and many; all is written."""
    for _, arguments in inputs.CASES["routed_linear"](dtype):
        check(arguments)


@settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(1, 20), choices=st.integers(1, 3), experts=st.integers(1, 5), k=st.integers(1, 140),
    n=st.integers(1, 70), transposed=st.booleans(), shared=st.booleans(), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_any_size(
    tokens: int,
    choices: int,
    experts: int,
    k: int,
    n: int,
    transposed: bool,
    shared: bool,
    dtype: torch.dtype,
) -> None:
    check(inputs.routed(dtype, (tokens, choices, experts, k, n), transposed, bool(n % 2), shared))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts_that_are_not_chosen_and_padding_do_not_show(dtype: torch.dtype, transposed: bool) -> None:
    k, n = 33, 21
    sizes = (k, n) if transposed else (n, k)
    store = torch.full((4, sizes[0] + 3, sizes[1] + 7), torch.nan, dtype=dtype)
    weight = store[:, 1 : 1 + sizes[0], 2 : 2 + sizes[1]]
    weight[[0, 3]] = inputs.randn(2, *sizes, dtype=dtype, scale=0.1)
    bias = torch.full((4, n + 5), torch.nan, dtype=dtype)[:, 3 : 3 + n]
    bias[[0, 3]] = inputs.randn(2, n, dtype=dtype)
    for tokens in (5, 20):  # in order, and sorted
        x = torch.full((tokens, 4, k + 9), torch.nan, dtype=dtype)[:, 1:3, 4 : 4 + k]
        x.copy_(inputs.randn(tokens, 2, k, dtype=dtype))
        arguments = dict(
            x=x,
            index=torch.randint(0, 2, (tokens, 2)) * 3,
            weight=weight,
            bias=bias,
            transposed=transposed,
        )
        assert is_sorted(**arguments) == (tokens == 20)
        check(arguments)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("experts", "k", "n"), [(1, 64, 40), (3, 300, 65)])
def test_pair_alone_and_among_others(
    dtype: torch.dtype, transposed: bool, experts: int, k: int, n: int, fair_dots: None
) -> None:
    """Alone it is not sorted with more than one expert; among 140 it shares a tile."""
    arguments = inputs.routed(dtype, (70, 2, experts, k, n), transposed, True, False)
    x, index = arguments["x"], arguments["index"]
    assert is_sorted(**arguments)
    among = kernel(**arguments)
    for t in (0, 13, 69):
        row = {"x": x[t : t + 1, 1:], "index": index[t : t + 1, 1:]}
        assert not is_sorted(**{**arguments, **row})
        assert torch.equal(kernel(**{**arguments, **row})[0, 0], among[t, 1]), t
    for rows in (2, 17, 33):
        some = kernel(**{**arguments, "x": x[:rows], "index": index[:rows]})
        assert torch.equal(some, among[:rows]), rows


@pytest.mark.parametrize("tokens", [2, 30])
def test_an_expert_that_there_is_not_gives_nan(tokens: int) -> None:
    """And leaves the others alone: an error would have to wait for the GPU."""
    arguments = inputs.routed(torch.float32, (tokens, 2, 4, 16, 8), False, True, False)
    index = arguments["index"].clone()
    right = kernel(**arguments)
    for number in (-1, 4, 7, 2**40):
        index[1, 1] = number
        out = kernel(**{**arguments, "index": index})
        assert out[1, 1].isnan().all()
        out[1, 1] = right[1, 1]
        torch.testing.assert_close(out, right)


def test_refusals_and_no_rows() -> None:
    arguments = inputs.routed(torch.float32, (3, 2, 4, 16, 8), False, True, False)
    for name, other, said in (
        ("index", arguments["index"].int(), "not int64"),
        ("weight", arguments["weight"].half(), "several dtypes"),
        ("weight", arguments["weight"].transpose(1, 2), "stride"),
    ):
        found = registry.select("routed_linear", "cpu", ("triton",), **{**arguments, name: other})
        assert found.provider == "reference" and said in found.reason
    for shape in ((3, 2, 15), (3, 3, 16), (4, 2, 16)):
        with pytest.raises(InputError, match="do not take"):
            kernel(**{**arguments, "x": torch.zeros(shape)})
    none = inputs.routed(torch.float32, (0, 2, 4, 16, 8), False, True, False)
    assert kernel(**none).shape == (0, 2, 8)
