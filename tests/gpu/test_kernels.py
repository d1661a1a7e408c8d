"""Appending, packing, linears, selection and sampling on the chip, against references on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from graphwright.ir.codecs import PageShape
from graphwright.kernels.triton.encode import encode_pages
from graphwright.kernels.triton.page_scores import page_scores
from graphwright.kernels.triton.sampling import argmax_rows, verify_greedy
from graphwright.kernels.triton.select_pages import RESIDENT, select_pages
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
from tests.numerics.test_triton_encode import case, same

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


def test_a_summary_of_each_page() -> None:
    made = case("token_scale >> uniform(bits=4)", PageShape(2, 16, 64), dtype=USUAL)
    summary = torch.full((2, 3, 2, 2, 64), 99.0, dtype=USUAL, device=DEVICE)
    codec, there = made.codec, moved([made.store, made.constants, made.rows, made.starts])
    encode_pages(there[0], there[1], codec, made.page, there[2], there[3], summary)
    expected = torch.full(summary.shape, 99.0, dtype=USUAL)
    for page, row, start in zip(made.pages, made.rows, made.starts, strict=True):
        expected[row, (start // made.page) % 3] = torch.stack([page.amin(1), page.amax(1)], 1)
    assert torch.equal(summary.cpu(), expected)


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
@pytest.mark.parametrize(("heads", "groups", "features"), [(4, 4, 64), (8, 2, 128), (8, 1, 80)])
def test_scores_of_pages(heads: int, groups: int, features: int, dtype: torch.dtype) -> None:
    keys = torch.randn(2, 75, groups, 4, features)
    summary = torch.stack((keys.amin(3), keys.amax(3)), 3).to(dtype)
    q, used = torch.randn(2, heads, 3, features).to(dtype), torch.tensor([75, 33])
    by_group = q.double().unflatten(1, (groups, -1)).flatten(2, 3)[:, :, :, None]
    lowest, highest = summary.double().permute(3, 0, 2, 1, 4)[:, :, :, None]
    expected = torch.maximum(by_group * lowest, by_group * highest).sum(-1).amax(2)
    expected = expected.masked_fill((torch.arange(75) >= used[:, None])[:, None], float("-inf"))
    found = page_scores(*moved([q, summary, used]))
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("pages", [1, 64, 2048, RESIDENT, RESIDENT + 5, 3 * RESIDENT])
@pytest.mark.parametrize("ties", [False, True])
def test_the_best_pages(pages: int, ties: bool, poisoned: None) -> None:
    scores = torch.randint(0, 9, (2, 4, pages)).float() if ties else torch.randn(2, 4, pages)
    keep, used = max(1, pages // 16), torch.tensor([pages, max(1, pages // 2)])
    found, counts = (x.cpu() for x in select_pages(*moved([scores, used]), keep))
    for b, here in enumerate(used.tolist()):
        for g in range(4):
            best = torch.sort(scores[b, g, :here], descending=True, stable=True).indices[:keep]
            assert counts[b, g] == len(best)
            assert found[b, g].tolist() == sorted(best.tolist()) + [-1] * (keep - len(best))


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
