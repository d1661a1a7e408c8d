"""The plots of a report: what they show, that they are left out, that they escape, that they repeat."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest

from graphwright.optimizer.report import Report
from graphwright.optimizer.report_plots import draw_plots
from graphwright.optimizer.report_svg import INK, Plot, new_figure, style, to_svg
from tests.e2e.example_report import HOSTILE, make_curves, make_plan, make_plans, make_report

TITLES = [
    "Time per token, by op",
    "Memory against context",
    "Plans: quality against speed",
    "Predicted against measured",
    "Roofline",
]


def plots_of(report: Report) -> dict[str, Plot]:
    return {plot.title: plot for plot in draw_plots(report)}


def words_of(plot: Plot) -> list[str]:
    """The texts of a picture, its title apart, in the order in which they are drawn."""
    return [node.text or "" for node in ElementTree.fromstring(plot.svg).iter("text")]


@pytest.fixture(scope="module")
def drawn() -> dict[str, Plot]:
    return plots_of(make_report())


def test_every_plot_is_there_and_says_what_it_is(drawn: dict[str, Plot]) -> None:
    assert list(drawn) == TITLES
    for plot in drawn.values():
        root = ElementTree.fromstring(plot.svg)
        assert root.get("role") == "img" and root.get("aria-label")
        assert root[0].tag == "title" and root[0].text == root.get("aria-label")
        assert root.get("width") is None and root.get("viewBox")  # a page sets the width


def test_time_is_stacked_by_op_with_the_measured_totals_beside(drawn: dict[str, Plot]) -> None:
    plot = drawn["Time per token, by op"]
    words = words_of(plot)
    for expected in ("before, predicted", "after, predicted", "stock, measured", "program, measured"):
        assert expected in words
    for total in ("11.2 ms", "7.1 ms", "25.1 ms", "7.8 ms"):
        assert total in words
    assert [name for *_, name in plot.legend] == ["linear", "attention", "rms_norm", "not split by op"]


def test_ops_beyond_the_colors_are_joined() -> None:
    by_op = {f"op{n:02}": 0.001 * (30 - n) for n in range(20)}
    plot = plots_of(make_report(predicted={"decode": {"seconds_by_op": by_op}}, curves={}))[TITLES[0]]
    names = [name for *_, name in plot.legend]
    assert names[:7] == [f"op{n:02}" for n in range(7)]
    assert names[7:] == ["other ops", "not split by op"]
    assert len({color for color, *_ in plot.legend}) == len(names)


def test_one_prediction_without_measurements_has_no_grey_bar() -> None:
    plot = plots_of(make_report(measured={}))[TITLES[0]]
    assert "not split by op" not in [name for *_, name in plot.legend]
    assert "Measured" not in plot.caption


def test_parts_add_up_to_the_time_per_token() -> None:
    """A step of speculation costs more than a token: its ops are scaled, and the label is the total."""
    decode = {"seconds_per_token": 0.004, "seconds_by_op": {"linear": 0.006, "attention": 0.002}}
    plot = plots_of(make_report(predicted={"decode": decode}, measured={}))[TITLES[0]]
    assert "4 ms" in words_of(plot) and "8 ms" not in words_of(plot)


def test_memory_marks_the_limit_and_the_workload(drawn: dict[str, Plot]) -> None:
    plot = drawn["Memory against context"]
    assert {"limit 763 MiB", "this workload: 320"} <= set(words_of(plot))
    assert [name for *_, name in plot.legend] == ["cache", "workspace", "weights"]
    far = make_curves()
    far["memory"]["limit_bytes"] = 8e11
    distant = plots_of(make_report(curves=far, workload={"batch": 1, "prompt": 10**6}))[plot.title]
    assert not any(word.startswith(("limit", "this workload")) for word in words_of(distant))
    assert "745 GiB" in distant.caption


def test_plans_are_numbered_as_in_the_table(drawn: dict[str, Plot]) -> None:
    plot = drawn["Plans: quality against speed"]
    assert {"1", "2", "3", "4", "KL (nats per token)"} <= set(words_of(plot))
    assert [name for *_, name in plot.legend] == ["chosen", "runner-up", "undone"]


def test_exact_plans_are_shown_by_their_memory() -> None:
    plans = [make_plan("chosen", 0.01, 2e8, 0.0, "a"), make_plan("runner-up", 0.02, 1e8, 0.0, "b")]
    drawn = plots_of(make_report(plans=plans))
    assert "Plans: memory against speed" in drawn
    assert "MiB" in words_of(drawn["Plans: memory against speed"])


def test_plans_at_one_place_stay_apart() -> None:
    plans = [make_plan("runner-up", 0.01, 2e8, 0.0, f"p{n}") for n in range(4)]
    plot = plots_of(make_report(plans=plans))["Plans: memory against speed"]
    root = ElementTree.fromstring(plot.svg)
    numbers = [node for node in root.iter("text") if node.text in ("1", "2", "3", "4")]
    places = {node.get("transform") or (node.get("x"), node.get("y")) for node in numbers}
    assert len(numbers) == len(places) == 4


def test_accuracy_shows_the_ratio(drawn: dict[str, Plot]) -> None:
    words = words_of(drawn["Predicted against measured"])
    assert words.count("1.10") == 1 and "decode, time per token" in words  # 7.8 over 7.1
    assert "1.25" in words and "plan 1, KL (nats)" in words  # 0.005 over 0.004


def test_roofline_names_what_it_cannot_show(drawn: dict[str, Plot]) -> None:
    plot = drawn["Roofline"]
    assert [(glyph, name) for _, glyph, name in plot.legend] == [("●", "linear"), ("■", "attention")]
    assert "1.9 TFLOP/s" in plot.caption and "41 GB/s" in plot.caption and "copy" in plot.caption


EMPTY: dict[str, dict[str, Any]] = {
    "nothing at all": {"predicted": {}, "measured": {}, "curves": {}, "plans": []},
    "nulls": {
        "predicted": {"decode": {"seconds_per_token": None, "seconds_by_op": {"linear": None}}},
        "measured": {"decode": {"seconds_per_token": None}, "stock": {}},
        "curves": {
            "roofline": {"flops_per_second": None, "bytes_per_second": None, "ops": [{"op": "linear"}]},
            "memory": {"points": [{"context": None}, {"context": 1}], "limit_bytes": None},
        },
        "plans": [{**make_plan("chosen", 0.0, 0.0, 0.0, "a"), "predicted": {"seconds_per_token": None}}] * 2,
    },
    "zeros": {
        "predicted": {"decode": {"seconds_per_token": 0.0, "seconds_by_op": {"linear": 0.0}}},
        "measured": {"decode": {"seconds_per_token": 0.0}},
        "curves": {"roofline": {"flops_per_second": 0.0, "bytes_per_second": 0.0, "ops": []}},
        "plans": [],
    },
    "not numbers": {
        "predicted": {"decode": {"seconds_per_token": float("nan"), "seconds_by_op": {"a": float("inf")}}},
        "measured": {},
        "curves": {"memory": {"points": [{"context": float("inf")}], "limit_bytes": float("nan")}},
        "plans": [make_plan("chosen", float("nan"), 1.0, 0.0)],
    },
}


@pytest.mark.parametrize("name", EMPTY)
def test_a_plot_without_data_is_left_out(name: str) -> None:
    report = make_report(**EMPTY[name])
    assert draw_plots(report) == []
    assert "<svg" not in report.to_html()
    assert str(report)


def test_plots_of_extreme_numbers_are_drawn() -> None:
    """All zero sizes, one op far from the roof, ratios of a million: no error, and finite coordinates."""
    curves = make_curves()
    curves["roofline"]["ops"][0].update(intensity=1e-9, flops_per_second=1.0)
    for point in curves["memory"]["points"]:
        point.update(weights_bytes=0, cache_bytes=0, workspace_bytes=0)
    curves["memory"]["limit_bytes"] = None
    plans = make_plans()
    plans[1]["measured"] = {"seconds_per_token": 7100.0, "kl": 4e-9}
    for plot in draw_plots(make_report(curves=curves, plans=plans, measured={})):
        assert not re.search(r"\b(nan|inf)\b", plot.svg)


def test_names_appear_literally() -> None:
    """HTML, TeX, a leading underscore, control characters and a color of ours, as an op's name."""
    curves = make_curves()
    curves["roofline"]["ops"][0]["op"] = HOSTILE
    measured = {HOSTILE: {"seconds": 2.0}}
    predicted = {"decode": {"seconds_by_op": {HOSTILE: 0.1, "$x$": 0.2}}, HOSTILE: {"seconds": 1.0}}
    report = make_report(predicted=predicted, measured=measured, curves=curves)
    shown = plots_of(report)
    expected = HOSTILE.replace("\x1b", "\ufffd").replace("\u202e", "\ufffd")
    assert expected in [name for *_, name in shown[TITLES[0]].legend]
    assert expected in [name for *_, name in shown["Roofline"].legend]
    assert expected in ElementTree.fromstring(shown["Roofline"].svg).get("aria-label", "")
    rows = words_of(shown["Predicted against measured"])
    assert any("<script>" in row for row in rows)
    page = report.to_html()
    assert "<script" not in page and "\x1b" not in page and "\u202e" not in page


