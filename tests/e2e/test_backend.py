"""``torch.compile(backend="graphwright")``: results, writes in place, fallbacks and the report.

Most tests let the rewritten graph run op by op instead of compiling it with Inductor: what the backend
does to a graph is the same, and a test takes a second instead of ten. A few compile for real.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import torch._dynamo
from torch import nn
from transformers import StaticCache

import graphwright as gw
from graphwright.optimizer.backend_lowering import rows
from graphwright.optimizer.capture import register_implementations
from graphwright.optimizer.report import SCHEMA_FILE, Report, Status
from tests.architectures import VOCAB, tiny_model
from tests.e2e.backend_support import Mlp, fallbacks

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

ROOT = Path(__file__).resolve().parents[2]


def decode(model: Any, step: Callable[..., Any], tokens: int = 5) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Greedy tokens, their logits and the cache of a manual loop over a static cache."""
    cache = StaticCache(config=model.config, max_cache_len=32)
    ids = torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(1))
    found, logits = [], []
    with torch.no_grad():
        for _ in range(tokens):
            last = step(ids, past_key_values=cache).logits[:, -1]
            logits.append(last)
            ids = last.argmax(-1, keepdim=True)
            found.append(ids)
    return torch.cat(found, 1), torch.stack(logits, 1), cache


# --- found by name, compiled for real ------------------------------------------------------------


def test_entry_point_is_found_without_importing_graphwright() -> None:
    script = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "f = torch.nn.Linear(8, 8); x = torch.ones(2, 8)\n"
        "assert 'graphwright' in torch._dynamo.list_backends() and 'graphwright' not in sys.modules\n"
        "with torch.no_grad():\n"
        "    c = torch.compile(f, backend='graphwright')\n"
        "    torch.testing.assert_close(c(x), f(x))\n"
        "import graphwright\n"
        "print(graphwright.report(c).ops)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "{'linear': 1}"


@pytest.mark.slow
def test_static_cache_prefill_and_decode_equal_eager() -> None:
    model = tiny_model("llama", layers=1)
    compiled = torch.compile(model, backend="graphwright")
    tokens, logits, cache = decode(model, model)
    got_tokens, got_logits, got_cache = decode(model, compiled)
    assert torch.equal(tokens, got_tokens)
    torch.testing.assert_close(got_logits, logits, atol=1e-5, rtol=1e-4)
    for ours, theirs in zip(got_cache.layers, cache.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours.values, theirs.values, atol=1e-5, rtol=1e-4)
    report = gw.report(compiled)
    assert not fallbacks(report)
    assert report.ops == {"rms_norm": 6, "rotary": 4, "linear": 10, "gated_mlp": 2}  # prefill and decode
    assert any("the mask is a tensor" in text for text in report.near_misses)


@pytest.mark.slow
def test_gradients_go_to_inductor_untouched_and_train() -> None:
    torch.manual_seed(3)
    model, x = Mlp(), torch.randn(4, 16)
    expected = torch.autograd.grad(model(x).pow(2).sum(), list(model.parameters()))
    compiled = torch.compile(model, backend="graphwright")
    compiled(x).pow(2).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4, rtol=1e-4)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    report = gw.report(compiled)
    assert [d.pass_name for d in report.decisions] == ["gradients"]
    assert "gradients are enabled" in fallbacks(report)[0] and report.ops == {}


# --- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "deepseek_v3"])
def test_static_cache_of_other_architectures(name: str, op_by_op: list[torch.fx.GraphModule]) -> None:
    model = tiny_model(name)
    compiled = torch.compile(model, backend="graphwright")
    tokens, logits, _ = decode(model, model, tokens=3)
    got_tokens, got_logits, _ = decode(model, compiled, tokens=3)
    assert torch.equal(tokens, got_tokens)
    torch.testing.assert_close(got_logits, logits, atol=1e-5, rtol=1e-4)
    report = gw.report(compiled)
    # GPT-2 stores its matrices transposed, which the linear kernel does not take: the only fallback.
    expected = {"kernel{op=linear}"} if name == "gpt2" else set()
    assert {d.pass_name for d in report.by_status(Status.FALLBACK)} == expected
    assert report.ops["linear"] >= 10


