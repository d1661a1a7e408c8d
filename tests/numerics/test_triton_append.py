"""The append kernels in Triton's interpreter: the reference's bits, and nothing else touched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.ir.ops import SEMANTIC_OPS
from graphwright.kernels import registry
from tests.numerics import inputs

pytest.importorskip("triton")
DTYPES = (torch.float32, torch.float16)  # the interpreter rounds bfloat16 wrongly


def kernel(op_name: str, arguments: dict[str, Any]) -> Any:
    """The Triton kernel, asked for by name."""
    found = registry.select(op_name, "cpu", ("triton",), **arguments)
    assert found.provider == "triton", found.reason
    return found.op


def check(op_name: str, arguments: dict[str, Any]) -> None:
    """Results and stores are the reference's, bit for bit; NaN marks what is not to be read."""
    mine, reference = copy.deepcopy(arguments), copy.deepcopy(arguments)
    found = kernel(op_name, mine)(**mine)
    expected = SEMANTIC_OPS[op_name].overload(**reference)
    for name in ("store", "keys", "values"):
        if name in mine:
            assert torch.equal(mine[name].nan_to_num(7.0), reference[name].nan_to_num(7.0)), name
    if expected is not None:
        assert found.is_contiguous() and found.dtype == expected.dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op_name", ["cache_append", "rotary_append"])
def test_bits_of_the_reference(op_name: str, dtype: torch.dtype) -> None:
    for _, arguments in inputs.CASES[op_name](dtype):
        check(op_name, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (8, 4), (12, 3), (8, 1)], ids=str)
@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
def test_model_sizes(width: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    """A ragged step that wraps around the ring."""
    check("rotary_append", inputs.rotary_step(dtype, "half", heads, width, 5, [6, 0, 21], [5, 0, 3]))


def test_a_long_step() -> None:
    """More tokens than one program takes, the last tile not full, and more than fit the ring's end."""
    arguments = inputs.rotary_step(torch.float32, "half", (2, 1), 16, 37, [30, 50], [37, 20], slots=40)
    check("rotary_append", arguments)
    check("cache_append", stored(arguments))


def stored(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the append of the keys alone."""
    return dict(
        store=arguments["keys"],
        new=arguments["k"],
        lengths=arguments["lengths"],
        counts=arguments["counts"],
    )


def test_float32_angles_of_a_narrow_model() -> None:
    """Products are rounded to the wider dtype."""
    arguments = inputs.rotary_step(torch.float16, "half", (4, 2), 32, 3, [1], [3])
    angle = torch.randn(1, 1, 3, 32)
    check("rotary_append", {**arguments, "cos": angle.cos(), "sin": angle.sin()})


def test_stores_narrower_than_the_step() -> None:
    arguments = inputs.rotary_step(torch.float32, "half", (4, 2), 32, 3, [1], [3])
    check("rotary_append", {**arguments, "keys": arguments["keys"].half()})
    check("cache_append", {**stored(arguments), "store": arguments["keys"].half()})


def test_inputs_and_stores_with_strides() -> None:
    arguments = inputs.rotary_step(torch.float32, "interleaved", (4, 2), 32, 3, [6, 1], [3, 1])
    arguments["q"] = torch.randn(2, 3, 4, 96).transpose(1, 2)[..., 5:69:2]
    arguments["k"] = torch.randn(32, 3, 2, 2).permute(3, 2, 1, 0)
    arguments["v"] = torch.randn(1, 2, 1, 26).expand(2, 2, 3, 26)
    whole = torch.full((2, 2, 20, 40), torch.nan)
    arguments["keys"] = whole[:, :, 3:11, 4:36]
    arguments["cos"], arguments["sin"] = (torch.randn(3, 64)[:, ::2] for _ in range(2))
    before = whole.clone()
    check("rotary_append", arguments)
    kernel("rotary_append", arguments)(**arguments)
    written = torch.zeros_like(whole, dtype=torch.bool)
    written[0, :, [9, 10, 3], 4:36] = True
    written[1, :, 4, 4:36] = True
    assert torch.equal(whole.isnan(), ~written) and before.isnan().all()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    layout=st.sampled_from(["half", "interleaved", "interleaved_to_half"]),
    group=st.integers(1, 8),
    groups=st.integers(1, 3),
    pairs=st.integers(4, 40),
    tokens=st.integers(1, 20),
    rows=st.lists(st.tuples(st.integers(0, 100), st.integers(0, 20)), min_size=1, max_size=3),
    extra=st.integers(0, 9),
    shared=st.booleans(),
)
def test_any_step(
    layout: str,
    group: int,
    groups: int,
    pairs: int,
    tokens: int,
    rows: list[tuple[int, int]],
    extra: int,
    shared: bool,
) -> None:
    lengths, counts = [length for length, _ in rows], [min(count, tokens) for _, count in rows]
    heads = (group * groups, groups)
    arguments = inputs.rotary_step(
        torch.float16, layout, heads, 2 * pairs, tokens, lengths, counts, shared, slots=tokens + extra
    )
    check("rotary_append", arguments)
    check("cache_append", stored(arguments))


def test_what_is_refused() -> None:
    arguments = inputs.rotary_step(torch.float32, "half", (4, 2), 32, 3, [1], [3])
    for change, reason in (
        ({"cos": torch.randn(1, 4, 3, 32), "sin": torch.randn(1, 4, 3, 32)}, "each head has its own"),
        ({"cos": torch.randn(2, 3, 32), "sin": torch.randn(2, 3, 32)}, "each head has its own"),
        ({"sin": torch.randn(1, 1, 3, 16)}, "do not lie alike"),
        ({"k": arguments["k"].half()}, "queries are"),
        ({"values": arguments["values"].double()}, "float64 is not"),
    ):
        found = registry.select("rotary_append", "cpu", ("triton",), **{**arguments, **change})
        assert found.provider == registry.REFERENCE and reason in found.reason
