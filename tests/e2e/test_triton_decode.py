"""Whole programs on Triton's kernels, in its interpreter: a decode step as a GPU runs it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphwright.cost_model.workload import Workload
from graphwright.kernels import registry
from graphwright.optimizer.tuning import tune_program
from graphwright.runtime.lowering import kernels
from tests.architectures import tiny_model
from tests.e2e.packed_programs import (
    PAGE,
    PackedModel,
    drafting,
    full_model,
    random_text,
    repetitive_prompts,
    windowed_model,
)

pytest.importorskip("triton")
PLACE = "place_cache{cut=kv}"
PACK = f"quantize_cache{{codec=combined,bits=4,page={PAGE}}}"
NEW = 5
#: Slow in the interpreter; one test of programs is enough beside those of the kernels.
SLOW = {"linear", "linear_group"}


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> set[str]:
    """Every op that Triton has a kernel for runs on it, but slow ones; which did."""
    known = {k.op_name for k in registry.kernels() if k.provider == "triton"}
    known -= getattr(request, "param", SLOW)
    ran: set[str] = set()

    def select(name: str, device: Any, **arguments: Any) -> registry.Kernel:
        found = registry.select(name, device, "triton" if name in known else None, **arguments)
        ran.update({name} if found.provider == "triton" else set())
        return found

    monkeypatch.setattr(kernels, "select", select)
    return ran


def generate(program: Any, lengths: list[int], new: int = NEW) -> torch.Tensor:
    ids, mask = repetitive_prompts(lengths)
    return program.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)


@pytest.mark.parametrize("on_triton", [set()], indirect=True, ids=["all"])
def test_everything_a_decoder_needs(on_triton: set[str]) -> None:
    model = PackedModel(full_model())
    ids, _ = repetitive_prompts([9])
    stock = model.model.generate(ids, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(generate(model.program([PLACE]), [9]), stock)
    assert on_triton >= {"linear", "linear_group", "rotary_append", "cache_attention"}


@pytest.mark.parametrize(("make", "passes", "expected"), [
    (windowed_model, [PLACE, PACK], {"rotary_append", "packed_attention"}),
    (lambda: tiny_model("glm4"), [PLACE], {"append_attention"}),
    (lambda: tiny_model("mixtral"), [PLACE], {"routed_linear", "cache_attention"}),
    (lambda: tiny_model("gpt_oss"), [PLACE], {"routed_linear", "cache_attention"}),
], ids=["packed windows", "partial rotary", "experts", "sinks"])  # fmt: skip
def test_tokens_are_the_cpu_programs(
    make: Any, passes: list[str], expected: set[str], request: pytest.FixtureRequest
) -> None:
    model = PackedModel(make())
    reference = generate(model.program(passes), [22, 41])
    ran = request.getfixturevalue("on_triton")
    assert torch.equal(generate(model.program(passes), [22, 41]), reference)
    assert expected <= ran, ran


@pytest.mark.parametrize("passes", [[PLACE], [PLACE, PACK]], ids=["plain", "packed"])
def test_drafts_change_no_token(passes: list[str], on_triton: set[str]) -> None:
    program = PackedModel(full_model()).program(passes)
    without = generate(program, [44], new=10)
    program.speculation = drafting()
    assert torch.equal(generate(program, [44], new=10), without)
    assert program.stats()["accepted"] > 0


def test_a_program_is_tuned_once(on_triton: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """The fastest configuration is kept, and used by the next process too."""
    monkeypatch.setenv("GRAPHWRIGHT_CACHE_DIR", str(tmp_path))
    program = PackedModel(full_model()).program([PLACE])
    timed: list[float] = []

    def timer(call: Any) -> float:
        call()
        timed.append(1.0 / (1 + len(timed)))  # each candidate is faster than the one before
        return timed[-1]

    workload = Workload(prompt=24, generate=8)
    chosen = tune_program(program.program, workload, timer)
    assert len(chosen) == 1 and len(timed) > 1
    before = len(timed)
    assert tune_program(program.program, workload, timer) == chosen
    assert len(timed) == before
    assert program.forward(random_text(1, 5)).logits.isfinite().all()


def test_a_program_without_its_kernels_is_not_tuned() -> None:
    def timer(call: Any) -> float:
        raise AssertionError("nothing to time")

    assert tune_program(PackedModel(full_model()).program([PLACE]).program, Workload(), timer) == {}
