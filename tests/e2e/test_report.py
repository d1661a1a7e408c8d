"""The report: text that fits, HTML that escapes, costs that print, quantities with their unit."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from graphwright.ir.errors import InputError
from graphwright.optimizer.quantities import (
    combined,
    count,
    duration,
    label,
    magnitude,
    memory_unit,
    quantity,
    shorten,
    time_unit,
)
from graphwright.optimizer.report import Decision, Report, Status
from graphwright.optimizer.report_rows import group_decisions, plan_rows, timing_line, workload_line
from tests.e2e.example_report import HOSTILE, make_cost, make_plan, make_plans, make_report


@pytest.mark.parametrize("width", [80, 100])
def test_text_fits_its_width_and_has_no_escapes(width: int) -> None:
    text = make_report().to_text(width)
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text
    assert text == make_report().to_text(width)


def test_text_tells_every_decision_and_reason() -> None:
    report = make_report()
    words = " ".join(report.to_text(140).split())
    for decision in report.decisions:
        assert decision.reason in words
        assert decision.status.value in words
    assert "30 sites" in words
    assert "predicted -3 ms, measured -6 ms" in words  # thirty sites add up
    assert "128" in words and "141" in words


def test_text_of_an_empty_report_has_the_header_only() -> None:
    text = str(Report("GPT2LMHeadModel", "cpu"))
    assert "GPT2LMHeadModel" in text
    assert "Decisions" not in text and "Kernels" not in text


def test_grouping_keeps_what_differs_apart() -> None:
    decisions = make_report().decisions
    groups = group_decisions(decisions)
    assert [len(group.decisions) for group in groups] == [30, 1, 1, 1, 1, 1]
    assert sum(len(group.decisions) for group in groups) == len(decisions)
    assert [group.sites for group in groups[:2]] == ["30 sites", "program"]


def test_names_cannot_inject_markup_or_escape_sequences() -> None:
    hostile = Decision(HOSTILE, HOSTILE, Status.APPLIED, HOSTILE, {HOSTILE: 1.0})
    report = make_report(
        model=HOSTILE,
        target=HOSTILE,
        decisions=[hostile, hostile],
        kernels=[{"op": HOSTILE, "provider": HOSTILE, "reason": HOSTILE}],
        near_misses=[HOSTILE],
        versions={HOSTILE: HOSTILE},
        code_before=HOSTILE,
        plans=[make_plan("chosen", 1.0, 1.0, 0.0, HOSTILE)],
        costs={HOSTILE: {**make_cost(), "expression": {"flops": {HOSTILE: HOSTILE}}}},
        crossovers=[{"what": HOSTILE, "quantity": "batch", "value": 2.0, "note": HOSTILE}],
    )
    text = str(report)
    assert "\x1b" not in text and "\u202e" not in text
    assert "[red]not markup[/red]" in " ".join(text.split())
    page = report.to_html()
    assert "<script" not in page and "\x1b" not in page and "\u202e" not in page


class _Balanced(HTMLParser):
    """Fails on a tag that is closed out of order; collects the text and the addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_html_is_one_offline_page_with_every_reason(tmp_path: Path) -> None:
    report = make_report()
    target = tmp_path / "report.html"
    page = report.to_html(target)
    assert target.read_text(encoding="utf-8") == page
    parser = _Balanced()
    parser.feed(page)
    assert not parser.open
    assert all(link.startswith("#") for link in parser.links)  # shapes that a picture repeats
    assert not re.search(r"https?://|@import|url\((?!#)", page)
    words = " ".join(parser.words)
    for decision in report.decisions:
        assert decision.reason in words and decision.site in words
    assert report.code_before in words and report.code_after in words


def test_notebooks_and_rich_get_the_same_content() -> None:
    report = make_report()
    fragment = report._repr_html_()
    assert "<html" not in fragment and "<svg" in fragment
    inside = re.search(r'<main class="gw">(.*)</main>', report.to_html(), re.DOTALL)
    assert inside is not None and inside[1] in fragment
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report)
    assert [line.rstrip() for line in console.export_text().splitlines()] == str(report).splitlines()


def test_a_cost_prints_expressions_and_values() -> None:
    text = str(make_report().cost("decode"))
    assert text.splitlines()[0] == "decode step at batch 1, context 288, tokens 1"
    assert "arithmetic: 269 MFLOP" in text and "bfloat16  2*B*T*134515008" in text
    assert "bytes read: 269 MiB" in text and "cache    46080*B*(C + T)" in text
    assert text.splitlines()[-1] == "time: 7.1 ms"


def test_long_expressions_wrap_and_lose_nothing() -> None:
    terms = " + ".join(f"{n}*B*C" for n in range(1, 60))
    cost = {**make_cost(), "expression": {"flops": {"float32": terms, HOSTILE: "1"}}}
    text = str(make_report(costs={"decode": cost}).cost("decode"))
    assert max(map(len, text.splitlines())) <= 100
    assert terms in " ".join(text.split())
    assert "\x1b" not in text


def test_an_unknown_phase_names_those_there_are() -> None:
    with pytest.raises(InputError) as caught:
        make_report().cost("verify")
    assert "verify" in str(caught.value) and "decode" in str(caught.value.hint)
    with pytest.raises(InputError):
        Report("model", "cpu").cost("decode")


def test_plans_are_ranked_and_told_by_their_difference() -> None:
    rows = plan_rows(make_report())
    assert [row.status for row in rows] == ["chosen", "undone", "runner-up", "runner-up"]
    assert [row.number for row in rows] == [1, 2, 3, 4]
    assert rows[1].changes == ("+ quantize_cache{bits=2}", "- quantize_cache{bits=4}")
    assert rows[3].changes == ("- quantize_cache{bits=4}",)
    assert rows[0].value("seconds_per_token") == "7.1 ms, measured 7.8 ms"
    without = plan_rows(make_report(plans=make_plans()[:1]))
    assert without[0].changes == () and without[0].passes == ("place_cache",)


