"""The report: round trip, schema, text that fits, HTML that escapes."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from graphwright.ir.errors import InputError
from graphwright.optimizer.quantities import combined, duration, label, quantity
from graphwright.optimizer.report import SCHEMA_FILE, Decision, Report, Status
from graphwright.optimizer.report_text import group_decisions, timing_line, workload_line

HOSTILE = '<script>alert("x")</script> [red]not markup[/red] \x1b[31m & \u202e'


def make_report(**changes: object) -> Report:
    """A report with something in every section; 30 layers decide alike."""
    layers = [
        Decision(
            "place_cache",
            f"layers.{layer}",
            Status.APPLIED,
            "keys and values are the minimum cut",
            {"seconds_per_token": -1e-4},
            {"seconds_per_token": -2e-4},
        )
        for layer in range(30)
    ]
    others = [
        Decision("absorb_projections", "", Status.NOT_FOUND, "no layer stores a latent"),
        Decision("place_cache{cut=layer_input}", "layers.0", Status.UNPROFITABLE, "recomputing costs more"),
        Decision("speculate{drafter=ngram}", "", Status.UNDONE, "slower", {"speedup": 1.3}, {"speedup": 0.9}),
        Decision("linear", "lm_head", Status.FALLBACK, "no compiler", None, None, "reordered"),
        Decision("fuse", "layers.1", Status.ILLEGAL, "the weights have different dtypes"),
    ]
    values: dict[str, object] = {
        "model": "LlamaForCausalLM, 134.5 M parameters, bfloat16",
        "target": "cpu",
        "workload": {"batch": 1, "prompt": 256, "generate": 64, "shared_prefix": 0},
        "decisions": [*layers, *others],
        "predicted": {
            "decode": {"seconds_per_token": 0.0071, "tokens_per_second": 140.8, "bound": "memory"},
            "memory": {"weights_bytes": 269_000_000, "cache_bytes": 7_372_800},
        },
        "measured": {
            "decode": {"seconds_per_token": 0.0078, "tokens_per_second": 128.2},
            "quality": {"max_abs_logit_difference": 0.0, "mean_kl": 0.0, "top1_agreement": 1.0},
            "seconds": {"capture": 5.4, "lower": 13.0},
        },
        "ops": {"rms_norm": 61, "attention": 30},
        "near_misses": ["layers.7.mlp: gate and up differ in dtype"],
        "kernels": [{"op": "linear", "provider": "cpp", "reason": "bfloat16"}] * 3,
        "speculation": {"drafter": "ngram", "tokens_per_cycle": 1.6},
        "code_before": "def forward(x):\n    return x\n",
        "code_after": "def forward(x):\n    return x + 0\n",
        "versions": {"graphwright": "0.1.0", "threads": 2},
    }
    return Report(**{**values, **changes})  # type: ignore[arg-type]


def test_json_round_trip_keeps_everything() -> None:
    report = make_report()
    assert Report.from_json(report.to_json()) == report


def test_json_matches_the_schema() -> None:
    schema = json.loads(SCHEMA_FILE.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    for report in (make_report(), Report("model", "cpu"), make_report(speculation=None)):
        jsonschema.validate(json.loads(report.to_json()), schema)


def test_schema_and_reader_refuse_the_same_documents() -> None:
    schema = json.loads(SCHEMA_FILE.read_text())
    good = json.loads(make_report().to_json())
    wrong_status = {**good, "decisions": [{**good["decisions"][0], "status": "maybe"}]}
    broken = [
        {**good, "schema": "graphwright.report/0"},
        {**good, "extra": 1},
        {**good, "ops": []},
        wrong_status,
    ]
    broken.append({key: value for key, value in good.items() if key != "target"})
    for document in broken:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(document, schema)
        with pytest.raises(InputError):
            Report.from_json(json.dumps(document))


def test_numbers_that_json_cannot_hold_become_null() -> None:
    report = make_report(
        measured={"quality": {"mean_kl": float("nan"), "max_abs_logit_difference": float("inf")}}
    )
    quality = json.loads(report.to_json())["measured"]["quality"]
    assert quality == {"mean_kl": None, "max_abs_logit_difference": None}


@pytest.mark.parametrize("text", ["", "[1]", '"report"', '{"schema": "graphwright.report/1", "mod'])
def test_a_damaged_file_is_refused_by_name(text: str) -> None:
    with pytest.raises(InputError) as caught:
        Report.from_json(text, where="saved.json")
    assert caught.value.where == "saved.json"
    assert caught.value.hint


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
    assert not parser.open and not parser.links
    assert not re.search(r"https?://|@import|url\(", page)
    words = " ".join(parser.words)
    for decision in report.decisions:
        assert decision.reason in words and decision.site in words
    assert report.code_before in words and report.code_after in words


def test_notebooks_and_rich_get_the_same_content() -> None:
    report = make_report()
    assert "place_cache" in report._repr_html_() and "<html" not in report._repr_html_()
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report)
    assert [line.rstrip() for line in console.export_text().splitlines()] == str(report).splitlines()


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
        ("flops", 2.7e8, "270 MFLOP"),
        ("top1_agreement", 0.995, "99.50%"),
        ("speedup", 0.914, "0.91x"),
        ("mean_kl", 1.2e-5, "1.20e-05"),
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
    assert label("mean_kl") == "mean KL"
    assert label("seconds_by_op_linear") == "time in linear"
    assert combined([{"speedup": 1.2}, {"speedup": 1.4}, None], "speedup") == "1.20x to 1.40x"
    assert combined([{"cache_bytes": 512}, {"cache_bytes": 512}], "cache_bytes") == "1 KiB"
    assert workload_line({"batch": 1, "prompt": 256, "shared_prefix": 0}) == "batch 1, prompt 256"
    assert timing_line(make_report()) == "18.4 s: capture 5.4 s, lower 13 s"