def test_generate_with_a_compiled_forward(op_by_op: list[torch.fx.GraphModule]) -> None:
    model = tiny_model("llama")
    ids = torch.randint(3, VOCAB, (1, 5))
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(ids, **options)
    model.forward = torch.compile(model.forward, backend="graphwright")
    assert torch.equal(model.generate(ids, **options), expected)
    assert gw.report(model.forward).ops == gw.report(model).ops
    assert gw.report(model).ops["gated_mlp"] >= 4


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_prepared_model_runs_the_attention_op(name: str, op_by_op: list[torch.fx.GraphModule]) -> None:
    model = tiny_model(name)
    ids = torch.randint(3, VOCAB, (2, 20))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        register_implementations()
        model.set_attn_implementation("graphwright")
        compiled = torch.compile(model, backend="graphwright")
        got = compiled(ids, use_cache=False).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    report = gw.report(compiled)
    assert report.ops["attention"] == 2 and not fallbacks(report)
    # Llama's attention becomes the library's fused call; Gemma2's softcap has none and is written out.
    targets = [str(n.target) for n in op_by_op[0].graph.nodes]
    assert targets.count("aten.scaled_dot_product_attention.default") == (2 if name == "llama" else 0)
    assert not any(t.startswith("graphwright.") for t in targets)


def test_dynamic_shapes_need_one_graph(op_by_op: list[torch.fx.GraphModule]) -> None:
    model = Mlp()
    compiled = torch.compile(model, backend="graphwright", dynamic=True)
    with torch.no_grad():
        for count in (3, 7, 100):
            x = torch.randn(count, 16)
            torch.testing.assert_close(compiled(x), model(x))
    assert len(op_by_op) == 1
    assert gw.report(compiled).ops == {"layer_norm": 1, "mlp": 1}


