"""``benchmarks/gpu.py`` rehearsed at toy sizes: every section gives its figures without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What it wrote, and what it said."""
    folder = tmp_path_factory.mktemp("gpu")
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "benchmarks/gpu.py", "--toy", "--json", str(folder / "gpu.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "gpu.json").read_text()), done.stdout


@pytest.mark.slow
def test_every_section_gives_its_figures(rehearsal: tuple[dict[str, Any], str]) -> None:
    record, said = rehearsal
    assert record["notes"] == []  # nothing failed, nothing was left out
    assert record["rehearsal"] and "times mean nothing" in said
    sections = record["sections"]
    assert set(sections) == {"ceilings", "attention", "model", "speculation", "correctness"}
    assert all(figure > 0 for figure in sections["ceilings"].values())
    attention = sections["attention"]
    assert attention["compiled_ahead"]["kernels"] > 0 and attention["compiled_ahead"]["errors"] == []
    assert len(attention["dense"]) == 2 and len(attention["selection"]) == 1 and len(attention["codecs"]) == 2
    for row in attention["dense"]:
        assert row["sdpa_seconds"] > 0 and row["flex_seconds"] > 0 and row["first_seconds"] > 0
    assert all(row["speedup"] > 0 for row in attention["codecs"])
    for case in sections["model"]["cases"]:
        assert case["ratio"] > 0 and case["predicted_seconds"] > 0 and case["share_of_roofline"] > 0
    speculation = sections["speculation"]
    assert speculation["verify_8_over_decode_1"] > 0 and speculation["generate"]["seconds_per_token"] > 0
    assert set(speculation["gap_seconds"]) == set(speculation["host_seconds"]) == {"1", "8"}
    assert sections["correctness"]["passed"] > 5 and sections["correctness"]["failed"] == []
    assert [target["met"] for target in record["targets"]] == [None] * len(record["targets"])


@pytest.mark.slow
def test_attention_is_right_whatever_the_codec(rehearsal: tuple[dict[str, Any], str]) -> None:
    """Over really packed pages, against float64: what the kernel adds, and what the codec loses."""
    errors = rehearsal[0]["sections"]["attention"]["relative_errors"]
    assert errors["dense"] < 1e-5
    assert all(found["kernel"] < 1e-5 for found in errors["codecs"].values())
    totals = {name: found["total"] for name, found in errors["codecs"].items()}
    assert totals["float16"] < totals["int8"] < totals["int4"] < totals["int2"]
    assert totals["combined4"] < totals["combined3"] < totals["combined2"]
