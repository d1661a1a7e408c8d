import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.cost_model import B, C, Cost, T

POLYNOMIALS = st.builds(lambda a, b, c: a + b * B * T + c * B * C, *(st.integers(0, 10**6) for _ in range(3)))
COSTS = st.builds(
    lambda f, g, r, s, w, n: Cost({"bfloat16": f, "float32": g}, {"weights": r, "cache": s}, {"cache": w}, n),
    *(POLYNOMIALS for _ in range(5)),
    st.integers(0, 9),
)
POINT = st.fixed_dictionaries(
    {"batch": st.integers(1, 64), "context": st.integers(0, 10**5), "tokens": st.integers(1, 64)}
)


def numbers(cost, point):
    values = cost.at(**point)
    return (values.total_flops, values.bytes_read, values.bytes_written, values.launches)


@settings(max_examples=40, deadline=None)
@given(COSTS, COSTS, POINT)
def test_costs_add(one, two, point):
    added = numbers(one + two, point)
    assert added == pytest.approx(
        [a + b for a, b in zip(numbers(one, point), numbers(two, point), strict=True)]
    )
    assert added == numbers(two + one, point)
    assert all(number >= 0 for number in added)


@settings(max_examples=25, deadline=None)
@given(COSTS, st.integers(0, 50), POINT)
def test_scaling_is_repeated_addition(cost, times, point):
    assert numbers(times * cost, point) == pytest.approx(numbers(sum([cost] * times, Cost()), point))
    assert numbers(cost * times, point) == numbers(times * cost, point)


def test_zero_parts_vanish_and_costs_compare():
    assert Cost({"float32": 0}) == Cost()
    assert Cost({"float32": 2 * B}) == Cost({"float32": B}) + Cost({"float32": B})
    assert Cost({"float32": B}) != Cost({"bfloat16": B})


def test_a_cost_cannot_be_changed():
    cost = Cost({"float32": B})
    with pytest.raises(TypeError):
        cost.flops["float32"] = T
    with pytest.raises(AttributeError):
        cost.launches = 3


def test_substitution_prints_as_an_expression():
    cost = Cost({"bfloat16": 2 * B * T * (C + T)}, {"weights": 100, "cache": B * C}, {"cache": B * T}, 7)
    decode = cost.substitute({T: 1})
    assert decode.total_flops.equals(2 * B * (C + 1))
    shown = str(decode)
    assert "bfloat16: 2*B*(C + 1)" in shown
    assert "weights: 100" in shown
    assert "launches 7" in shown


def test_activations_are_kept_apart():
    cost = Cost(read={"weights": 10, "activations": 3 * B}, written={"activations": B, "cache": 5})
    assert cost.bytes_read == 10
    assert cost.bytes_written == 5
    assert cost.activation_bytes == 4 * B
    assert cost.at(batch=2).activation_bytes == 8


def test_a_stray_symbol_is_named():
    with pytest.raises(ValueError, match="Z"):
        Cost({"float32": sympy.Symbol("Z")}).at()
