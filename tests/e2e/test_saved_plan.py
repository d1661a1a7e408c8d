"""Plans on disk, and canonical graphs in the cache: whole, for this model and machine, or refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graphwright.ir.canonicalize import canonicalize
from graphwright.ir.errors import PlanError
from graphwright.ir.printer import to_python
from graphwright.optimizer import graph_cache, machine, saved_plan
from graphwright.optimizer.capture import capture
from graphwright.optimizer.fingerprint import fingerprint
from graphwright.optimizer.graph_cache import cached_capture
from graphwright.optimizer.saved_plan import PLAN, check_plan, load_plan, read_plan, save_plan
from tests.architectures import tiny_model

DECIDED: dict[str, Any] = {
    "passes": ["place_cache{cut=kv}", "compile_layers"],
    "target": "cpu",
    "workload": {"batch": 1, "prompt": 16, "generate": 8, "shared_prefix": 0},
    "budget": {},
    "predicted": {"seconds_per_token": 0.001},
}


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def graph(llama: Any) -> Any:
    found = capture(llama)
    canonicalize(found)
    return found


@pytest.fixture
def saved(llama: Any, graph: Any, tmp_path: Path) -> Path:
    """A freshly saved plan."""
    folder = tmp_path / "plan"
    save_plan(folder, llama, plan=DECIDED, report_json='{"schema": "x"}\n', graph=graph)
    return folder


def refused(act: Callable[[], object]) -> PlanError:
    with pytest.raises(PlanError) as error:
        act()
    assert error.value.where and error.value.hint
    return error.value


# --- whole plans ---------------------------------------------------------------------------------


def test_a_plan_comes_back(saved: Path, llama: Any, graph: Any) -> None:
    plan, again = load_plan(saved, llama)
    assert (list(plan.passes), plan.target, plan.workload) == tuple(
        DECIDED[key] for key in ("passes", "target", "workload")
    )
    assert plan.more == {"predicted": DECIDED["predicted"]}
    assert plan.report_json == '{"schema": "x"}\n'
    assert again is not None and to_python(again) == to_python(graph)
    assert again.parameters["lm_head.weight"].data_ptr() == llama.lm_head.weight.data_ptr()


def test_a_plan_is_readable_and_diffable(saved: Path, llama: Any, graph: Any, tmp_path: Path) -> None:
    text = (saved / PLAN).read_text()
    document = json.loads(text)
    assert list(document) == sorted(document) and "\n  " in text
    assert document["model"]["config"]["hidden_size"] == 64
    assert document["model"]["tensors"]["model.norm.weight"] == "float32[64]"
    save_plan(tmp_path / "second", llama, plan=DECIDED, report_json='{"schema": "x"}\n', graph=graph)
    for name in document["files"]:
        assert (tmp_path / "second" / name).read_bytes() == (saved / name).read_bytes()
    assert (tmp_path / "second" / PLAN).read_text() == text


def test_nothing_is_pickled(saved: Path) -> None:
    assert {path.suffix for path in saved.iterdir()} <= {".json", ".safetensors"}
    for path in saved.glob("*.json"):
        json.loads(path.read_text())


def test_a_plan_without_a_graph(llama: Any, tmp_path: Path) -> None:
    save_plan(tmp_path / "plan", llama, plan=DECIDED, report_json="{}", graph=None)
    assert load_plan(tmp_path / "plan", llama)[1] is None


def test_tensors_that_the_model_does_not_own_are_saved(llama: Any, graph: Any, tmp_path: Path) -> None:
    held = graph.copy()
    node = held.placeholders("parameter")[0]
    name = node.meta["name"]
    node.meta["name"] = "constant.0"
    held.parameters["constant.0"] = held.parameters.pop(name).clone()
    save_plan(tmp_path / "plan", llama, plan=DECIDED, report_json="{}", graph=held)
    _, again = load_plan(tmp_path / "plan", llama)
    assert again is not None
    assert torch.equal(again.parameters["constant.0"], held.parameters["constant.0"])
    (tmp_path / "plan" / "constants.safetensors").write_bytes(b"")
    refused(lambda: load_plan(tmp_path / "plan", llama))


def test_saving_again_replaces_the_plan(saved: Path, llama: Any) -> None:
    save_plan(saved, llama, plan={**DECIDED, "passes": []}, report_json="{}", graph=None)
    plan = read_plan(saved)
    assert plan.passes == () and plan.graph_data is None
    assert sorted(path.name for path in saved.iterdir()) == [PLAN, "report.json"]
    assert [path.name for path in saved.parent.iterdir()] == ["plan"]  # nothing temporary is left


def test_an_interrupted_save_leaves_the_old_plan(
    saved: Path, llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    rename = Path.rename

    def fails_at_the_end(self: Path, target: Any) -> Path:
        if self.suffix == ".tmp":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_at_the_end)
    error = refused(
        lambda: save_plan(saved, llama, plan={**DECIDED, "passes": []}, report_json="{}", graph=None)
    )
    assert "No space left" in error.what
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["plan"]


def test_other_folders_are_never_written_over(llama: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    error = refused(lambda: save_plan(tmp_path, llama, plan=DECIDED, report_json="{}", graph=None))
    assert "thesis.txt" in error.what
    refused(lambda: save_plan(tmp_path / "thesis.txt", llama, plan=DECIDED, report_json="{}", graph=None))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


# --- damaged plans -------------------------------------------------------------------------------


def test_not_a_plan(tmp_path: Path) -> None:
    assert "no such folder" in refused(lambda: read_plan(tmp_path / "missing")).what
    assert "holds no plan.json" in refused(lambda: read_plan(tmp_path)).what
    (tmp_path / PLAN).write_text('{"schema": "other"}')
    assert "graphwright.plan/1" in refused(lambda: read_plan(tmp_path)).what


@pytest.mark.parametrize("name", ["plan.json", "graph.json", "report.json"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_a_plan_that_was_cut_off(saved: Path, name: str, keep: float) -> None:
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: int(len(content) * keep)])
    assert "cut off or edited" in refused(lambda: read_plan(saved)).what


@pytest.mark.parametrize("name", ["graph.json", "report.json"])
def test_a_plan_with_a_missing_file(saved: Path, name: str) -> None:
    (saved / name).unlink()
    assert name in str(refused(lambda: read_plan(saved)).where)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("plan.json", "cut=kv", "cut=minimum"),
        ("plan.json", '"target": "cpu"', '"target": "h100"'),
        ("plan.json", "graph.json", "../graph.json"),
        ("graph.json", "graphwright.linear.default", "aten.linear.default"),
        ("report.json", "x", "y"),
    ],
)
def test_a_plan_that_was_edited(saved: Path, name: str, old: str, new: str) -> None:
    text = (saved / name).read_text()
    assert old in text
    (saved / name).write_text(text.replace(old, new, 1))
    error = refused(lambda: read_plan(saved))
    assert "cut off or edited" in error.what and name in str(error.where)


# --- plans for something else --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (lambda: tiny_model("qwen3"), "model.class: saved LlamaForCausalLM, now Qwen3ForCausalLM"),
        (lambda: tiny_model("llama", layers=3), "model.config.num_hidden_layers: saved 2, now 3"),
        (lambda: tiny_model("llama", hidden_size=32), "model.config.hidden_size: saved 64, now 32"),
        (lambda: tiny_model("llama", torch.bfloat16), "saved float32, now bfloat16"),
    ],
)
def test_a_plan_for_another_model(saved: Path, other: Callable[[], Any], expected: str) -> None:
    model = other()
    error = refused(lambda: load_plan(saved, model))
    assert expected in error.what and "another model" in error.what


def test_resized_embeddings_are_another_model(saved: Path) -> None:
    model = tiny_model("llama")
    model.lm_head = torch.nn.Linear(64, 97, bias=False)
    error = refused(lambda: load_plan(saved, model))
    assert "model.tensors.lm_head.weight: saved float32[96, 64], now float32[97, 64]" in error.what


def test_other_weights_of_the_same_model_fit(saved: Path) -> None:
    model = tiny_model("llama", seed=1)
    model.config.eos_token_id = 5  # generation's business
    _, again = load_plan(saved, model)
    assert again is not None
    assert again.parameters["model.norm.weight"].data_ptr() == model.model.norm.weight.data_ptr()


def test_a_plan_for_another_machine(saved: Path, llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_plan, "cpu_name", lambda: "Another CPU")
    error = refused(lambda: load_plan(saved, llama))
    assert "another machine" in error.what and "now Another CPU" in error.what


def test_a_plan_for_other_threads(saved: Path, llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    error = refused(lambda: load_plan(saved, llama))
    assert "machine.threads" in error.what and "set_num_threads" in str(error.hint)


def test_a_plan_for_another_target(saved: Path, llama: Any) -> None:
    check_plan(read_plan(saved), llama, "cpu")
    error = refused(lambda: check_plan(read_plan(saved), llama, "h100"))
    assert "target: saved cpu, now h100" in error.what


def test_a_plan_of_other_versions(saved: Path, llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "versions", lambda: {"graphwright": "99", "torch": "1", "transformers": "2"})
    assert "versions.graphwright: saved" in refused(lambda: load_plan(saved, llama)).what


def test_what_is_saved_must_be_a_plan(llama: Any, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no target"):
        save_plan(tmp_path / "a", llama, plan={"passes": []}, report_json="{}", graph=None)
    with pytest.raises(PlanError, match="plain data"):
        save_plan(tmp_path / "a", llama, plan={**DECIDED, "x": object()}, report_json="{}", graph=None)
    assert not (tmp_path / "a").exists()


# --- the cache of canonical graphs ---------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAPHWRIGHT_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv(graph_cache.SWITCH, raising=False)
    return tmp_path / "graphs"


@pytest.fixture
def no_capture(monkeypatch: pytest.MonkeyPatch, graph: Any) -> list[Any]:
    """Captures are counted and cost nothing: they give the module's graph again."""
    calls: list[Any] = []

    def counted(model: Any) -> Any:
        calls.append(model)
        fresh = graph.copy()
        tensors = graph_cache.model_tensors(model)
        fresh.parameters = {name: tensors[name].detach() for name in fresh.parameters}
        return fresh

    monkeypatch.setattr(graph_cache, "capture", counted)
    monkeypatch.setattr(graph_cache, "canonicalize", lambda g: graph_cache.CanonicalizationReport(g.counts()))
    return calls


