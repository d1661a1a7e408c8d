"""The committed figures of selected pages and evicted caches hold what is claimed of them."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.sparse_report import better_than_oracle, mispriced, page, worse_than_random

ROOT = Path(__file__).resolve().parents[2]
RESULTS = json.loads((ROOT / "benchmarks/results/sparse_quality.json").read_text())
TEXT = RESULTS["text"]["rows"]


def test_no_selector_is_worse_than_chance_nor_better_than_the_oracle() -> None:
    assert worse_than_random(TEXT) == []
    assert better_than_oracle(TEXT) == []


def test_lists_hold_the_bytes_that_the_cost_model_says() -> None:
    assert any("predicted_bytes" in row for row in TEXT)
    assert mispriced(TEXT) == []


def test_lists_that_hold_everything_change_nothing() -> None:
    whole = [row for row in TEXT if row["note"] == "everything read"]
    assert whole and all(row["kl"]["mean"] == 0 for row in whole)


def test_dense_passes_bound_the_drift() -> None:
    """What the cache has lost late along a text, where everything is read: little after dense passes."""
    rows = [row for row in RESULTS["drift"]["rows"] if row["along"] == "the text"]
    without, rectified = ([bucket["mean"] for bucket in row["left"]] for row in rows)
    half = len(without) // 2
    assert sum(without[half:]) > sum(without[:half])
    assert sum(rectified[half:]) < sum(without[half:]) / 2


def test_the_page_is_written_from_the_results() -> None:
    assert (ROOT / "docs/sparse_quality.md").read_text() == page(RESULTS)
