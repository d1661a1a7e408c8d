"""The command line: what it passes on, what it prints, how it refuses."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import graphwright as gw
from graphwright.cost_model.calibrate import stored_at
from graphwright.cost_model.target import Target
from graphwright.ir.errors import UnknownTargetError
from graphwright.optimizer.cli import app
from graphwright.optimizer.compare import Comparison, Row
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
    assert options["workload"] == gw.Workload(batch=2, prompt=32, generate=8)
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
    assert options["workload"] == gw.Workload(prompt=128_000)


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


# --- budgets -------------------------------------------------------------------------------------

BUDGET = ["--kl", "0.01", "--perplexity", "1.02", "--memory", "40GiB", "--latency", "0.02"]


def test_a_budget_reaches_optimize_and_plan(model_dir: Path, recorder: Recorder, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is a cut?\n\n  What is a codec? \n", encoding="utf-8")
    more = ["--calibration", str(prompts), "--seed", "7"]
    assert runner.invoke(app, ["optimize", str(model_dir), *BUDGET, *more]).exit_code == 0
    assert runner.invoke(app, ["plan", str(model_dir), "--target", "h100", *BUDGET]).exit_code == 0
    (_, _, optimized), (_, _, planned) = recorder.calls
    expected = gw.Budget(kl=0.01, perplexity=1.02, memory="40GiB", latency=0.02)
    assert optimized["budget"] == planned["budget"] == expected
    assert optimized["calibration"] == ["What is a cut?", "What is a codec?"]
    assert optimized["seed"] == 7


def test_no_flags_are_no_budget(model_dir: Path, recorder: Recorder) -> None:
    assert runner.invoke(app, ["optimize", str(model_dir)]).exit_code == 0
    assert runner.invoke(app, ["plan", str(model_dir), "--target", "h100"]).exit_code == 0
    (_, _, optimized), (_, _, planned) = recorder.calls
    assert optimized["budget"] is None and planned["budget"] is None
    assert optimized["calibration"] is None and optimized["seed"] == 0


@pytest.mark.parametrize("flag", ["--kl", "--perplexity", "--memory", "--latency"])
@pytest.mark.parametrize("bound", ["0", "-1", "nan", "inf", "much"])
@pytest.mark.parametrize("command", [["optimize", "no-model"], ["plan", "no-model", "--target", "h100"]])
def test_a_budget_of_nothing_is_refused_before_any_work(
    command: list[str], flag: str, bound: str, recorder: Recorder
) -> None:
    result = runner.invoke(app, [*command, f"{flag}={bound}"])
    assert result.exit_code == 2 and not recorder.calls
    assert flag.strip("-") in result.output and "no-model" not in result.output


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot read"), (b"", "empty"), (b" \n\n\t\n", "empty"), (b"\xff\xfe\x00", "utf-8")],
)
def test_calibration_text_that_is_not_usable(
    content: bytes | None, words: str, recorder: Recorder, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    result = runner.invoke(app, ["optimize", "no-model", "--calibration", str(path)])
    assert result.exit_code == 2 and words in result.output and "prompts.txt" in result.output
    assert not recorder.calls


# --- plan for several machines -------------------------------------------------------------------


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch, report: Report) -> list[dict[str, Any]]:
    """What ``plan --compare`` passed on, with a comparison made up in place of the planner's."""
    calls: list[dict[str, Any]] = []

    def made(config: Any, names: list[str], **options: Any) -> Comparison:
        calls.append({"config": config, "names": names, **options})
        rows = tuple(Row(name, name.upper(), reason="it is too slow") for name in names)
        return Comparison(report.model, {"batch": 1}, rows, {names[0]: report})

    monkeypatch.setattr("graphwright.optimizer.compare.compare", made)
    return calls


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--compare", "h100,h200"], ["h100", "h200"]),
        (["--compare", " h100 , h200,"], ["h100", "h200"]),
        (["--compare", "h100,h200", "--target", "l4"], ["l4", "h100", "h200"]),
        (["--compare", "h100,h200", "--target", "h200"], ["h100", "h200"]),
    ],
)
def test_compare_lists_the_targets(
    arguments: list[str], names: list[str], model_dir: Path, compared: list[dict[str, Any]]
) -> None:
    result = runner.invoke(app, ["plan", str(model_dir), *arguments, "--batch", "3", "--memory", "1GiB"])
    assert result.exit_code == 0, result.output
    (call,) = compared
    assert call["names"] == names and call["config"].hidden_size == 32
    assert call["workload"] == gw.Workload(batch=3) and call["budget"] == gw.Budget(memory="1GiB")
    assert all(f"{name}: it is too slow" in result.output for name in names)


