"""Canonicalization of small modules: other spellings, near misses, cleanup, the order of raisers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphwright.ir.canonicalize import RAISERS, canonicalize, in_order
from graphwright.ir.errors import PassError
from graphwright.ir.graph import argument
from graphwright.ir.verifier import verify
from tests.rewrite.small_graphs import run, small_graph

WIDTH = 16


def vector(size: int = WIDTH) -> nn.Parameter:
    return nn.Parameter(torch.randn(size))


class Function(nn.Module):
    """A function of x with three linears, a second pair and a vector at hand."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.up, self.gate = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24)
        self.down = nn.Linear(24, WIDTH)
        self.packed = nn.Linear(WIDTH, 48)
        self.weight, self.square = vector(), nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def canonical(function, dtype: torch.dtype = torch.float32, tolerance: float = 1e-6):
    """Canonicalize a function of x; its result must stay the same."""
    module = Function(function).to(dtype)
    graph = small_graph(module, torch.randn(2, 3, WIDTH, dtype=dtype))
    report = canonicalize(graph)
    verify(graph, deep=True)
    x = torch.randn(4, 5, WIDTH, dtype=dtype)
    with torch.no_grad():
        expected = module(x)
    torch.testing.assert_close(run(graph, x)[0], expected, rtol=tolerance, atol=tolerance)
    return graph, report


def reasons(report, op: str) -> list[str]:
    return [miss.reason for miss in report.near_misses if miss.op == op]


# --- RMS norm ------------------------------------------------------------------------------------------


def mean_square(x):
    return x.pow(2).mean(-1, keepdim=True) + 1e-5


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.weight * (x * torch.rsqrt(mean_square(x))),
        lambda m, x: (torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * x) * m.weight,
        lambda m, x: x / torch.sqrt(1e-5 + x.square().mean(-1, keepdim=True)) * m.weight,
        lambda m, x: x * (mean_square(x) ** -0.5) * m.weight,
        lambda m, x: x * (1 / mean_square(x).sqrt()) * m.weight,
    ],
)
def test_rms_norm_in_any_spelling(function) -> None:
    _, report = canonical(function)
    assert report.counts == {"rms_norm": 1}


def test_rms_norm_with_an_offset() -> None:
    graph, report = canonical(lambda m, x: x * torch.rsqrt(mean_square(x)) * (1.5 + m.weight))
    assert report.counts == {"rms_norm": 1}
    assert argument(graph.calls("rms_norm")[0], "offset") == 1.5


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x: x * torch.rsqrt(mean_square(x)), "without a weight multiplication"),
        (lambda m, x: x * torch.rsqrt(mean_square(x)) * m.square[:3, :1].sum(), "is not a vector of 16"),
        (lambda m, x: m.weight * torch.rsqrt(mean_square(x)), "does not scale x itself"),
    ],
)
def test_rms_norm_near_misses(function, reason: str) -> None:
    _, report = canonical(function)
    assert "rms_norm" not in report.counts
    (found,) = reasons(report, "rms_norm")
    assert reason in found


def test_rms_norm_with_statistics_in_bfloat16_stays() -> None:
    _, report = canonical(lambda m, x: x * torch.rsqrt(mean_square(x)) * m.weight, torch.bfloat16)
    assert report.counts == {}
    assert "bfloat16, not in float32" in reasons(report, "rms_norm")[0]


def test_a_norm_whose_inside_is_read_elsewhere_stays() -> None:
    def function(m, x):
        normed = x * torch.rsqrt(mean_square(x))
        return m.weight * normed + normed

    _, report = canonical(function)
    assert report.counts == {}
    assert "is also read by" in reasons(report, "rms_norm")[0]


