"""``plan`` and ``compare``: predictions without weights, for one machine and for several."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import graphwright as gw
from graphwright.cost_model.target import resolve_target
from graphwright.ir.errors import BudgetError, InputError, UnknownTargetError
from graphwright.optimizer import what_if
from graphwright.optimizer.compare import SCHEMA, Comparison, Row, compare
from graphwright.optimizer.compare_text import letter_plans
from graphwright.optimizer.report import Report
from tests.architectures import POSITIONS, tiny_config, tiny_model

CONFIG = tiny_config("llama", layers=1)
WORKLOAD = gw.Workload(prompt=100, generate=20)
NAMES = ("l4", "h100", "mi300x")


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare(CONFIG, NAMES, workload=WORKLOAD)


def predicted(source: Any, **options: Any) -> dict[str, Any]:
    return gw.plan(source, "h100", workload=WORKLOAD, **options).predicted


# --- plan ----------------------------------------------------------------------------------------


def test_every_form_of_a_model_plans_the_same(tmp_path: Path, comparison: Comparison) -> None:
    CONFIG.save_pretrained(tmp_path)
    renamed = tmp_path / "tiny.v1.json"
    renamed.write_text((tmp_path / "config.json").read_text())
    expected = comparison.reports["h100"].predicted
    for source in (CONFIG, tmp_path, str(tmp_path), tmp_path / "config.json", str(renamed), renamed):
        assert predicted(source) == expected
    assert predicted(tiny_model("llama", layers=1, device="meta")) == expected


def test_what_is_measured_is_the_time_that_planning_took(comparison: Comparison) -> None:
    for report in comparison.reports.values():
        seconds = report.measured["seconds"]
        assert {"building the model without weights", "capturing the graph", "planning"} <= set(seconds)
        assert set(report.measured) == {"seconds"}


@pytest.mark.parametrize("wrong", [{"budget": 0.01}, {"budget": {"kl": 1}}, {"workload": 128}])
def test_arguments_of_another_kind_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        gw.plan(CONFIG, "h100", **wrong)


# --- compare -------------------------------------------------------------------------------------


def test_each_row_is_that_targets_plan(comparison: Comparison) -> None:
    assert [row.target for row in comparison.rows] == list(comparison.reports) == list(NAMES)
    for row in comparison.rows:
        report = gw.plan(CONFIG, row.target, workload=WORKLOAD)
        decode, memory = report.predicted["decode"], report.predicted["memory"]
        assert report.predicted == comparison.reports[row.target].predicted
        assert report.decisions == comparison.reports[row.target].decisions
        assert row.fits is memory["fits"] is True and not row.reason
        assert row.tokens_per_second == decode["tokens_per_second"] and row.bound == decode["bound"]
        assert row.seconds_per_token == decode["seconds_per_token"]
        assert row.prefill_seconds == report.predicted["prefill"]["seconds"]
        assert (row.memory_bytes, row.limit_bytes) == (memory["total_bytes"], memory["limit_bytes"])
        assert row.largest_batch == memory["largest_batch"] and row.largest_context == POSITIONS
        assert any(name.startswith("place_cache") for name in row.passes)


def test_the_graph_is_captured_once_and_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = []
    capture = what_if.capture_step

    def counted(model: Any) -> Any:
        captured.append(capture(model))
        return captured[-1]

    monkeypatch.setattr(what_if, "capture_step", counted)
    compare(CONFIG, NAMES, workload=WORKLOAD)
    ((graph, _),) = captured
    assert graph.calls("attention") and not graph.placeholders("state")


def test_a_target_that_is_too_small_is_a_row_that_says_why(comparison: Comparison) -> None:
    too_many = (comparison.rows[0].largest_batch or 0) + 1
    rows = compare(CONFIG, NAMES, workload=replace(WORKLOAD, batch=too_many)).rows
    assert [row.fits for row in rows] == [False, True, True]
    assert "needed of" in rows[0].reason and not rows[1].reason
    assert rows[0].memory_bytes is not None and rows[0].limit_bytes is not None
    assert rows[0].memory_bytes > rows[0].limit_bytes


def test_weights_that_do_not_fit_say_so_and_are_never_made() -> None:
    """The two embeddings take 69 GB, more than the machine of the tests has."""
    config = tiny_config("llama", layers=1, vocab_size=2**24, hidden_size=1024, dtype="bfloat16")
    small, large = compare(config, ["l4", "mi300x"], workload=WORKLOAD).rows
    assert small.fits is False and "weights alone" in small.reason and "22.4 GiB" in small.reason
    assert large.fits is True and large.memory_bytes and large.memory_bytes > 2 * 2 * 2**24 * 1024


def test_a_prompt_beyond_the_models_positions_says_so() -> None:
    (row,) = compare(CONFIG, ["h100"], workload=gw.Workload(prompt=POSITIONS)).rows
    assert row.fits is True and f"positions end at {POSITIONS}" in row.reason


def test_a_budget_that_one_target_misses_does_not_stop_the_others() -> None:
    h100 = resolve_target("h100")
    slow = replace(h100, name="slow", launch_overhead=1000 * h100.launch_overhead, bandwidth=1e9)
    free = compare(CONFIG, [slow, "mi300x"], workload=WORKLOAD).rows
    assert free[0].seconds_per_token and free[1].seconds_per_token
    budget = gw.Budget(latency=(free[0].seconds_per_token * free[1].seconds_per_token) ** 0.5)
    found = compare(CONFIG, [slow, "mi300x"], workload=WORKLOAD, budget=budget)
    refused, planned = found.rows
    assert refused.fits is None and refused.tokens_per_second is None and "no plan" in refused.reason
    assert planned.fits is True and planned.tokens_per_second == free[1].tokens_per_second
    assert list(found.reports) == ["mi300x"]
    with pytest.raises(BudgetError):
        gw.plan(CONFIG, slow, workload=WORKLOAD, budget=budget)
    assert any(line.split()[:2] == ["slow", "-"] for line in str(found).splitlines())
    assert "slow: no plan" in str(found) and "slow: no plan" in found.to_html()


def test_a_memory_budget_holds_on_every_target() -> None:
    found = compare(CONFIG, NAMES, workload=WORKLOAD, budget=gw.Budget(memory="1KiB"))
    assert [row.fits for row in found.rows] == [None] * 3 and not found.reports
    assert all("no plan" in row.reason for row in found.rows)


def test_a_target_object_is_compared_as_well() -> None:
    slower = replace(resolve_target("h100"), name="half", bandwidth=resolve_target("h100").bandwidth / 2)
    half, whole = compare(CONFIG, [slower, "h100"], workload=WORKLOAD).rows
    assert half.target == "half"
    assert half.seconds_per_token and whole.seconds_per_token
    assert half.seconds_per_token >= whole.seconds_per_token


@pytest.mark.parametrize(
    ("targets", "kind", "words"),
    [
        (["h100", "h20"], UnknownTargetError, "h200"),
        (["mi300"], UnknownTargetError, "mi300x"),
        (["h100", ""], UnknownTargetError, "did you mean"),
        (["h100", "h100"], InputError, "named twice"),
        (["h100", "l4", "H100_SXM"], InputError, "H100_SXM"),
        ([], InputError, "no targets"),
        ("h100", InputError, "list of targets"),
        (None, InputError, "no targets"),
        (["h100", 3], InputError, "name"),
    ],
)
def test_targets_are_refused_before_any_work(
    targets: Any, kind: type[InputError], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphwright.optimizer.compare.capture_without_weights", pytest.fail)
    with pytest.raises(kind, match=words):
        compare(CONFIG, targets)


# --- its views -----------------------------------------------------------------------------------

HOSTILE = '<script>alert("x")</script> [red]no markup[/red] \x1b[31m\x9b & \u202e'


def made(*plans: tuple[str, ...], name: str = "m", reason: str = "") -> Comparison:
    """A comparison with one row for each plan, without a model."""
    rows = tuple(
        Row(f"{name}{index}", name, True, reason, 10.0, name, 0.1, 1.0, 2.0, 3.0, 4, None, passes)
        for index, passes in enumerate(plans)
    )
    return Comparison(name, asdict(WORKLOAD), rows)


def test_json_holds_the_rows_and_every_report(comparison: Comparison) -> None:
    data = json.loads(comparison.to_json())
    assert data["schema"] == SCHEMA
    assert set(data) == {"schema", "model", "workload", "rows", "reports"}
    assert data["workload"] == asdict(WORKLOAD)
    assert [Row(**{**row, "passes": tuple(row["passes"])}) for row in data["rows"]] == list(comparison.rows)
    for found, name in zip(data["reports"], NAMES, strict=True):
        assert Report.from_json(json.dumps(found)).target == name


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_table_keeps_its_width_and_holds_every_row(width: int, comparison: Comparison) -> None:
    text = comparison.to_text(width)
    assert max(map(len, text.splitlines())) <= width
    for name in NAMES:
        assert any(line.split()[:2] == [name, "yes"] for line in text.splitlines())
    assert "plan A: place_cache" in text and "\x1b" not in text


def test_a_page_holds_the_same_words(comparison: Comparison) -> None:
    page = comparison.to_html()
    assert page.startswith("<!doctype html>") and "<script" not in page
    for word in (*NAMES, comparison.model, "plan", *comparison.rows[0].passes):
        assert word in page
    assert page.count('data-name="target"') == len(NAMES)


def test_plans_that_are_the_same_share_a_letter() -> None:
    shared = made(("a",), ("b",), ("a",), ())
    assert letter_plans(shared) == {("a",): "A", ("b",): "B", (): "C"}
    assert "no pass" in str(shared)
    letters = list(letter_plans(made(*((str(n),) for n in range(54)))).values())
    assert letters[25:28] == ["Z", "AA", "AB"] and letters[52] == "BA" and len(set(letters)) == 54


def test_nothing_hostile_reaches_a_view_unescaped() -> None:
    found = made((HOSTILE,), name=HOSTILE, reason=HOSTILE)
    text, page, data = found.to_text(200), found.to_html(), found.to_json()
    for view in (text, page, data):
        assert not {"\x1b", "\x9b", "\u202e"} & set(view)
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "[red]no markup[/red]" in text
    assert json.loads(data)["model"] == HOSTILE


def test_names_in_a_configuration_are_escaped_everywhere(tmp_path: Path) -> None:
    config = tiny_config("llama", layers=1, architectures=["<script>alert(1)</script>"]).to_dict()
    config |= {"_name_or_path": "\x1b[31mred\x9b", "tokenizer_class": "<img src=x onerror=alert(1)>"}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    found = compare(path, ["h100"], workload=WORKLOAD)
    report = found.reports["h100"]
    for made_of in (found, report):
        for view in (str(made_of), made_of.to_json(), made_of.to_html()):
            assert not {"\x1b", "\x9b"} & set(view)
            assert "<script" not in view and "<img" not in view and "alert(1)" not in view