class Scaled(nn.Module):
    """Reads a setting of its own, and a number that the caller passes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(16, 16), 0.3

    def forward(self, x: torch.Tensor, shift: float | None = None) -> torch.Tensor:
        scaled = self.linear(x) * self.scale
        return scaled if shift is None else scaled + shift


def test_settings_of_modules_are_constants_and_guarded(op_by_op: list[torch.fx.GraphModule]) -> None:
    model, x = Scaled(), torch.randn(3, 16)
    compiled = torch.compile(model, backend="graphwright", dynamic=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        assert not fallbacks(gw.report(compiled))
        model.scale = 0.7
        torch.testing.assert_close(compiled(x), model(x))


def test_numbers_that_callers_pass_stay_inputs(op_by_op: list[torch.fx.GraphModule]) -> None:
    model, x = Scaled(), torch.randn(3, 16)
    compiled = torch.compile(model, backend="graphwright", dynamic=True)
    with torch.no_grad():
        for shift in (0.5, 1.5, 2.5):
            torch.testing.assert_close(compiled(x, shift), model(x, shift))
    assert len(op_by_op) == 1
    assert "is an input of the graph" in fallbacks(gw.report(compiled))[0]


def test_static_shapes_recompile_and_merge_into_one_report(op_by_op: list[torch.fx.GraphModule]) -> None:
    model = Mlp()
    compiled = torch.compile(model, backend="graphwright", dynamic=False)
    with torch.no_grad():
        for count in (3, 100):
            x = torch.randn(count, 16)
            torch.testing.assert_close(compiled(x), model(x))
    report = gw.report(compiled)
    assert report.ops == {"layer_norm": 2, "mlp": 2}
    assert {d.site.split(" (")[0] for d in report.decisions} == {"graph 0", "graph 1"}
    [unprofitable] = report.by_status(Status.UNPROFITABLE)  # 100 rows are the library's
    assert "graph 1" in unprofitable.site and "64 rows" in unprofitable.reason


def test_a_dtype_without_kernels_falls_back(op_by_op: list[torch.fx.GraphModule]) -> None:
    model, x = Mlp().double(), torch.randn(2, 16, dtype=torch.float64)
    compiled = torch.compile(model, backend="graphwright")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    report = gw.report(compiled)
    assert report.ops == {"layer_norm": 1, "mlp": 1}
    assert "torch.float64 is not float32 or bfloat16" in fallbacks(report)[0]
    assert [k["provider"] for k in report.kernels] == ["inductor"]


def test_rows_of_a_symbolic_batch() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    assert rows(torch.empty(3, 5, 8)) == (15, 15)
    context = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC, DimDynamic.STATIC])
    mode = FakeTensorMode(shape_env=ShapeEnv())
    least, most = rows(mode.from_tensor(torch.empty(3, 5, 8), symbolic_context=context))
    assert least <= 15 and most is None


# --- the report ------------------------------------------------------------------------------------


def test_report_is_valid_and_complete(op_by_op: list[torch.fx.GraphModule]) -> None:
    model = Mlp().eval()
    compiled = torch.compile(model, backend="graphwright")
    with torch.no_grad():
        compiled(torch.randn(2, 16))
    report = gw.report(compiled)
    jsonschema.validate(json.loads(report.to_json()), json.loads(SCHEMA_FILE.read_text()))
    assert Report.from_json(report.to_json()).to_dict() == report.to_dict()
    assert report.model == "Mlp, 1,632 parameters, float32"
    assert {k["op"] for k in report.kernels} == {"linear"}
    assert "aten.gelu" in report.code_before and "graphwright.mlp" in report.code_after
    assert {"torch", "graphwright"} <= set(report.versions)
    assert {"capture", "canonicalize", "lower", "inductor"} <= set(report.measured["seconds"])
    assert "canonicalize{op=mlp}" in str(report)


def test_reports_of_two_models_stay_apart(op_by_op: list[torch.fx.GraphModule]) -> None:
    first, second = Mlp(), nn.Sequential(Mlp(), nn.Linear(16, 4))
    with torch.no_grad():
        compiled = [torch.compile(m, backend="graphwright") for m in (first, second)]
        for step in compiled:
            step(torch.randn(2, 16))
    assert gw.report(compiled[0]).ops == {"layer_norm": 1, "mlp": 1}
    assert gw.report(compiled[1]).ops == {"layer_norm": 1, "mlp": 1, "linear": 1}
    assert gw.report(second).ops == gw.report(compiled[1]).ops


def test_a_module_compiled_in_place_has_a_report(op_by_op: list[torch.fx.GraphModule]) -> None:
    model = Mlp()
    model.compile(backend="graphwright")
    with torch.no_grad():
        model(torch.randn(2, 16))
    assert gw.report(model).ops == {"layer_norm": 1, "mlp": 1}


@pytest.mark.parametrize(
    "make", [lambda: torch.compile(Mlp(), backend="graphwright"), lambda: Mlp(), lambda: print, lambda: 3]
)
def test_no_report_before_anything_was_compiled(make: Callable[[], Any]) -> None:
    with pytest.raises(gw.GraphwrightError, match="has compiled no graph") as caught:
        gw.report(make())
    assert 'backend="graphwright"' in str(caught.value)


def test_another_backend_has_no_report() -> None:
    compiled = torch.compile(Mlp(), backend="eager")
    compiled(torch.randn(2, 16))
    with pytest.raises(gw.GraphwrightError, match="has compiled no graph"):
        gw.report(compiled)


def test_records_keep_nothing_alive(op_by_op: list[torch.fx.GraphModule]) -> None:
    from graphwright.optimizer import backend_records

    model = Mlp()
    with torch.no_grad():
        torch.compile(model, backend="graphwright")(torch.randn(2, 16))
    [record] = backend_records.recall(model)
    op_by_op.clear()
    del model
    torch._dynamo.reset()
    gc.collect()
    assert not record.alive() and all(ref() is None for ref in record.tensors)