# --- linear, MLP ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.up(x),
        lambda m, x: x @ m.square,
        lambda m, x: x @ m.square.t(),
        lambda m, x: torch.addmm(m.weight, x.view(-1, WIDTH), m.square).view(x.shape),
        lambda m, x: torch.mm(x.view(-1, WIDTH), m.square).view(x.shape),
    ],
)
def test_linear_in_any_spelling(function) -> None:
    graph, report = canonical(function, tolerance=1e-5)
    assert report.counts == {"linear": 1}
    assert graph.calls("aten.view.default", "aten.addmm.default", "aten.mm.default") == []


def test_linear_with_a_computed_weight_is_a_near_miss() -> None:
    _, report = canonical(lambda m, x: F.linear(x, m.square * 2), tolerance=1e-5)
    assert report.counts == {}
    assert "is not a parameter" in reasons(report, "linear")[0]


NEW_GELU = 0.7978845608028654


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (F.relu, "relu"),
        (F.gelu, "gelu"),
        (lambda h: h * torch.sigmoid(h), "silu"),
        (lambda h: h.clamp(min=0), "relu"),
        (lambda h: 0.5 * h * (1 + torch.tanh(NEW_GELU * (h + 0.044715 * h.pow(3)))), "gelu_tanh"),
        (lambda h: 0.5 * h * (1 + torch.tanh(h * NEW_GELU * (1 + 0.044715 * h * h))), "gelu_tanh"),
        (lambda h: h * 0.5 * (1 + torch.erf(h / 2**0.5)), "gelu"),
    ],
)
def test_activations_by_what_they_compute(act, name: str) -> None:
    graph, report = canonical(lambda m, x: m.down(act(m.up(x))))
    assert report.counts == {"mlp": 1}
    assert argument(graph.calls("mlp")[0], "activation") == name
    graph, report = canonical(lambda m, x: m.down(m.up(x) * act(m.gate(x))))
    assert report.counts == {"gated_mlp": 1}
    assert argument(graph.calls("gated_mlp")[0], "activation") == name


@pytest.mark.parametrize(
    "act", [torch.tanh, lambda h: h * torch.sigmoid(1.702 * h), lambda h: F.relu(h).square()]
)
def test_other_activations_are_near_misses(act) -> None:
    _, report = canonical(lambda m, x: m.down(act(m.up(x))))
    assert report.counts == {"linear": 2}
    assert "activation" in reasons(report, "mlp")[0]
    _, report = canonical(lambda m, x: m.down(m.up(x) * act(m.gate(x))))
    assert report.counts == {"linear": 3}
    assert "activation" in reasons(report, "gated_mlp")[0]


def test_a_hidden_layer_that_is_read_elsewhere_stays() -> None:
    def function(m, x):
        hidden = m.up(x)
        return m.down(F.silu(hidden)) + hidden.sum(-1, keepdim=True)

    _, report = canonical(function, tolerance=1e-5)
    assert report.counts == {"linear": 2}
    assert "is also read by" in reasons(report, "mlp")[0]


def test_a_factor_between_linears_is_no_activation() -> None:
    _, report = canonical(lambda m, x: m.down(m.up(x) * 0.5))
    assert report.counts == {"linear": 2} and report.near_misses == []


@pytest.mark.parametrize("step", [1, 2])
def test_packed_projections(step: int) -> None:
    def function(m, x):
        both = m.packed(x)
        gate, up = both.chunk(2, dim=-1) if step == 1 else (both[..., ::2], both[..., 1::2])
        return m.down(F.silu(gate) * up)

    graph, report = canonical(function)
    assert report.counts == {"gated_mlp": 1}
    assert len(graph.calls("aten.slice.Tensor")) == 4  # weight and bias of gate and up


# --- rotary --------------------------------------------------------------------------------------------


class Rotary(nn.Module):
    def __init__(self, sign: float = 1.0) -> None:
        super().__init__()
        self.sign = sign

    def forward(self, x, cos, sin):  # type: ignore[no-untyped-def]
        turned = torch.cat((-x[..., 4:], x[..., :4]), dim=-1)
        return turned * sin + x * cos if self.sign > 0 else x * cos - turned * sin


