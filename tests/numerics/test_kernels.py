"""Every registered kernel against its op's reference body, over every input of ``inputs.py``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_map

from graphwright.ir.ops import SEMANTIC_OPS
from graphwright.kernels import registry
from tests.numerics import inputs

# float32: sums of up to 1,536 products in another order than the oracle's, and an exp good to two units in
# the last place. bfloat16: one rounding of the result (2^-9), and attention weights rounded once (2^-9 of
# a weighted mean of values of size about 1).
TOLERANCE = {torch.float32: (2e-5, 1e-5), torch.bfloat16: (2e-2, 2**-7)}
DTYPES = tuple(TOLERANCE)
OPS = sorted({k.op_name for k in registry.kernels() if k.provider == "cpp"})
NUMBERS = [op for op in OPS if op != "choose_pages"]  # lists have undefined ends: test_sparse_kernels.py


def wide(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in float64; what no query may see stays poisoned in the kernel's input only."""

    def one(x: Any) -> Any:
        return x.double().nan_to_num() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return tree_map(one, arguments)


def mutated(op_name: str) -> list[str]:
    """The names of the arguments that the op writes to."""
    schema = SEMANTIC_OPS[op_name].overload._schema
    return [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]


def run(op: Any, arguments: dict[str, Any], op_name: str) -> list[torch.Tensor]:
    """Results, then the mutated arguments, of a call on copies."""
    own = copy.deepcopy(arguments)
    results = tree_flatten(op(**own))[0]
    return [r for r in results if r is not None] + [own[name] for name in mutated(op_name)]


def kernel_of(op_name: str, arguments: dict[str, Any]) -> registry.Kernel:
    """What a CPU program would run."""
    return registry.select(op_name, "cpu", **arguments)


def test_every_op_has_an_input_generator() -> None:
    assert set(inputs.CASES) == set(SEMANTIC_OPS)


@pytest.mark.parametrize("op_name", sorted(SEMANTIC_OPS))
def test_inputs_run_through_the_reference(op_name: str) -> None:
    cases = list(inputs.CASES[op_name](torch.float32))
    assert cases
    for _, arguments in cases:
        for result in run(SEMANTIC_OPS[op_name].overload, wide(arguments), op_name):
            assert not result.isnan().any()


def test_the_cpp_kernels_build_here() -> None:
    from graphwright.kernels.cpp import build

    assert build.available() == (True, "")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op_name", NUMBERS)
