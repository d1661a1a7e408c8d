"""Every example runs offline, in its own process, and prints what it promises."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"

# What a reader must find in the output of each.
EXPECTED = {
    "quickstart.py": ("greedy tokens identical to stock transformers", "graphwright report", "place_cache"),
    "torch_compile_backend.py": ("largest difference of a logit", "graphwright report"),
    "what_if.py": ("h100", "128,000", "GiB", "graphwright report"),
    "write_a_pass.py": (
        "slide_window{tokens=64}",
        "mean KL against the stock model",
        "sees the newest 64 tokens",
    ),
    "inspect_the_report.py": ("semantic ops found", "layer_norm", "saved as HTML", "graphwright report"),
}
NEEDS_THE_DEMO_MODEL = {"demo.py"}


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(EXPECTED) | NEEDS_THE_DEMO_MODEL


def run_example(name: str, *arguments: str) -> str:
    finished = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return finished.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_example(name: str) -> None:
    output = run_example(name)
    for words in EXPECTED[name]:
        assert words in output


@pytest.mark.slow
def test_demo(demo_model_dir: Path) -> None:
    model = ("--model", str(demo_model_dir), "--gguf", "SmolLM2-135M-Instruct.Q4_1.gguf")
    output = run_example("demo.py", *model, "--generate", "8")
    assert output.count("stock transformers: ") == 3
    assert "graphwright report" in output
