"""Correctness on the chip: the tests of ``tests/gpu``, in a process of their own."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from gpu_device import Device

_ROOT = Path(__file__).resolve().parents[1]
# In a rehearsal: what takes the interpreter a second or two.
_TOY = "one_token_over_slots or greedy_choice"
_MOST_PROCESSES = 8


def measure(device: Device) -> dict[str, Any]:
    """Run them until the time is used up; several processes, as most of their time is compiling."""
    environment = {name: text for name, text in os.environ.items() if name != "GRAPHWRIGHT_GPU_TESTS"}
    limit = max(30.0, device.left - 10)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        arguments = ["tests/gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        if device.toy:
            environment["GRAPHWRIGHT_GPU_TESTS"] = "cpu"
            arguments += ["-k", _TOY]
        elif importlib.util.find_spec("xdist") is not None:
            arguments += ["-n", str(min(_MOST_PROCESSES, os.cpu_count() or 1)), "--dist", "load"]
        environment["PYTHONPATH"] = os.pathsep.join([str(_ROOT), environment.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "pytest", *arguments]
        try:
            done = subprocess.run(
                command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=limit
            )
            said = done.stdout + done.stderr
        except subprocess.TimeoutExpired as late:
            device.note(f"tests/gpu did not end within {limit:.0f} s")
            said = _text(late.stdout) + _text(late.stderr)
        found = _summary(report)
    found["last_lines"] = said.strip().splitlines()[-8:]
    return found


def _text(out: bytes | str | None) -> str:
    return out.decode(errors="replace") if isinstance(out, bytes) else out or ""


def _summary(report: Path) -> dict[str, Any]:
    """Counts, and what failed with its first lines; nothing but zeros without a report."""
    found: dict[str, Any] = {"passed": 0, "skipped": 0, "failed": []}
    if not report.is_file():
        return found
    for case in ET.parse(report).iter("testcase"):
        problem = case.find("failure")
        problem = case.find("error") if problem is None else problem
        if problem is not None:
            lines = re.sub(r"\s+", " ", problem.get("message") or "")
            found["failed"].append(f"{case.get('classname')}::{case.get('name')}: {lines[:300]}")
        elif case.find("skipped") is not None:
            found["skipped"] += 1
        else:
            found["passed"] += 1
    return found
