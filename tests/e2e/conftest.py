"""Fixtures of the end-to-end tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo

from graphwright.optimizer import backend
from graphwright.runtime.model import OptimizedModel
from graphwright.runtime.program import Program
from tests.e2e.fake_program import ReferenceProgram, tiny_model
from tests.e2e.graph_stand_in import PACKED, PLAIN, Make
from tests.e2e.packed_programs import PackedModel, full_model, windowed_model

# What the generation tests run on: "real" compiles with graphwright.optimize, "fake" recomputes.
PROGRAMS = ["real"]


@pytest.fixture(scope="session", params=["llama", "gpt2"])
def stock(request: pytest.FixtureRequest) -> Any:
    """A tiny stock model."""
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def llama() -> Any:
    """A tiny stock Llama."""
    return tiny_model("llama")


@pytest.fixture(scope="session")
def compiled() -> dict[int, Any]:
    """Compiled programs by the identity of their stock model: compiling is slow, models are session-wide."""
    return {}


@pytest.fixture(params=PROGRAMS)
def make_fast(request: pytest.FixtureRequest, compiled: dict[int, Any]) -> Callable[..., OptimizedModel]:
    """``make_fast(model, speculation=None, capacity=None)``: the optimized model of a stock one."""

    def make(model: Any, **options: Any) -> OptimizedModel:
        if request.param == "real":
            from graphwright import optimize

            if id(model) not in compiled:
                compiled[id(model)] = (model, optimize(model, passes=["place_cache"]).program)
            _, program = compiled[id(model)]  # with the model kept alive, its id stays its own
        else:
            program = ReferenceProgram(model)
        config, generation = model.config, model.generation_config
        return OptimizedModel(program, config=config, generation_config=generation, **options)

    return make


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """dynamo without what it compiled before, and nothing left of this test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def op_by_op(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """The graphs that would have gone to Inductor; they run as they are."""
    handed: list[torch.fx.GraphModule] = []

    def run_as_is(gm: torch.fx.GraphModule, example_inputs: list[Any], patches: dict[str, Any]) -> Any:
        handed.append(gm)
        return gm.forward

    monkeypatch.setattr(backend, "_inductor", run_as_is)
    return handed


@pytest.fixture(scope="module")
def make() -> Make:
    """``make(kind)``: a program without graphs and its stock model."""
    labs: dict[str, PackedModel] = {}
    programs: dict[str, Program] = {}

    def build(kind: str) -> tuple[Program, Any]:
        of = "windowed" if "windowed" in kind else "full"
        if of not in labs:
            labs[of] = PackedModel(windowed_model() if of == "windowed" else full_model())
        if kind not in programs:
            made = labs[of].program(PACKED if "packed" in kind else PLAIN).program
            assert isinstance(made, Program)
            programs[kind] = made
        return programs[kind], labs[of].model

    return build