def test_the_second_capture_is_read(cache: Path) -> None:
    model = tiny_model("gpt2")
    first, report, hit = cached_capture(model)
    assert not hit
    second, again, hit = cached_capture(tiny_model("gpt2", seed=1))
    assert hit and to_python(second) == to_python(first) and again == report
    assert [str(n.meta.get("val")) for n in second.nodes] == [str(n.meta.get("val")) for n in first.nodes]


def test_a_read_graph_uses_the_live_tensors(cache: Path, no_capture: list[Any]) -> None:
    cached_capture(tiny_model("llama"))
    model = tiny_model("llama", seed=1)
    graph, _, hit = cached_capture(model)
    assert hit and len(no_capture) == 1
    pointers = {name: t.data_ptr() for name, t in graph_cache.model_tensors(model).items()}
    assert all(t.data_ptr() == pointers[name] for name, t in graph.parameters.items())


@pytest.mark.parametrize("damage", ["empty", "half", "edited", "binary"])
def test_damaged_entries_are_made_again(cache: Path, no_capture: list[Any], damage: str) -> None:
    cached_capture(tiny_model("llama"))
    (entry,) = cache.glob("*.json")
    content = entry.read_bytes()
    damaged = {
        "empty": b"",
        "half": content[: len(content) // 2],
        "edited": content.replace(b"rms_norm", b"RMS_norm", 1),
        "binary": b"\xff\xfe" + content,
    }[damage]
    entry.write_bytes(damaged)
    assert not cached_capture(tiny_model("llama"))[2]
    assert len(no_capture) == 2 and entry.read_bytes() == content
    assert cached_capture(tiny_model("llama"))[2]


def test_the_cache_can_be_turned_off(
    cache: Path, no_capture: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(graph_cache.SWITCH, "1")
    cached_capture(tiny_model("llama"))
    assert not cached_capture(tiny_model("llama"))[2] and not cache.exists()


def test_a_cache_that_cannot_be_written_is_no_error(
    no_capture: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRAPHWRIGHT_CACHE_DIR", str(tmp_path / "file"))
    assert not cached_capture(tiny_model("llama"))[2]


def test_the_oldest_entries_go(cache: Path, no_capture: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_cache, "ENTRIES", 2)
    monkeypatch.setattr(graph_cache, "fingerprint", lambda model: (model.key * 40, frozenset()))
    model = tiny_model("llama")
    for key in "abc":
        object.__setattr__(model, "key", key)
        cached_capture(model)
    assert sorted(path.stem[0] for path in cache.glob("*.json")) == ["b", "c"]


CHANGES: dict[str, Callable[[Any], object]] = {
    "a scalar of a module": lambda m: setattr(m.model.layers[1].self_attn, "scaling", 0.3),
    "a new scalar": lambda m: setattr(m.model, "flag", True),
    "a field of the configuration": lambda m: setattr(m.config, "rms_norm_eps", 0.1),
    "a dtype": lambda m: m.to(torch.bfloat16),
    "tied weights": lambda m: setattr(m.lm_head, "weight", m.model.embed_tokens.weight),
    "a stride": lambda m: setattr(m.lm_head.weight, "data", m.lm_head.weight.data.t().contiguous().t()),
    "another module": lambda m: setattr(m.model.layers[0].mlp, "act_fn", torch.nn.GELU()),
    "a tensor of a module": lambda m: setattr(m.model, "extra", torch.ones(2)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_graph_depends_on_is_in_its_key(change: str) -> None:
    model = tiny_model("llama")
    CHANGES[change](model)
    own, stock = fingerprint(model), fingerprint(tiny_model("llama", seed=1))
    assert own is not None and stock is not None and own[0] != stock[0]
    assert stock == fingerprint(tiny_model("llama"))  # values of the weights are not in it


def test_replaced_functions_change_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    stock = fingerprint(tiny_model("llama"))

    def rotate_half(x: torch.Tensor) -> torch.Tensor:
        return -x

    rotate_half.__module__ = modeling_llama.__name__
    monkeypatch.setattr(modeling_llama, "rotate_half", rotate_half)
    patched = fingerprint(tiny_model("llama"))
    assert patched is not None and patched != stock


def _patched_forward(model: Any) -> None:
    layer = model.model.layers[0].mlp
    layer.forward = lambda x: x


def _local_class(model: Any) -> None:
    class Local(type(model.model.layers[0].mlp)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    model.model.layers[0].mlp.__class__ = Local


UNSTABLE: dict[str, Callable[[Any], object]] = {
    "a forward hook": lambda m: m.model.layers[0].register_forward_hook(lambda *a: None),
    "a pre-hook": lambda m: m.model.layers[0].mlp.register_forward_pre_hook(lambda *a: None),
    "a forward of its own": _patched_forward,
    "a local class": _local_class,
}


@pytest.mark.parametrize("change", UNSTABLE)
def test_what_has_no_identity_is_not_cached(cache: Path, no_capture: list[Any], change: str) -> None:
    model = tiny_model("llama")
    UNSTABLE[change](model)
    assert fingerprint(model) is None
    cached_capture(model)
    assert not cache.exists()


def test_keys_are_the_same_in_another_process() -> None:
    names = ["llama", "gpt_oss"]
    code = (
        "from tests.architectures import tiny_model\n"
        "from graphwright.optimizer.fingerprint import fingerprint\n"
        f"print([fingerprint(tiny_model(name))[0] for name in {names}])"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True)
    assert done.stdout.split("\n")[-2] == str([fingerprint(tiny_model(name))[0] for name in names])