def test_rotary_and_its_near_miss() -> None:
    inputs = [torch.randn(2, 3, 5, 8), torch.randn(2, 1, 5, 8), torch.randn(2, 1, 5, 8)]
    graph = small_graph(Rotary(), *inputs, dynamic=False)
    assert canonicalize(graph).counts == {"rotary": 1}
    assert torch.equal(run(graph, *inputs)[0], Rotary()(*inputs))
    graph = small_graph(Rotary(-1.0), *inputs, dynamic=False)  # turns the other way
    report = canonicalize(graph)
    assert report.counts == {} and [miss.op for miss in report.near_misses] == ["rotary"]
    assert torch.equal(run(graph, *inputs)[0], Rotary(-1.0)(*inputs))


# --- layer norm, cleanup -------------------------------------------------------------------------------


def test_layer_norm_over_two_dimensions_is_a_near_miss() -> None:
    graph = small_graph(nn.LayerNorm((3, WIDTH)), torch.randn(2, 3, WIDTH), dynamic=False)
    report = canonicalize(graph)
    assert report.counts == {} and "2 dimensions" in reasons(report, "layer_norm")[0]


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (lambda m, x: F.dropout(x, 0.5, training=False) + 1, "dropout"),
        (lambda m, x: (x * 1.0) + 1, "factor"),
        (lambda m, x: (x / 1) + 1, "factor"),
        (lambda m, x: x.clone() + 1, "copy"),
        (lambda m, x: x.view(x.shape) + 1, "view"),
        (lambda m, x: torch.cat([x, x[..., WIDTH:]], -1) + 1, "cat"),
    ],
)
def test_cleanup(function, rule: str) -> None:
    graph, report = canonical(function)
    assert rule in report.simplified
    assert [str(n.target) for n in graph.nodes if n.op == "call_function"] == ["aten.add.Tensor"]


def test_a_copy_that_changes_the_layout_stays() -> None:
    graph, _ = canonical(lambda m, x: x.transpose(0, 1).contiguous().view(-1, WIDTH) + 1)
    assert len(graph.calls("aten.clone.default")) == 1


def test_a_view_of_a_result_that_became_contiguous_is_kept_legal() -> None:
    def function(m, x):
        turned = x.transpose(0, 1)
        normed = m.weight * (turned * torch.rsqrt(mean_square(turned)))
        return normed.transpose(0, 1).view(-1, WIDTH)  # a view only as long as the norm keeps strides

    graph, report = canonical(function)
    assert report.counts == {"rms_norm": 1}
    assert len(graph.calls("aten.reshape.default")) == 1


def test_a_gap_in_a_filled_tensor_stays() -> None:
    def function(m, x):
        filled = x.new_zeros(2, 3, 20)
        filled[..., :WIDTH] = x
        return filled

    module = Function(function)
    graph = small_graph(module, torch.randn(2, 3, WIDTH), dynamic=False)
    canonicalize(graph)
    assert len(graph.calls("aten.slice_scatter.default")) == 1
    x = torch.randn(2, 3, WIDTH)
    assert torch.equal(run(graph, x)[0], module(x))


# --- the order of raisers --------------------------------------------------------------------------------


def test_order_follows_the_declared_needs() -> None:
    names = [item.name for item in in_order()]
    for item in RAISERS.values():
        for need in item.after:
            assert names.index(need) < names.index(item.name)
    shuffled = dict(reversed(RAISERS.items()))
    assert [item.name for item in in_order(shuffled)] == names


def test_impossible_orders_are_refused() -> None:
    one = RAISERS["mlp"]
    with pytest.raises(PassError, match="does not exist"):
        in_order({"mlp": dataclasses.replace(one, after=("nothing",))})
    with pytest.raises(PassError, match="need each other"):
        in_order({"mlp": dataclasses.replace(one, after=("mlp",))})