def test_dollar_signs_in_a_picture_are_text() -> None:
    with style():
        figure, axes = new_figure()
        axes.set_xlabel(r"$\frac{1}{2}$ & <b>")
        svg = to_svg(figure, "test", "a test")
    assert r"$\frac{1}{2}$ & <b>" in [node.text for node in ElementTree.fromstring(svg).iter("text")]


def test_colors_are_those_of_the_page(drawn: dict[str, Plot]) -> None:
    defined = set(re.findall(r"(--[a-z0-9]+):", make_report()._repr_html_()))
    for plot in drawn.values():
        assert set(re.findall(r"var\((--[a-z0-9]+)\)", plot.svg)) <= defined
        assert INK not in plot.svg and not re.search(r"#[0-9a-f]{6}\b", plot.svg)
        assert "<style" not in plot.svg and "font-family" not in plot.svg


def test_ids_are_unique_and_references_resolve(drawn: dict[str, Plot]) -> None:
    everything = "".join(plot.svg for plot in drawn.values())
    ids = re.findall(r'\bid="([^"]+)"', everything)
    assert len(ids) == len(set(ids)) > 0
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', everything)) == set(ids)


def test_the_page_is_the_same_each_time_and_whatever_the_style() -> None:
    first = make_report().to_html()
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        changed = dict(matplotlib.rcParams)
        assert make_report().to_html() == first
        assert dict(matplotlib.rcParams) == changed  # the caller's style is put back
    assert dict(matplotlib.rcParams) == before


def test_matplotlib_is_imported_for_pages_only() -> None:
    code = (
        "import sys; from graphwright.optimizer.report import Report; r = Report('m', 'cpu');"
        "str(r); r.to_json(); assert 'matplotlib' not in sys.modules;"
        "r.to_html(); assert 'matplotlib' in sys.modules; assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