@pytest.mark.parametrize("width", [80, 120])
def test_text_shows_plans_bound_and_crossovers(width: int) -> None:
    text = make_report().to_text(width)
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.replace("\u00a0", " ").split())
    assert ">1 place_cache" in words
    assert "decode is bound by memory: memory 6.2 ms, compute 1.1 ms" in words
    assert "speculation stops paying: From a batch of 12 on, it is compute-bound." in words
    assert (
        "the cache outweighs the weights at no context" in words
        and "it is full at context 9,000: Nothing fits" in words
    )
    assert "+ quantize_cache{bits=2}" in words and "undone: undone for a reason" in words
    assert "KL" in text and "0.004" in words


def test_exact_plans_need_no_column_for_quality() -> None:
    plans = [make_plan("chosen", 0.1, 1e8, 0.0, "a"), make_plan("runner-up", 0.2, 1e8, 0.0, "b")]
    report = make_report(plans=plans, measured={})
    for text in (report.to_text(80), report.to_html()):
        assert "Plans, all exact" in text and "KL (nats)" not in text and "perplexity" not in text


def test_plans_of_lossy_passes_are_not_called_exact() -> None:
    """The caller named the passes, so that nothing was predicted of their loss."""
    lossy = Decision("quantize_cache{bits=4}", "layers.0", Status.APPLIED, "", None, None, "lossy")
    report = make_report(plans=[make_plan("chosen", 0.1, 1e8, 0.0, "a")], decisions=[lossy], measured={})
    for text in (report.to_text(80), report.to_html()):
        assert "Plans" in text and "Plans, all exact" not in text


def test_text_does_not_drown_in_plans() -> None:
    plans = [make_plan("runner-up", 0.1 + n, 1e8, 0.0, f"pass{n}") for n in range(20)]
    report = make_report(plans=[*plans, make_plan("chosen", 0.05, 1e8, 0.0, "best")])
    text, page = str(report), report.to_html()
    assert "best" in text and "pass4" in text and "pass5" not in text
    assert "15 more" in text
    assert all(f">pass{n}<" in page for n in range(20))


def test_text_leaves_out_details_that_the_page_shows() -> None:
    decode = {"seconds_per_token": 0.01, "memory_seconds": 0.004, "seconds_by_op": {"linear": 0.003}}
    report = make_report(predicted={"decode": decode}, measured={}, decisions=[])
    assert "time in linear" not in str(report) and "10 ms" in str(report)
    assert "time in linear" in report.to_html() and "4 ms" in report.to_html()


def test_by_status() -> None:
    report = make_report()
    assert len(report.by_status(Status.APPLIED)) == 30
    assert [d.pass_name for d in report.by_status(Status.FALLBACK)] == ["linear"]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("seconds_per_token", 0.0071, "7.1 ms"),
        ("seconds", 2.5e-5, "25 us"),
        ("seconds", 75.0, "75 s"),
        ("weights_bytes", 512, "512 B"),
        ("weights_bytes", 3 * 2**30, "3 GiB"),
        ("bytes_per_second", 65e9, "65 GB/s"),
        ("tokens_per_second", 128.26, "128"),
        ("tokens_per_second", 15.7e6, "15.7 M"),
        ("flops", 2.7e8, "270 MFLOP"),
        ("top1_agreement", 0.995, "99.50%"),
        ("speedup", 0.914, "0.91x"),
        ("mean_kl", 1.2e-5, "1.2e-05"),
        ("kl", 0.0004, "0.0004"),
        ("perplexity_ratio", 1.0021, "1.002"),
        ("flops_per_second", 9.89e14, "989 TFLOP/s"),
        ("batch", 12000, "12,000"),
        ("bound", "memory", "memory"),
        ("anything", None, "-"),
    ],
)
def test_quantities_carry_the_unit_of_their_key(key: str, value: object, expected: str) -> None:
    assert quantity(key, value) == expected


@given(st.floats(min_value=1e-9, max_value=1e9))
def test_durations_keep_their_value(seconds: float) -> None:
    digits, unit = duration(seconds).split()
    scale = {"s": 1.0, "ms": 1e-3, "us": 1e-6}[unit]
    assert float(digits.replace(",", "")) * scale == pytest.approx(seconds, rel=0.006)


def test_labels_and_combination() -> None:
    assert label("seconds_per_token") == "time per token"
    assert label("mean_kl") == "mean KL" and label("kl") == "KL (nats)"
    assert (count(12.0), count(2.5), count(58_400.2)) == ("12", "2.5", "58,400")
    assert (magnitude(0.1), magnitude(1e11), magnitude(30_000)) == ("0.1", "100 G", "30 k")
    assert memory_unit(3 * 2**20) == (2.0**20, "MiB") and memory_unit(0) == (1.0, "B")
    assert time_unit(0.5) == (1e-3, "ms") and time_unit(2.0) == (1.0, "s")
    assert shorten("abcdef", 4) == "abc\u2026" and shorten("abcd", 4) == "abcd"
    assert label("seconds_by_op_linear") == "time in linear"
    assert combined([{"speedup": 1.2}, {"speedup": 1.4}, None], "speedup") == "1.20x to 1.40x"
    assert combined([{"cache_bytes": 512}, {"cache_bytes": 512}], "cache_bytes") == "1 KiB"
    assert workload_line({"batch": 1, "prompt": 256, "shared_prefix": 0}) == "batch 1, prompt 256"
    assert timing_line(make_report()) == "18.4 s: capture 5.4 s, lower 13 s"
