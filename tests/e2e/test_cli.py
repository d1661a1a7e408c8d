"""The command line: what it passes on, what it prints, how it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import graphwright as gw
from graphwright.ir.errors import UnknownTargetError
from graphwright.optimizer.cli import app
from graphwright.optimizer.report import Decision, Report, Status

runner = CliRunner()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama, saved as a local folder."""
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def report() -> Report:
    decisions = [Decision("place_cache", "layers.0", Status.APPLIED, "the minimum cut")]
    return Report("LlamaForCausalLM", "cpu", {"batch": 1}, decisions)


class Recorder:
    """Stands in for the compiler; keeps what the command line passed to it."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def optimize(self, *args: Any, **options: Any) -> SimpleNamespace:
        self.calls.append(("optimize", args, options))
        return SimpleNamespace(report=self.report, save=lambda path: self.calls.append(("save", (path,), {})))

    def plan(self, *args: Any, **options: Any) -> Report:
        self.calls.append(("plan", args, options))
        return self.report


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch, report: Report) -> Recorder:
    made = Recorder(report)
    monkeypatch.setattr(gw, "optimize", made.optimize, raising=False)
    monkeypatch.setattr(gw, "plan", made.plan, raising=False)
    monkeypatch.setattr(gw, "Workload", lambda **sizes: sizes, raising=False)
    return made


def test_optimize_passes_its_options_on(model_dir: Path, recorder: Recorder, tmp_path: Path) -> None:
    line = "--target cpu --dtype bfloat16 --prompt 32 --generate 8 --batch 2 --pass place_cache"
    names = ["--pass", "speculate{drafter=ngram}", "--save", str(tmp_path / "saved")]
    page = ["--report", str(tmp_path / "report.html")]
    result = runner.invoke(app, ["optimize", str(model_dir), *line.split(), *names, *page])
    assert result.exit_code == 0, result.output
    (name, (model,), options), saved = recorder.calls
    assert name == "optimize" and isinstance(model, LlamaForCausalLM)
    assert str(model.dtype) == "torch.bfloat16"
    assert options["target"] == "cpu"
    assert options["workload"] == {"batch": 2, "prompt": 32, "generate": 8}
    assert options["passes"] == ["place_cache", "speculate{drafter=ngram}"]
    assert saved == ("save", (tmp_path / "saved",), {})
    assert "the minimum cut" in result.output
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")


def test_optimize_leaves_the_choice_to_the_planner_by_default(model_dir: Path, recorder: Recorder) -> None:
    assert runner.invoke(app, ["optimize", str(model_dir)]).exit_code == 0
    assert recorder.calls[0][2]["passes"] is None


def test_optimize_refuses_a_report_format_before_any_work(recorder: Recorder, tmp_path: Path) -> None:
    result = runner.invoke(app, ["optimize", "no-such-model", "--report", str(tmp_path / "report.pdf")])
    assert result.exit_code == 2
    assert ".html or .json" in result.output
    assert not recorder.calls


@pytest.mark.parametrize("form", ["folder", "file"])
def test_plan_reads_a_config_and_prints_json(form: str, model_dir: Path, recorder: Recorder) -> None:
    source = model_dir if form == "folder" else model_dir / "config.json"
    result = runner.invoke(app, ["plan", str(source), "--target", "h100", "--prompt", "128000", "--json"])
    assert result.exit_code == 0, result.output
    assert Report.from_json(result.stdout).to_dict() == recorder.report.to_dict()
    (_, (config, target), options) = recorder.calls[0]
    assert config.hidden_size == 32 and target == "h100"
    assert options["workload"]["prompt"] == 128_000


def test_our_errors_are_messages_and_others_are_not_hidden(
    model_dir: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> Report:
        raise UnknownTargetError("no target 'h10O'", where="target", hint="did you mean h100?")

    monkeypatch.setattr(gw, "plan", refuse)
    result = runner.invoke(app, ["plan", str(model_dir), "--target", "h10O"])
    assert result.exit_code == 2
    assert "no target 'h10O'" in result.output and "did you mean h100?" in result.output
    assert "Traceback" not in result.output

    def fail(*args: Any, **options: Any) -> Report:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(gw, "plan", fail)
    result = runner.invoke(app, ["plan", str(model_dir), "--target", "h100"])
    assert isinstance(result.exception, ZeroDivisionError)


@pytest.mark.parametrize("name", ["./no/such/folder", "not a model id"])
def test_a_model_that_cannot_be_loaded_is_refused(name: str, recorder: Recorder) -> None:
    result = runner.invoke(app, ["optimize", name])
    assert result.exit_code == 2
    assert name in result.output and "what to do" in result.output


@pytest.mark.parametrize("arguments", [["--batch", "0"], ["--prompt", "-1"], ["--generate", "many"]])
def test_sizes_must_be_positive_numbers(arguments: list[str], recorder: Recorder) -> None:
    assert runner.invoke(app, ["optimize", "model", *arguments]).exit_code == 2
    assert not recorder.calls


def test_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gw, "targets", lambda: {"cpu": "this machine", "h100": "SXM, 80 GB"}, raising=False)
    monkeypatch.setattr(gw, "passes", lambda: {"place_cache": "store what is smallest"}, raising=False)
    assert runner.invoke(app, ["targets"]).output == "cpu   this machine\nh100  SXM, 80 GB\n"
    assert runner.invoke(app, ["passes"]).output == "place_cache  store what is smallest\n"


def test_report_shows_and_converts(report: Report, tmp_path: Path) -> None:
    saved, page = tmp_path / "report.json", tmp_path / "report.html"
    saved.write_text(report.to_json())
    shown = runner.invoke(app, ["report", str(saved)])
    assert shown.exit_code == 0 and shown.output == f"{report}\n"
    assert runner.invoke(app, ["report", str(saved), "--html", str(page)]).exit_code == 0
    assert page.read_text() == report.to_html()


@pytest.mark.parametrize("content", [None, "", "{}", json.dumps({"schema": "graphwright.report/9"})])
def test_report_refuses_what_is_not_one(content: str | None, tmp_path: Path) -> None:
    saved = tmp_path / "report.json"
    if content is not None:
        saved.write_text(content)
    result = runner.invoke(app, ["report", str(saved)])
    assert result.exit_code == 2
    assert str(saved) in result.output.replace("\n", "")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from graphwright.optimizer.cli import app;"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0;"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
