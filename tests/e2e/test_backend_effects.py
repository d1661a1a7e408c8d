"""``torch.compile(backend="graphwright")``: writes in place, aliases, effects and errors.

The rewritten graphs run op by op, as in ``test_backend.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn

import graphwright as gw
from graphwright.optimizer import backend
from graphwright.optimizer.report import Report, Status
from tests.e2e.backend_support import Mlp, fallbacks

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

LINEAR = nn.Linear(8, 8).requires_grad_(False)


def write(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x.add_(1)
    x[0] = 3
    return x, LINEAR(x)


def write_through_a_view(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x[1:].mul_(2)
    return (LINEAR(x),)


def view_and_copies(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = LINEAR(x)
    return x.view(-1), x.clone(), x.clone().view(-1), y, y.view(-1), y.clone()


def constant_inside(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (LINEAR(x) + torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8]),)


def graph_break(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = LINEAR(x)
    torch._dynamo.graph_break()
    return (LINEAR(y),)


def view_of_a_written_input(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x.add_(1)
    return x[1:], LINEAR(x)


def autocast_inside(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return (LINEAR(x),)


def branch(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (torch.cond(x.sum() > 0, lambda a: a + 1, lambda a: a - 1, (LINEAR(x),)),)


def assertion(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    torch._assert_async(x.sum() < 1e9)
    return (LINEAR(x),)


def shared_memory(outputs: tuple[torch.Tensor, ...], x: torch.Tensor) -> list[list[bool]]:
    pointers = [t.untyped_storage().data_ptr() for t in (x, *outputs)]
    return [[a == b for b in pointers] for a in pointers]


def run_both(function: Callable[..., Any], x: torch.Tensor) -> Report:
    """Compare results, the input's new value and shared memory with eager execution."""
    eager_x, compiled_x = x.clone(), x.clone()
    compiled = torch.compile(function, backend="graphwright")
    with torch.no_grad():
        expected, got = function(eager_x), compiled(compiled_x)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(compiled_x, eager_x)
    assert shared_memory(got, compiled_x) == shared_memory(expected, eager_x)
    return gw.report(compiled)


@pytest.mark.parametrize(
    "function", [write, write_through_a_view, view_and_copies, constant_inside, graph_break]
)
def test_writes_and_aliases_are_kept(function: Callable[..., Any], op_by_op: list[Any]) -> None:
    report = run_both(function, torch.randn(2, 8))
    assert not fallbacks(report)
    assert report.ops == {"linear": 2 if function is graph_break else 1}


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (view_of_a_written_input, "view of the written"),
        (autocast_inside, "autocast inside"),
        (branch, "submodule"),
        (assertion, "_assert_async"),
    ],
)
def test_what_cannot_be_carried_falls_back_with_its_reason(
    function: Callable[..., Any], reason: str, op_by_op: list[Any]
) -> None:
    report = run_both(function, torch.randn(2, 8))
    assert len(fallbacks(report)) == 1 and reason in fallbacks(report)[0]
    assert report.ops == {} and report.kernels == []


def test_buffers_are_updated(op_by_op: list[torch.fx.GraphModule]) -> None:
    model, reference = (nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).train() for _ in range(2))
    reference.load_state_dict(model.state_dict())
    x = torch.randn(5, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="graphwright")(x), reference(x))
    for ours, theirs in zip(model.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert model[1].num_batches_tracked == 1


def test_autocast_around_falls_back(op_by_op: list[torch.fx.GraphModule]) -> None:
    compiled = torch.compile(LINEAR, backend="graphwright")
    x = torch.randn(2, 8)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(x), LINEAR(x))
    assert "autocast is on" in fallbacks(gw.report(compiled))[0]


def test_an_error_in_a_pass_falls_back(op_by_op: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Any) -> None:
        raise ValueError("a bug of ours\nwith details")

    monkeypatch.setattr(backend, "canonicalize", broken)
    model, x = Mlp(), torch.randn(2, 16)
    compiled = torch.compile(model, backend="graphwright")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    assert fallbacks(gw.report(compiled)) == [
        "ValueError: a bug of ours: Inductor compiles the graph untouched"
    ]


def test_an_error_in_inductor_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[torch.fx.GraphModule] = []

    def refuses_the_first(
        gm: torch.fx.GraphModule, example_inputs: list[Any], patches: dict[str, Any]
    ) -> Any:
        handed.append(gm)
        if len(handed) == 1:
            raise RuntimeError("no such lowering")
        return gm.forward

    monkeypatch.setattr(backend, "_inductor", refuses_the_first)
    model, x = Mlp(), torch.randn(2, 16)
    compiled = torch.compile(model, backend="graphwright")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    assert "torch.ops" in handed[0].code and "torch.ops" not in handed[1].code
    report = gw.report(compiled)
    assert "no such lowering" in fallbacks(report)[0] and report.kernels == []


def test_options_of_torch_compile_reach_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def note(gm: torch.fx.GraphModule, example_inputs: list[Any], patches: dict[str, Any]) -> Any:
        seen.append(patches)
        return gm.forward

    monkeypatch.setattr(backend, "_inductor", note)
    x = torch.randn(2, 16)
    with torch.inference_mode():
        torch.compile(Mlp(), backend="graphwright", options={"epilogue_fusion": False})(x)
        torch.compile(Mlp(), backend="graphwright", mode="max-autotune-no-cudagraphs")(x)
    assert seen[0] == {"epilogue_fusion": False}
    assert seen[1]["max_autotune"] is True


def test_a_graph_without_our_ops_is_left_alone(op_by_op: list[torch.fx.GraphModule]) -> None:
    compiled = torch.compile(lambda x: x * 2 + 1, backend="graphwright")
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 3.0))
    report = gw.report(compiled)
    assert [d.status for d in report.decisions] == [Status.NOT_FOUND]
    assert "torch.ops" not in op_by_op[0].code  # dynamo's graph, not ours
