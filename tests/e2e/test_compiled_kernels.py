"""Plans for a GPU that is not here: the report's kernels, binaries beside the plan, and back."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import graphwright as gw
from graphwright.ir.errors import PlanError
from graphwright.kernels import registry
from graphwright.kernels.triton import ahead
from graphwright.kernels.triton.ahead import CompileError
from graphwright.kernels.triton.launch import Launch
from graphwright.optimizer import compiled_kernels, saved_kernels, saved_plan
from graphwright.optimizer.report import Report, Status
from graphwright.optimizer.saved_kernels import MANIFEST
from tests.architectures import tiny_model

WORKLOAD = gw.Workload(prompt=24, generate=8)


@pytest.fixture(scope="module", autouse=True)
def _cache() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(Path(os.environ["GRAPHWRIGHT_CACHE_DIR"]) / "triton"))
        yield


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_model("llama").to(torch.bfloat16)


@pytest.fixture(scope="module")
def fast(llama: Any) -> Any:
    with pytest.warns(UserWarning) as caught:
        found = gw.optimize(llama, "h100", workload=WORKLOAD, passes=["place_cache", "speculate{tokens=4}"])
    said = [str(w.message) for w in caught if "h100" in str(w.message)]
    assert said == ["graphwright: planned for h100, but the model is on cpu, where the program runs"]
    return found


@pytest.fixture
def saved(fast: Any, tmp_path: Path) -> Path:
    fast.save(tmp_path / "plan")
    return tmp_path / "plan"


def labels(report: Report) -> list[str]:
    return [row["label"] for row in report.compiled["kernels"]]


def test_the_report_names_the_kernels_of_the_target(fast: Any) -> None:
    about = fast.report.compiled
    assert (about["target"], about["arch"]) == ("h100", "sm_90") and about["triton"]
    words = {label.split()[0] for label in labels(fast.report)}
    assert {"attend", "combine", "linear"} <= words
    uses = " ".join(row["ops"] for row in about["kernels"])
    # Two layers: one append and one attention each, in every kind of step.
    for step in ("decode", "verify", "prefill"):
        assert re.search(rf"attention x 2 \([^)]*{step}", uses)
    assert all(row["error"] == "" and row["spill_bytes"] == 0 < row["registers"] for row in about["kernels"])
    assert [row["binary_bytes"] for row in about["kernels"]] == [len(c.binary) for c in fast.compiled.kernels]
    assert [d.reason for d in fast.report.decisions if d.pass_name == "lower"] == [
        "planned for h100, but the model is on cpu, where the program runs"
    ]


def test_every_view_shows_them(fast: Any, tmp_path: Path) -> None:
    title = f"Kernels compiled for h100 (sm_90, Triton {fast.compiled.triton})"
    text, page = fast.report.to_text(width=140), fast.report.to_html()
    assert title in text and title in page
    for label in labels(fast.report):
        assert label in page
    again = Report.from_json(fast.report.to_json())
    assert again.compiled == fast.report.compiled and again.to_text(width=140) == text


def test_the_program_runs_on_this_machine(fast: Any, llama: Any) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was said once
        out = fast.generate(ids, max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 8)


def test_the_registry_is_as_before(fast: Any) -> None:
    provider = next(p for p in registry.providers() if p.name == "triton")
    assert provider.available is not None and provider.available() != (True, "")
    kernel = registry.select("linear", "cpu", x=torch.ones(1, 1, 8), weight=torch.ones(4, 8), bias=None)
    assert kernel.provider != "triton"


def test_sizes_are_the_workloads(llama: Any, fast: Any) -> None:
    """Kernels see the batch and the context of the workload, not of the capture."""
    shapes = []
    record = compiled_kernels.compile_launches

    def spy(launches: list[Launch], arch: str) -> Any:
        shapes.extend(x.arguments["keys"].shape for x in launches if x.label.startswith("attend"))
        return record(launches[:1], arch) * len(launches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled_kernels, "compile_launches", spy)
        target = compiled_kernels.compile_for(
            fast.graph, llama.config, gw_target("h100"), gw.Workload(batch=3, prompt=100, generate=20)
        )
    assert target.note == "" and {(s[0], s[2]) for s in shapes} == {(3, 120)}


def gw_target(name: str) -> Any:
    from graphwright.cost_model.target import resolve_target

    return resolve_target(name)


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss", "deepseek_v3", "qwen3_moe"])
def test_other_architectures_are_traced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transposed weights, sinks and windows, latents, experts; nothing is compiled here."""
    from graphwright.cost_model.workload import Budget
    from graphwright.ir.canonicalize import canonicalize
    from graphwright.optimizer.capture import capture
    from graphwright.optimizer.planner import Request, plan_given

    model = tiny_model(name).to(torch.bfloat16)
    graph = capture(model)
    canonicalize(graph)
    planned = plan_given(graph, ["place_cache"], Request(gw_target("h100"), WORKLOAD, Budget(), None))
    launched: list[Launch] = []

    def none(launches: list[Launch], arch: str) -> list[Any]:
        launched.extend(launches)
        return [ahead.Compiled(x.label, arch) for x in launches]

    monkeypatch.setattr(compiled_kernels, "compile_launches", none)
    found = compiled_kernels.compile_for(planned.graph, model.config, gw_target("h100"), WORKLOAD)
    assert "traced" not in found.note
    words = {launch.label.split()[0] for launch in launched}
    assert "linear" in words
    assert "attend" in words or "append_attention x 2" in found.note  # what has no kernel is said
    assert ("routed" in " ".join(words)) == (name in ("gpt_oss", "deepseek_v3", "qwen3_moe"))
    assert all(not t.is_cpu for x in launched for t in x.arguments.values() if isinstance(t, torch.Tensor))