def test_compare_prints_and_writes_json_and_html(
    model_dir: Path, compared: list[dict[str, Any]], tmp_path: Path
) -> None:
    page, data = tmp_path / "page.html", tmp_path / "rows.json"
    command = ["plan", str(model_dir), "--compare", "h100,h200"]
    result = runner.invoke(app, [*command, "--json", "--html", str(page)])
    printed = json.loads(result.stdout)
    assert printed["schema"] == "graphwright.comparison/1"
    assert [row["target"] for row in printed["rows"]] == ["h100", "h200"]
    assert len(printed["reports"]) == 1 and Report.from_json(json.dumps(printed["reports"][0]))
    assert page.read_text().startswith("<!doctype html>")
    assert runner.invoke(app, [*command, "--report", str(data)]).exit_code == 0
    assert json.loads(data.read_text()) == printed


def test_plan_writes_its_report(model_dir: Path, recorder: Recorder, tmp_path: Path) -> None:
    for name in ("report.html", "report.json"):
        path = tmp_path / name
        command = ["plan", str(model_dir), "--target", "h100", "--report", str(path)]
        assert runner.invoke(app, command).exit_code == 0
        assert path.read_text() == (
            recorder.report.to_html() if name.endswith("html") else recorder.report.to_json()
        )
    result = runner.invoke(app, ["plan", "no-model", "--target", "h100", "--report", "report.pdf"])
    assert result.exit_code == 2 and ".html or .json" in result.output


@pytest.mark.parametrize("arguments", [[], ["--compare", ""], ["--compare", " , "]])
def test_plan_needs_a_machine(arguments: list[str], recorder: Recorder) -> None:
    result = runner.invoke(app, ["plan", "no-model", *arguments])
    assert result.exit_code == 2 and "--target h100" in result.output


@pytest.mark.parametrize(
    ("names", "words"), [("h100,h20", "h200"), ("h100,H100_SXM", "named twice"), ("h100,,mi300", "mi300x")]
)
def test_targets_that_cannot_be_compared(names: str, words: str, model_dir: Path) -> None:
    result = runner.invoke(app, ["plan", str(model_dir), "--compare", names])
    assert result.exit_code == 2 and words in result.output and "Traceback" not in result.output


def test_what_a_file_holds_cannot_move_the_cursor(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "\x1b[2J\x9b31mred \u202e"}))
    result = runner.invoke(app, ["plan", str(path), "--target", "h100"])
    assert result.exit_code == 2 and "red" in result.output
    assert not {"\x1b", "\x9b", "\u202e"} & set(result.output)


