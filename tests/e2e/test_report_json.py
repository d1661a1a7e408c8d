"""The report as JSON: round trip, schema, and what a reader refuses."""

from __future__ import annotations

import json

import jsonschema
import pytest

from graphwright.ir.errors import InputError
from graphwright.optimizer.plain_data import NUMBER, Either, misfit
from graphwright.optimizer.report import SCHEMA_FILE, Report
from tests.e2e.example_report import make_report

NEW_KEYS = ("compiled", "costs", "plans", "curves", "crossovers")


def test_json_round_trip_keeps_everything() -> None:
    report = make_report()
    assert Report.from_json(report.to_json()) == report


def test_json_matches_the_schema() -> None:
    schema = json.loads(SCHEMA_FILE.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    for report in (make_report(), Report("model", "cpu"), make_report(speculation=None)):
        jsonschema.validate(json.loads(report.to_json()), schema)


def test_documents_from_before_the_plans_still_read() -> None:
    document = json.loads(make_report().to_json())
    for key in NEW_KEYS:
        del document[key]
    jsonschema.validate(document, json.loads(SCHEMA_FILE.read_text()))
    report = Report.from_json(json.dumps(document))
    assert report == make_report(compiled={}, costs={}, plans=[], curves={}, crossovers=[])


BROKEN: dict[str, tuple[tuple[str | int, ...], object]] = {
    "another version": (("schema",), "graphwright.report/0"),
    "an unknown key": (("extra",), 1),
    "ops in a list": (("ops",), []),
    "an unknown status": (("decisions", 0, "status"), "maybe"),
    "a number for a model": (("model",), 3),
    "a reason that is no text": (("decisions", 0, "reason"), None),
    "words for a prediction": (("decisions", 0, "predicted"), {"speedup": "much"}),
    "costs in a list": (("costs",), []),
    "a cost without values": (("costs", "decode"), {"expression": {}, "at": {}}),
    "an expression that is a number": (("costs", "decode", "expression", "launches"), 187),
    "a context that is a word": (("costs", "decode", "at", "context"), "long"),
    "a value that is a truth": (("costs", "decode", "value", "seconds"), True),
    "plans in an object": (("plans",), {}),
    "a plan of one string": (("plans", 0, "passes"), "place_cache"),
    "a plan with a status of its own": (("plans", 0, "status"), "applied"),
    "a plan with a number too many": (("plans", 0, "speed"), 1.0),
    "a plan that predicts nothing": (("plans", 0, "predicted"), None),
    "an unknown curve": (("curves", "latency"), {}),
    "a curve without a limit": (("curves", "memory"), {"points": []}),
    "a point without a context": (("curves", "memory", "points", 0), {"cache_bytes": 1}),
    "an op without a name": (("curves", "roofline", "ops", 0), {"intensity": 1.0}),
    "an op that is slow in words": (("curves", "roofline", "ops", 0, "seconds"), "slow"),
    "a crossover in an unknown quantity": (("crossovers", 0, "quantity"), "price"),
    "a crossover at a word": (("crossovers", 0, "value"), "12"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_schema_and_reader_refuse_the_same_documents(name: str) -> None:
    path, value = BROKEN[name]
    document = json.loads(make_report().to_json())
    place = document
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, json.loads(SCHEMA_FILE.read_text()))
    with pytest.raises(InputError) as caught:
        Report.from_json(json.dumps(document), where="saved.json")
    assert caught.value.where == "saved.json"
    assert str(path[-1]) in str(caught.value) or path[-1] in ("schema", 0, "decode", "memory")


def test_schema_and_reader_ask_for_the_same_keys() -> None:
    schema = json.loads(SCHEMA_FILE.read_text())
    good = json.loads(make_report().to_json())
    for key in good:
        document = {name: value for name, value in good.items() if name != key}
        if key in NEW_KEYS:
            jsonschema.validate(document, schema)
            Report.from_json(json.dumps(document))
            continue
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(document, schema)
        with pytest.raises(InputError):
            Report.from_json(json.dumps(document))


def test_misfits_name_the_place() -> None:
    shape = {"a": [Either((str, {"*": NUMBER}))], "b?": frozenset({"x"})}
    assert misfit({"a": ["1", {"n": None}]}, shape) == ""
    assert misfit({"a": ["1", {"n": "2"}]}, shape).startswith("a[1].n is '2'")
    assert misfit({}, shape) == "a is missing"
    assert misfit({"a": [], "c": 1}, shape) == "c is not a key of this schema"
    assert misfit({"a": [], "b": "y"}, shape) == "b is 'y', not one of x"
    assert misfit([], shape) == "the document is [], not an object"


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
