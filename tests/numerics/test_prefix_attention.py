"""A shared prefix: the op means attention over whole rows, and a row's bits do not depend on company."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphwright.ir.ops import SEMANTIC_OPS
from graphwright.kernels import registry
from tests.numerics import inputs
from tests.numerics.prefix_inputs import PREFIXES, prefix_cases, prefix_step, unshared
from tests.numerics.test_kernels import TOLERANCE, wide

DTYPES = (torch.float32, torch.bfloat16)


def cpp(**arguments: Any) -> torch.Tensor:
    """The C++ kernel's result; fails where another would run."""
    kernel = registry.select("prefix_attention", "cpu", **arguments)
    assert kernel.provider == "cpp", kernel.reason
    result: torch.Tensor = kernel.op(**arguments)
    return result


def rows(arguments: dict[str, Any], chosen: list[int]) -> dict[str, Any]:
    """The same step of some rows of the batch."""
    names = ("q", "keys", "values", "positions", "lengths", "counts", "tree")
    return {name: x[chosen] if name in names else x for name, x in arguments.items()}


def one_token(arguments: dict[str, Any], t: int) -> dict[str, Any]:
    """Token t of a chain alone, over a cache that holds those before it."""
    own = dict(arguments, q=arguments["q"][:, :, t : t + 1], positions=arguments["positions"][:, t : t + 1])
    counts = torch.ones_like(arguments["counts"])
    return dict(own, lengths=arguments["lengths"] + t, counts=counts)


def test_it_means_attention_over_the_prefix_and_the_row() -> None:
    for name, arguments in prefix_cases(torch.float64):
        arguments = wide(arguments)
        found = SEMANTIC_OPS["prefix_attention"].overload(**arguments)
        expected = SEMANTIC_OPS["cache_attention"].overload(**unshared(arguments))  # in float32 inside
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_gives_what_the_kernel_of_whole_rows_gives(dtype: torch.dtype) -> None:
    absolute, relative = TOLERANCE[dtype]
    for name, arguments in prefix_cases(dtype):
        whole = unshared(arguments)
        expected = registry.select("cache_attention", "cpu", **whole).op(**whole)
        found = cpp(**arguments)
        torch.testing.assert_close(
            found, expected, atol=absolute, rtol=relative, msg=lambda m, n=name: f"{n}: {m}"
        )
        if PREFIXES[name][0] == 0:
            assert torch.equal(found, expected), "without a prefix it is the other kernel"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [
    dict(lengths=[130, 3, 0, 40], heads=(9, 3)),
    dict(lengths=[5, 60], softcap=4.0, sinks=True, dims=(20, 36)),
], ids=str)  # fmt: skip
def test_a_row_and_a_token_alone_and_in_company(dtype: torch.dtype, options: dict[str, Any]) -> None:
    arguments = prefix_step(dtype, 300, tokens=8, slots=160, **options)
    together = cpp(**arguments)
    for row in range(len(options["lengths"])):
        assert torch.equal(cpp(**rows(arguments, [row])), together[row : row + 1]), row
    for t in range(8):
        assert torch.equal(cpp(**one_token(arguments, t))[:, 0], together[:, t]), t


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_path_of_a_tree_and_a_chain(dtype: torch.dtype) -> None:
    arguments = prefix_step(dtype, 200, tokens=12, lengths=[120, 3, 130], counts=[12, 9, 5], slots=160)
    arguments = inputs.random_trees(arguments)
    together = cpp(**arguments)
    for row, t, path in inputs.paths(arguments):
        own = inputs.path_step(arguments, row, path)
        for store in ("keys", "values"):
            own[store] = inputs.move_path(own[store], own["lengths"], path)
        assert torch.equal(cpp(**own)[0, -1], together[row, t]), (row, t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_long_step_is_the_same_in_parts(dtype: torch.dtype) -> None:
    """More query tokens than the kernel keeps at one time: it goes through the batch in parts."""
    arguments = prefix_step(dtype, 20, tokens=400, lengths=[0] * 3, heads=(2, 1), dims=(16, 16), slots=400)
    together = cpp(**arguments)
    for row in range(3):
        assert torch.equal(cpp(**rows(arguments, [row])), together[row : row + 1])


def test_threads_and_the_layout_of_queries_do_not_show() -> None:
    arguments = prefix_step(torch.bfloat16, 300, tokens=3, lengths=[10, 5], heads=(6, 2), slots=40)
    expected, before = cpp(**arguments), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(cpp(**arguments), expected)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(cpp(**dict(arguments, q=arguments["q"].contiguous())), expected)


def test_padding_gives_zeros_and_nothing_beside_the_tokens_is_read() -> None:
    arguments = prefix_step(torch.bfloat16, 50, tokens=5, lengths=[9, 4], counts=[2, 0], sinks=True, slots=30)
    assert arguments["keys"].isnan().any()
    out = cpp(**arguments)
    assert not out.isnan().any() and out[0, :2].abs().sum() > 0
    assert not out[0, 2:].any() and not out[1].any()


def test_bad_arguments_raise_and_do_not_crash() -> None:
    arguments = prefix_step(torch.float32, 8, tokens=2, lengths=[3, 1], slots=10)
    with pytest.raises(RuntimeError, match="the prefix's keys"):
        cpp(**dict(arguments, prefix_keys=arguments["prefix_keys"].expand(2, -1, -1, -1)))
    with pytest.raises(RuntimeError, match="the prefix's keys"):
        cpp(**dict(arguments, prefix_values=arguments["prefix_values"][:, :, :5]))
    with pytest.raises(RuntimeError, match="lengths"):
        cpp(**dict(arguments, lengths=torch.tensor([3])))
    mixed = dict(arguments, prefix_keys=arguments["prefix_keys"].bfloat16())
    reason = registry.select("prefix_attention", "cpu", **mixed).reason
    assert "several dtypes: torch.bfloat16, torch.float32" in reason
