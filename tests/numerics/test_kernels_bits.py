"""A row has the same bits alone and in company: whatever the rows, the tokens, the batch and the threads."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.kernels import registry
from tests.numerics import inputs

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture
def threads() -> Iterator[None]:
    """Leaves the number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def cpp(op_name: str, **arguments: Any) -> Any:
    """The C++ kernel's result; fails where another would run."""
    kernel = registry.select(op_name, "cpu", **arguments)
    assert kernel.provider == "cpp", kernel.reason
    return kernel.op(**arguments)


def one_token(arguments: dict[str, Any], t: int) -> dict[str, Any]:
    """The step that decodes token t of a chain after the others before it."""
    own = copy.deepcopy(arguments)
    for store, new in (("keys", "k"), ("values", "v")):
        torch.ops.graphwright.cache_append(
            own[store], own[new], own["lengths"], torch.full_like(own["counts"], t)
        )
        own[new] = own[new][:, :, t : t + 1]
    own["q"], own["positions"] = own["q"][:, :, t : t + 1], own["positions"][:, t : t + 1]
    own["lengths"] = own["lengths"] + t
    own["counts"] = torch.ones_like(own["counts"])
    return own


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "n"), [(576, 192), (1536, 576), (35, 40), (90, 33), (64, 7)])
def test_linear_row_alone_and_among_others(dtype: torch.dtype, k: int, n: int) -> None:
    x, weight = inputs.randn(64, k, dtype=dtype), inputs.randn(n, k, dtype=dtype, scale=k**-0.5)
    bias = inputs.randn(n, dtype=dtype)
    alone = torch.cat([cpp("linear", x=x[i : i + 1], weight=weight, bias=bias) for i in range(64)])
    for rows in (2, 3, 8, 33, 64):
        assert torch.equal(cpp("linear", x=x[:rows], weight=weight, bias=bias), alone[:rows]), rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_group_equals_single_linears(dtype: torch.dtype) -> None:
    x = inputs.randn(5, 64, dtype=dtype)
    weights = [inputs.randn(n, 64, dtype=dtype) for n in (64, 33, 48)]
    for mine, w in zip(cpp("linear_group", x=x, weights=weights, biases=[None] * 3), weights, strict=True):
        assert torch.equal(mine, cpp("linear", x=x, weight=w))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("experts", "k", "n"), [(1, 64, 300), (3, 35, 65), (8, 96, 33)])
def test_routed_row_alone_and_among_others(
    dtype: torch.dtype, transposed: bool, experts: int, k: int, n: int
) -> None:
    arguments = inputs.routed(dtype, (65, 2, experts, k, n), transposed, True, False)
    x, index = arguments["x"], arguments["index"]

    def one(t: int, c: int) -> torch.Tensor:
        row = {"x": x[t : t + 1, c : c + 1], "index": index[t : t + 1, c : c + 1]}
        return cpp("routed_linear", **{**arguments, **row})[0, 0]

    alone = torch.stack([torch.stack([one(t, c) for c in range(2)]) for t in range(65)])
    for rows in (1, 2, 3, 8, 33, 65):
        together = cpp("routed_linear", **{**arguments, "x": x[:rows], "index": index[:rows]})
        assert torch.equal(together, alone[:rows]), rows
    if experts == 1:  # the same matrix as a plain argument of one expert in three
        weight = arguments["weight"].expand(3, -1, -1)
        spread = {**arguments, "weight": weight, "bias": arguments["bias"].expand(3, -1)}
        spread["index"] = torch.randint(0, 3, (65, 2))
        assert torch.equal(cpp("routed_linear", **spread), alone)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_routed_linear_does_not_depend_on_threads(
    dtype: torch.dtype, transposed: bool, threads: None
) -> None:
    for shape in ((1, 4, 8, 96, 300), (33, 2, 5, 96, 300)):
        arguments = inputs.routed(dtype, shape, transposed, True, False)
        torch.set_num_threads(1)
        one = cpp("routed_linear", **arguments)
        torch.set_num_threads(2)
        assert torch.equal(cpp("routed_linear", **arguments), one)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [
    dict(lengths=[250, 3], heads=(9, 3), slots=400),
    dict(lengths=[125], slots=160, window=140),
    dict(lengths=[1000], slots=160, window=140),
    dict(lengths=[40], softcap=4.0, sinks=True, dims=(20, 36)),
    dict(lengths=[40], dims=(7, 5)),
], ids=str)  # fmt: skip
def test_token_alone_and_in_a_step(dtype: torch.dtype, options: dict[str, Any]) -> None:
    arguments = inputs.step(dtype, tokens=8, **options)
    together = cpp("append_attention", **copy.deepcopy(arguments))
    for t in range(8):
        assert torch.equal(cpp("append_attention", **one_token(arguments, t))[:, 0], together[:, t]), t


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_alone_and_in_a_prefill_chunk(dtype: torch.dtype) -> None:
    arguments = inputs.step(dtype, tokens=150, lengths=[120], heads=(4, 2), slots=280)
    together = cpp("append_attention", **copy.deepcopy(arguments))
    for t in (0, 7, 8, 64, 149):
        assert torch.equal(cpp("append_attention", **one_token(arguments, t))[:, 0], together[:, t]), t


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sequence_alone_and_in_a_batch(dtype: torch.dtype) -> None:
    arguments = inputs.step(dtype, tokens=4, lengths=[200, 0, 129, 60, 250, 7], counts=[4, 1, 2, 3, 4, 4])
    together = cpp("append_attention", **copy.deepcopy(arguments))
    for row in range(6):
        alone = {
            name: x[row : row + 1] if isinstance(x, torch.Tensor) and name != "sinks" else x
            for name, x in copy.deepcopy(arguments).items()
        }
        assert torch.equal(cpp("append_attention", **alone)[0], together[row]), row


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [
    dict(tokens=7, lengths=[125]),
    dict(tokens=16, lengths=[120, 0, 256], counts=[16, 3, 9], heads=(9, 3)),
    dict(tokens=63, lengths=[100], heads=(2, 1), dims=(16, 16)),
    dict(tokens=33, lengths=[240], heads=(20, 1), dims=(20, 36), sinks=True),
    dict(tokens=12, lengths=[130, 1000], slots=160, window=140),
    dict(tokens=12, lengths=[259, 4], window=9, softcap=4.0),
], ids=str)  # fmt: skip
def test_path_of_a_tree_and_a_chain(dtype: torch.dtype, options: dict[str, Any], threads: None) -> None:
    for count, depth_first in ((1, 0.6), (2, 0.9)):
        torch.set_num_threads(count)
        arguments = inputs.random_trees(inputs.step(dtype, **options), depth_first)
        check_paths(arguments)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_paths_of_random_trees(data: st.DataObject) -> None:
    draw = data.draw
    tokens, shared = draw(st.integers(2, 24)), draw(st.integers(1, 5))
    around = st.one_of(st.integers(100, 140), st.integers(250, 260))
    lengths = draw(st.lists(around, min_size=1, max_size=2))
    window = draw(st.sampled_from([0, 0, 7, 130]))
    arguments = inputs.step(
        draw(st.sampled_from(DTYPES)),
        tokens=tokens,
        lengths=lengths,
        counts=[draw(st.integers(0, tokens)) for _ in lengths],
        heads=(2 * shared, 2),
        slots=window + tokens if window else 300,
        window=window,
    )
    check_paths(inputs.random_trees(arguments, draw(st.sampled_from([0.0, 0.5, 0.9]))))


