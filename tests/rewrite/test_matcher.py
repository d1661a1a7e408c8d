"""The pattern language."""

from __future__ import annotations

import torch
from torch import nn

from graphwright.ir.matcher import add, call, capture, casts, either, find, mul, scalar, square
from tests.rewrite.small_graphs import small_graph


class Function(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs):  # type: ignore[no-untyped-def]
        return self.function(*inputs)


def matches(function, pattern, *, count: int = 1):
    inputs = [torch.randn(2, 3, 4) for _ in range(count)]
    return list(find(small_graph(Function(function), *inputs), pattern))


X, Y = capture("x"), capture("y")


def test_commutative_operands_match_in_either_order() -> None:
    pattern = mul(call("neg", X), Y)
    for function in (lambda a, b: -a * b, lambda a, b: b * -a):
        (match,) = matches(function, pattern, count=2)
        assert match["x"].name == "x" and match["y"].name == "x_1"


def test_subtraction_does_not_commute() -> None:
    pattern = call("sub", call("neg", X), Y)
    assert len(matches(lambda a, b: -a - b, pattern, count=2)) == 1
    assert matches(lambda a, b: b - -a, pattern, count=2) == []


def test_a_capture_that_occurs_twice_is_one_node() -> None:
    assert len(matches(lambda a, b: a * a, mul(X, X), count=2)) == 1
    assert matches(lambda a, b: a * b, mul(X, X), count=2) == []


def test_backtracking_finds_the_consistent_choice() -> None:
    pattern = add(mul(X, Y), call("neg", X))
    (match,) = matches(lambda a, b: a * b + -b, pattern, count=2)
    assert match["x"].name == "x_1" and match["y"].name == "x"


def test_scalars_bind_and_compare() -> None:
    (match,) = matches(lambda a: 3 * a + 0.5, add(mul(X, scalar(equals=3)), scalar("shift")))
    assert match["shift"] == 0.5
    assert matches(lambda a: 4 * a + 0.5, add(mul(X, scalar(equals=3)), scalar("shift"))) == []


def test_alpha_is_not_addition() -> None:
    assert matches(lambda a, b: torch.add(a, b, alpha=2), add(X, Y), count=2) == []


def test_alternatives() -> None:
    for function in (lambda a: a * a, lambda a: a**2, torch.square):
        assert len(matches(function, square(X))) == 1
    assert matches(lambda a: a**3, square(X)) == []
    assert len(matches(torch.sqrt, either(call("neg", X), call("sqrt", X)))) == 1


def test_casts_are_optional() -> None:
    pattern = call("neg", casts(call("sqrt", X)))
    assert len(matches(lambda a: -a.sqrt(), pattern)) == 1
    (match,) = matches(lambda a: -(a.sqrt().double().half()), pattern)
    assert len(match.nodes) == 4


def test_last_match_wins_over_the_ones_inside_it() -> None:
    found = matches(lambda a: a.neg().neg().neg(), call("neg", call("neg", X)))
    assert len(found) == 1 and not found[0].root.users.keys() & found[0].nodes


def test_sharing_rule() -> None:
    pattern = call("neg", casts(call("sqrt", X)))
    (free,) = matches(lambda a: -(a.sqrt()), pattern)
    assert free.refusal() is None
    (shared,) = matches(lambda a: (lambda r: (-r, r + 1))(a.sqrt()), pattern)
    assert "also read by add" in (shared.refusal() or "")
    (cast,) = matches(lambda a: (lambda r: (-r, r.exp()))(a.double()), call("neg", casts(X)))
    assert cast.refusal() is None  # a cast may be shared


def test_conditions_choose_among_ways_to_match() -> None:
    graph = small_graph(Function(lambda a: -(a.double())), torch.randn(2, 3, 4))
    pattern = call("neg", casts(X))
    (match,) = find(graph, pattern, lambda m: m["x"].op == "placeholder")
    assert match["x"].name == "x"
