"""Appending, packing, linears, selection and sampling on the chip, against references on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from graphwright.ir.codecs import PageShape
from graphwright.kernels.triton.choose_pages import RESIDENT
from graphwright.kernels.triton.encode import encode_pages
from graphwright.kernels.triton.sampling import argmax_rows, verify_greedy
from graphwright.kernels.triton.shipped import CODECS
from tests.gpu.support import (
    DEVICE,
    DTYPES,
    REHEARSED,
    SINGLE,
    USUAL,
    kernel,
    moved,
    reference,
    same_bits,
    wide,
)
from tests.numerics import inputs
from tests.numerics.packed_inputs import Packing, packed_step
from tests.numerics.test_triton_encode import case, same
from tests.numerics.test_triton_listed import SETTLED, dense_step, lists
from tests.numerics.test_triton_listed import wide as without_nan
from tests.numerics.test_triton_select import choosing, scoring

pytestmark = pytest.mark.gpu

# Absolute and relative: results of size 1 to 4, rounded once; float32 sums in another order.
NEAR = {torch.bfloat16: (1e-2, 1e-2), torch.float16: (1e-3, 1e-3), SINGLE: (2e-5, 2e-5)}


# --- appending and packing -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op_name", ["cache_append", "rotary_append"])
def test_appends_have_the_bits_of_the_reference(op_name: str, dtype: torch.dtype) -> None:
    for name, arguments in inputs.CASES[op_name](dtype):
        check_append(op_name, arguments, name)


@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
def test_appends_of_model_sizes(width: int) -> None:
    arguments = inputs.rotary_step(USUAL, "half", (8, 2), width, 5, [6, 0, 21], [5, 0, 3])
    check_append("rotary_append", arguments, str(width))


def check_append(op_name: str, arguments: dict[str, Any], name: str) -> None:
    there, here = moved(arguments), copy.deepcopy(arguments)
    found = kernel(op_name, there)(**there)
    expected = reference(op_name, here)
    for store in ("store", "keys", "values"):
        if store in here:
            assert same_bits(there[store], here[store]), (name, store)
    assert expected is None or same_bits(found, expected), name


@pytest.mark.parametrize("side", [0, 1], ids=["keys", "values"])
@pytest.mark.parametrize("name", list(CODECS))
@pytest.mark.parametrize("width", [64, 128])
def test_pages_have_the_bytes_of_the_reference(name: str, side: int, width: int) -> None:
    """Of turned pages a code at a border may fall to the other side: products are summed otherwise."""
    codec = CODECS[name][side]
    made = case(codec, PageShape(2, 64, width), dtype=USUAL, first=4)
    store, tables = moved(made.store), moved(made.constants)
    encode_pages(store, tables, codec, made.page, made.rows.to(DEVICE), made.starts.to(DEVICE))
    found = [buffer.cpu() for buffer in store[3:]]
    if "hadamard" not in codec:
        same(found, made.expected)
        return
    for mine, expected in zip(found, made.expected, strict=True):
        if mine.dtype == torch.uint8:
            assert (mine != expected).float().mean() < 2e-3
        else:
            torch.testing.assert_close(mine, expected, rtol=1e-2, atol=1e-3)


# --- linears -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op_name", ["linear", "linear_group", "routed_linear"])
def test_linears_against_float64(op_name: str, dtype: torch.dtype, poisoned: None) -> None:
    for name, arguments in inputs.CASES[op_name](dtype):
        if DEVICE.type == "cpu" and arguments["x"].shape[-1] > 500:  # the interpreter takes long
            continue
        there = moved(arguments)
        found = kernel(op_name, there)(**there)
        expected = reference(op_name, wide(arguments, torch.float64))
        pairs = zip(found, expected, strict=True) if isinstance(expected, list) else [(found, expected)]
        absolute, relative = NEAR[dtype]
        for mine, wanted in pairs:
            assert mine.is_contiguous() and mine.dtype == dtype
            torch.testing.assert_close(mine.cpu().double(), wanted, atol=absolute, rtol=relative, msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "n"), [(300, 33)] if REHEARSED else [(576, 192), (4096, 1024), (300, 33)])
def test_a_row_alone_and_among_others(k: int, n: int, dtype: torch.dtype) -> None:
    """The same bits with 1, 2, 8, 17, 33 and 64 rows: speculation changes no token."""
    x = inputs.randn(64, k, dtype=dtype).to(DEVICE)
    weight = inputs.randn(n, k, dtype=dtype, scale=k**-0.5).to(DEVICE)
    run = kernel("linear", dict(x=x, weight=weight))
    among = run(x, weight, None)
    for row in (0, 1, 15, 16, 40, 63):
        assert same_bits(run(x[row : row + 1], weight, None)[0], among[row]), row
    for rows in (2, 8, 17, 33):
        assert same_bits(run(x[:rows], weight, None), among[:rows]), rows
    assert same_bits(run(x.view(2, 32, k), weight, None).view(64, n), among)


# --- selection and sampling ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("selector", ["bounds", "mean"])
@pytest.mark.parametrize(("heads", "features"), [((4, 4), 64), ((8, 2), 128), ((8, 1), 80)])
def test_scores_of_pages(heads: tuple[int, int], features: int, selector: str, dtype: torch.dtype) -> None:
    arguments = scoring([300, 133], heads, 3, features, selector=selector, dtype=dtype)
    there = moved(arguments)
    found = kernel("score_pages", there)(**there)
    expected = reference("score_pages", arguments)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pages", [1, 64, 2048, RESIDENT, RESIDENT + 5, 3 * RESIDENT])
@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("ties", [False, True])
def test_the_best_pages(pages: int, share: float, ties: bool, poisoned: None) -> None:
    shape = (2, 2, 2, pages)
    scores = torch.randint(0, 9, shape) / 1024 if ties else torch.randn(shape).mul(3).softmax(-1)
    arguments = choosing(scores, [4 * pages, 2 * pages], [1, 0], keep=1 / 16, share=share)
    there = moved(arguments)
    found, chosen = (x.cpu() for x in kernel("choose_pages", there)(**there))
    expected, counts = reference("choose_pages", arguments)
    assert torch.equal(chosen, counts)
    listed = torch.arange(pages) < chosen[..., None]
    assert torch.equal(found[listed], expected[listed])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", [None, "token_range >> uniform(bits=4)"])
def test_attention_over_lists(codec: str | None, dtype: torch.dtype, poisoned: None) -> None:
    """Against the reference in float32; and a token alone has the bits that it has in the step."""
    if codec is None:
        op_name, arguments = "cache_attention", dense_step(dtype, 16, 0, [0, 1], tokens=4, lengths=[270, 90])
    else:
        op_name, store = "packed_attention", Packing(codec, page=32, first=4, lag=SETTLED)
        arguments = packed_step(dtype, store, store, tokens=4, lengths=[327, 128])
        arguments |= lists(arguments, 2, 32, 4, [0, 1])
    there = moved(arguments)
    found = kernel(op_name, there)(**there)
    kept = {name: x if name.endswith("constants") else without_nan(x) for name, x in arguments.items()}
    expected = reference(op_name, kept)
    atol, rtol = NEAR[dtype]
    torch.testing.assert_close(found.cpu().float(), expected, atol=atol, rtol=rtol)
    alone = dict(there)
    for name, dim in (("q", 2), ("positions", 1), ("pages", 1), ("chosen", 1)):
        alone[name] = there[name].narrow(dim, 2, 1).contiguous()
    alone["lengths"], alone["counts"] = there["lengths"] + 2, torch.ones_like(there["counts"])
    assert same_bits(kernel(op_name, alone)(**alone)[:, 0], found[:, 2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "vocabulary"), [(1, 17), (5, 4099)] + ([] if REHEARSED else [(8, 128_256), (64, 50_257)])
)
def test_greedy_choice(rows: int, vocabulary: int, dtype: torch.dtype) -> None:
    """bfloat16 is full of ties: the lowest of them, as torch has it on the CPU."""
    logits = torch.randn(rows, vocabulary).to(dtype)
    assert torch.equal(argmax_rows(logits.to(DEVICE)).cpu(), logits.argmax(-1))


def test_greedy_verification() -> None:
    argmax = torch.tensor([[1, 2, 3, 4]] * 6)
    tokens = torch.tensor(
        [[9, 1, 2, 3], [9, 1, 2, 7], [9, 1, 2, 3], [9, 7, 2, 3], [9, 1, 2, 3], [9, 1, 2, 3]]
    )
    accepted, following = verify_greedy(*moved([argmax, tokens, torch.tensor([4, 4, 2, 4, 1, 0])]))
    assert accepted.tolist() == [4, 3, 2, 1, 1, 0] and following.tolist() == [4, 3, 2, 1, 1, -1]