def check_paths(arguments: dict[str, Any]) -> None:
    """Every token of every tree gets the bits of the last token of its path as a chain."""
    together = cpp("append_attention", **copy.deepcopy(arguments))
    for row, t, path in inputs.paths(arguments):
        alone = cpp("append_attention", **inputs.path_step(arguments, row, path))
        assert torch.equal(alone[0, -1], together[row, t]), (row, t)
    for row, count in enumerate(arguments["counts"].tolist()):
        assert not together[row, count:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_thread_and_two(dtype: torch.dtype, threads: None) -> None:
    x, weight = inputs.randn(8, 576, dtype=dtype), inputs.randn(1000, 576, dtype=dtype)
    many = inputs.randn(100, 576, dtype=dtype)
    step = inputs.step(dtype, tokens=3, lengths=[290], heads=(9, 3))
    batch = inputs.step(dtype, tokens=3, lengths=[290, 17, 5, 100, 200], heads=(9, 3))
    seen = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results = [cpp("append_attention", **copy.deepcopy(s)) for s in (step, batch)]
        seen.append([cpp("linear", x=x, weight=weight), *results])
        assert cpp("linear", x=many, weight=weight).shape == (100, 1000)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_attention_over_random_shapes(data: st.DataObject) -> None:
    draw = data.draw
    dtype = draw(st.sampled_from(DTYPES))
    tokens, groups, shared = draw(st.integers(1, 12)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    window = draw(st.sampled_from([0, 0, 5, 60]))
    lengths = draw(st.lists(st.integers(0, 300), min_size=1, max_size=3))
    slots = window + tokens + draw(st.integers(0, 9)) if window else max(lengths) + tokens
    tree = draw(st.booleans())
    arguments = inputs.step(
        dtype,
        tokens=tokens,
        lengths=lengths,
        counts=[draw(st.integers(0, tokens)) for _ in lengths],
        heads=(groups * shared, groups),
        dims=(draw(st.integers(1, 70)), draw(st.integers(1, 70))),
        slots=slots,
        tree=tree,
        sinks=draw(st.booleans()),
        window=window,
        softcap=draw(st.sampled_from([0.0, 5.0])),
    )
    wide = {
        name: x.double().nan_to_num() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in copy.deepcopy(arguments).items()
    }
    mine = cpp("append_attention", **arguments).double()
    tolerance = (2e-5, 1e-5) if dtype == torch.float32 else (2e-2, 2**-7)
    torch.testing.assert_close(
        mine, torch.ops.graphwright.append_attention(**wide), atol=tolerance[0], rtol=tolerance[1]
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 140), st.integers(1, 100), st.sampled_from(DTYPES), st.booleans())
def test_linear_over_random_shapes(rows: int, k: int, n: int, dtype: torch.dtype, biased: bool) -> None:
    x, weight = inputs.randn(rows, k, dtype=dtype), inputs.randn(n, k, dtype=dtype, scale=k**-0.5)
    bias = inputs.randn(n, dtype=dtype) if biased else None
    expected = torch.nn.functional.linear(
        x.double(), weight.double(), None if bias is None else bias.double()
    )
    tolerance = (2e-5, 1e-5) if dtype == torch.float32 else (2e-2, 2**-7)
    torch.testing.assert_close(
        cpp("linear", x=x, weight=weight, bias=bias).double(), expected, atol=tolerance[0], rtol=tolerance[1]
    )