# --- calibrate -----------------------------------------------------------------------------------


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What ``calibrate`` passed on; the machine is made up and nothing is measured."""
    calls: list[dict[str, Any]] = []

    def calibrate_machine(progress: Any = None, **options: Any) -> Target:
        calls.append(options)
        for done, step in enumerate(("read bandwidth", "read bandwidth", "\x1b[2Jlinear")):
            progress(step, done / 3)
        stored_at().parent.mkdir(parents=True, exist_ok=True)
        stored_at().write_text("{}")
        return Target(
            "cpu", "A CPU [bold]of[/bold] \x1b[31mtests", "cpu", "cpu", "", memory_bytes=2**34,
            bandwidth=25e9, peak_flops={"float32": 1.5e11}, launch_overhead=3e-6,
            sources={"bandwidth": "measured: reading 512 MiB", "measured.linear.float32": "measured here"},
            measured={"bandwidth_fraction": 0.75}, bandwidths=((2.0**25, 40e9), (2.0**29, 25e9)),
            curves={"linear.float32": ((0.5, 5e-11), (64.0, 1e-9))}, launches={"linear.float32": 2e-6},
            activation_rates={"float32": 1e10},
        )  # fmt: skip

    fake = ModuleType("graphwright.optimizer.calibration")
    fake.calibrate_machine = calibrate_machine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setenv("GRAPHWRIGHT_CACHE_DIR", str(tmp_path))
    return calls


def test_calibrate_prints_each_figure_with_unit_and_source(calibrated: list[dict[str, Any]]) -> None:
    result = runner.invoke(app, ["calibrate"], env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    assert calibrated == [{"refresh": False, "seconds": 6.0}]
    for words in (
        "16 GiB",
        "25 GB/s",
        "measured: reading 512 MiB",
        "40 GB/s",
        "150 GFLOP/s",
        "3 us",
        "75.00%",
    ):
        assert words in result.stdout
    for words in ("linear in float32, skinny", "20 GB/s", "64 GFLOP/s", "measured here", "2 us", "10 GB/s"):
        assert words in result.stdout
    assert "[bold]of[/bold]" in result.stdout and "\x1b" not in result.output
    assert f"kept in {stored_at()}" in result.stdout


def test_calibrate_tells_each_step_once_on_standard_error(calibrated: list[dict[str, Any]]) -> None:
    result = runner.invoke(app, ["calibrate", "--refresh", "--seconds", "1.5"])
    assert calibrated == [{"refresh": True, "seconds": 1.5}]
    assert result.stderr.count("graphwright: read bandwidth") == 1 and "linear" in result.stderr
    assert "graphwright: read bandwidth" not in result.stdout


def test_calibrate_says_that_figures_were_measured_before(
    calibrated: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "measured before; --refresh measures again"
    assert said not in runner.invoke(app, ["calibrate"]).output
    module = sys.modules["graphwright.optimizer.calibration"]
    measure = module.calibrate_machine

    def known(progress: Any = None, **options: Any) -> Any:
        target = measure(lambda step, done: None, **options)
        progress("done", 1.0)
        return target

    monkeypatch.setattr(module, "calibrate_machine", known)
    result = runner.invoke(app, ["calibrate"])
    assert said in result.stdout and not result.stderr


def test_calibrate_on_a_terminal_draws_a_bar(
    calibrated: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    terminal = partial(Console, file=screen, force_terminal=True, width=100)
    monkeypatch.setattr("graphwright.optimizer.cli_calibrate.Console", terminal)
    assert runner.invoke(app, ["calibrate"]).exit_code == 0
    assert "67%" in screen.getvalue() and "\x1b[2Jlinear" not in screen.getvalue()


def test_calibrate_says_where_figures_were_not_kept(
    calibrated: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gone = tmp_path / "gone.json"
    monkeypatch.setattr("graphwright.optimizer.cli_calibrate.stored_at", lambda device: gone)
    result = runner.invoke(app, ["calibrate"])
    assert result.exit_code == 0 and f"not kept: {gone}" in result.stderr and "kept in" not in result.stdout


def test_an_interrupted_calibration_writes_nothing(
    calibrated: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(progress: Any = None, **options: Any) -> Target:
        progress("read bandwidth", 0.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["graphwright.optimizer.calibration"], "calibrate_machine", interrupted)
    result = runner.invoke(app, ["calibrate"])
    assert result.exit_code == 130
    assert "interrupted; nothing was written" in result.stderr and not result.stdout
    assert not stored_at().exists()


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_calibrate_needs_time(seconds: str) -> None:
    result = runner.invoke(app, ["calibrate", "--seconds", seconds])
    assert result.exit_code == 2 and "seconds must be above zero" in result.output


# --- what help costs -----------------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from graphwright.optimizer.cli import app;"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0;"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