def test_kernel_equals_reference(op_name: str, dtype: torch.dtype) -> None:
    absolute, relative = TOLERANCE[dtype]
    for name, arguments in inputs.CASES[op_name](dtype):
        kernel = kernel_of(op_name, arguments)
        assert kernel.provider == "cpp", kernel.reason
        found = run(kernel.op, arguments, op_name)
        expected = run(SEMANTIC_OPS[op_name].overload, wide(arguments), op_name)
        assert len(found) == len(expected)
        for mine, reference in zip(found, expected, strict=True):
            # A result that does not follow the inputs' dtype has the reference's.
            own = dtype if reference.dtype == torch.float64 else reference.dtype
            assert mine.dtype == own and mine.shape == reference.shape and mine.is_contiguous()
            reference = reference.double()
            mine = mine.double().nan_to_num() if mutated(op_name) and mine.isnan().any() else mine.double()
            torch.testing.assert_close(
                mine, reference, atol=absolute, rtol=relative, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("op_name", OPS)
def test_appends_are_bit_equal_and_touch_nothing_else(op_name: str) -> None:
    names = mutated(op_name)
    for name, arguments in inputs.CASES[op_name](torch.bfloat16) if names else ():
        mine, reference = copy.deepcopy(arguments), copy.deepcopy(arguments)
        kernel_of(op_name, arguments).op(**mine)
        SEMANTIC_OPS[op_name].overload(**reference)
        for store in names:
            assert torch.equal(mine[store].view(torch.int16), reference[store].view(torch.int16)), name


@pytest.mark.parametrize("op_name", OPS)
def test_shape_function_gives_the_real_result(op_name: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    for name, arguments in inputs.CASES[op_name](torch.float32):
        op = kernel_of(op_name, arguments).op
        real = tree_flatten(op(**copy.deepcopy(arguments)))[0]
        with FakeTensorMode() as mode:
            fakes = tree_map(lambda x: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x, arguments)
            fake = tree_flatten(op(**fakes))[0]
        for a, b in zip(real, fake, strict=True):
            if a is not None:
                assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype), name


def test_poison_outside_the_visible_keys_never_shows() -> None:
    for dtype in DTYPES:
        for name, arguments in inputs.CASES["append_attention"](dtype):
            assert arguments["keys"].isnan().any() or "ring" in name
            out = kernel_of("append_attention", arguments).op(**copy.deepcopy(arguments))
            assert not out.isnan().any(), name


def test_padding_rows_are_zeros() -> None:
    arguments = inputs.step(torch.bfloat16, tokens=5, lengths=[9, 40], counts=[2, 0], sinks=True)
    out = kernel_of("append_attention", arguments).op(**arguments)
    assert out[0, :2].abs().sum() > 0
    assert not out[0, 2:].any() and not out[1].any()


def test_bad_arguments_raise_and_do_not_crash() -> None:
    arguments = inputs.step(torch.float32, tokens=2, lengths=[3])
    op = kernel_of("append_attention", arguments).op
    with pytest.raises(RuntimeError, match="lengths"):
        op(**{**arguments, "lengths": torch.tensor([3, 4])})
    with pytest.raises(RuntimeError, match="appends"):
        op(**{**arguments, "counts": torch.tensor([5])})
    with pytest.raises(RuntimeError, match="do not fit"):
        op(**{**arguments, "q": arguments["q"][:, :5]})
    weight = torch.randn(40, 9)
    with pytest.raises(RuntimeError, match="does not take"):
        kernel_of("linear", dict(x=torch.randn(2, 9), weight=weight)).op(torch.randn(2, 8), weight)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts_that_are_not_chosen_and_padding_of_weights_do_not_show(
    dtype: torch.dtype, transposed: bool
) -> None:
    k, n = 33, 21
    sizes = (k, n) if transposed else (n, k)
    store = torch.full((4, sizes[0] + 3, sizes[1] + 7), torch.nan, dtype=dtype)
    weight = store[:, 1 : 1 + sizes[0], 2 : 2 + sizes[1]]
    weight[[0, 3]] = inputs.randn(2, *sizes, dtype=dtype, scale=0.1)
    bias = torch.full((4, n + 5), torch.nan, dtype=dtype)[:, 3 : 3 + n]
    bias[[0, 3]] = inputs.randn(2, n, dtype=dtype)
    x = torch.full((5, 4, k + 9), torch.nan, dtype=dtype)[:, 1:3, 4 : 4 + k]
    x.copy_(inputs.randn(5, 2, k, dtype=dtype))
    index = torch.tensor([[0, 3], [3, 3], [0, 0], [3, 0], [0, 3]])
    arguments = dict(x=x, index=index, weight=weight, bias=bias, transposed=transposed)
    out = kernel_of("routed_linear", arguments).op(**arguments)
    expected = SEMANTIC_OPS["routed_linear"].overload(
        x.double(), index, weight.double(), bias.double(), transposed
    )
    absolute, relative = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), expected, atol=absolute, rtol=relative)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_routed_linear_writes_every_output(dtype: torch.dtype, transposed: bool) -> None:
    """Memory that held NaN before becomes the result whole, and nothing beside it is written."""
    shape = (17, 2, 3, 33, 65)
    arguments = inputs.routed(dtype, shape, transposed, True, False)
    op = kernel_of("routed_linear", arguments).op
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # torch.empty gives NaN
    try:
        assert torch.empty(3, dtype=dtype).isnan().all()
        out = op(**arguments)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before
    assert not out.isnan().any()


def test_bad_routes_raise_and_do_not_crash() -> None:
    arguments = inputs.routed(torch.float32, (3, 2, 4, 16, 8), False, True, False)
    op = kernel_of("routed_linear", arguments).op
    for number in (-1, 4, 2**40):
        index = arguments["index"].clone()
        index[1, 1] = number
        with pytest.raises(RuntimeError, match=f"row 1 chose expert {number} of 4"):
            op(**{**arguments, "index": index})
    with pytest.raises(RuntimeError, match="index is Int"):
        op(**{**arguments, "index": arguments["index"].int()})
    for name, other, said in (
        ("x", torch.zeros(3, 2, 15), "do not take"),
        ("x", torch.zeros(3, 3, 16), "do not take"),
        ("x", torch.zeros(4, 2, 16), "do not take"),
        ("bias", torch.zeros(4, 7), "bias"),
        ("weight", arguments["weight"].transpose(1, 2).contiguous().transpose(1, 2), "row-major"),
        ("weight", arguments["weight"].bfloat16(), "weight is"),
    ):
        with pytest.raises(RuntimeError, match=said):
            op(**{**arguments, name: other})
    turned = arguments["x"].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(op(**{**arguments, "x": turned}), op(**arguments))


def test_no_rows_to_route() -> None:
    for transposed in (False, True):
        arguments = inputs.routed(torch.float32, (0, 2, 4, 16, 8), transposed, True, False)
        assert kernel_of("routed_linear", arguments).op(**arguments).shape == (0, 2, 8)