def test_without_triton_the_report_says_how_to_get_it(
    fast: Any, llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> str:
        raise CompileError("Triton cannot be imported", hint='pip install "graphwright[triton]" on Linux')

    monkeypatch.setattr(compiled_kernels, "triton_version", missing)
    found = compiled_kernels.compile_for(fast.graph, llama.config, gw_target("h100"), WORKLOAD)
    assert found.kernels == () and found.note.endswith('pip install "graphwright[triton]" on Linux')
    (said,) = found.decisions()
    assert said.status is Status.FALLBACK and said.reason == found.note
    report = Report("m", "h100", compiled=found.to_report())
    assert "graphwright[triton]" in report.to_text() and "graphwright[triton]" in report.to_html()
    assert saved_kernels.kernel_files(found) == {}


# --- on disk ---------------------------------------------------------------------------------------


def test_a_saved_plan_ships_the_binaries(fast: Any, saved: Path) -> None:
    manifest = json.loads((saved / MANIFEST).read_text())
    assert (manifest["arch"], manifest["triton"]) == ("sm_90", fast.compiled.triton)
    keys = {made.key: made for made in fast.compiled.kernels}
    assert {entry["key"] for entry in manifest["kernels"]} == keys.keys()
    for entry in manifest["kernels"]:
        made = keys[entry["key"]]
        assert set(entry["files"]) == {f"{made.name}.cubin", f"{made.name}.json"}
        assert (saved / entry["files"][f"{made.name}.cubin"]).read_bytes() == made.binary
    fast.save(saved)  # a plan with kernels may be written over


def test_loaded_kernels_are_found_by_the_compiler(
    fast: Any, llama: Any, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    again = gw.load(saved, llama)
    assert again.report.compiled == fast.report.compiled
    assert not [d for d in again.report.decisions if "saved kernels" in d.reason]
    before = {p: p.stat().st_mtime_ns for p in cache.rglob("*") if p.is_file()}
    assert len(before) == 3 * len({made.key for made in fast.compiled.kernels})
    found = compiled_kernels.compile_for(fast.graph, llama.config, gw_target("h100"), WORKLOAD)
    assert [made.key for made in found.kernels] == [made.key for made in fast.compiled.kernels]
    after = {p: p.stat().st_mtime_ns for p in cache.rglob("*") if p.is_file()}
    assert after == before  # a compilation would write the sources too


def test_damaged_kernels_are_refused(llama: Any, saved: Path) -> None:
    binary = next(saved.glob("kernels/*.cubin"))
    binary.write_bytes(binary.read_bytes()[:-1])
    with pytest.raises(PlanError, match=r"does not match its checksum[\s\S]*optimize the model again"):
        gw.load(saved, llama)
    shutil.rmtree(saved / "kernels")
    with pytest.raises(PlanError, match=r"No such file[\s\S]*optimize the model again"):
        gw.load(saved, llama)


def test_a_malformed_manifest_is_refused() -> None:
    for text in (b"{", b"[]", b'{"triton": "3", "target": "h", "kernels": [{}]}'):
        with pytest.raises(PlanError, match="manifest"):
            saved_kernels.install_kernels({MANIFEST: text}, "plan")


def test_kernels_of_another_triton_stay_where_they_are(
    llama: Any, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(saved_kernels, "triton_version", lambda: "3.99.0")
    decisions = gw.load(saved, llama).report.decisions
    (said,) = [d for d in decisions if "saved kernels" in d.reason]
    assert said.status is Status.FALLBACK and "this is Triton 3.99.0" in said.reason
    assert not (tmp_path / "cache").exists()


def test_the_target_itself_may_load_the_plan(
    llama: Any, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan for a GPU fits that GPU, and no other."""
    plan = saved_plan.read_plan(saved)
    here = saved_plan.describe_machine

    def elsewhere(name: str) -> None:
        properties = SimpleNamespace(name=name, total_memory=80 << 30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(saved_plan, "describe_machine", lambda device: {"device": "cuda", "name": name})
        monkeypatch.setattr(type(llama), "device", torch.device("cuda", 0))

    elsewhere("NVIDIA H100 80GB HBM3")
    saved_plan.check_plan(plan, llama)
    elsewhere("NVIDIA A100-SXM4-80GB")
    with pytest.raises(PlanError, match="another machine"):
        saved_plan.check_plan(plan, llama)
    assert here(torch.device("cpu"))["device"] == "cpu"
