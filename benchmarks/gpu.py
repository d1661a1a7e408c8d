"""What the GPU at hand gives: bandwidth, decode attention, whole models, speculation, and correctness.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json
    python benchmarks/gpu.py --only ceilings,attention --seconds 300
    python benchmarks/gpu.py --toy

Sections share a time limit: when it comes, what is left is skipped, and says so. Results are written after
every figure. Times are medians over replays of CUDA graphs that go round among inputs larger than the last
level cache together; models have random weights. ``--toy`` rehearses everything at toy sizes without a GPU,
kernels in Triton's interpreter: its times mean nothing, and are written nowhere unless ``--json`` says where.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# What a machine that was not set up for graphwright may lack.
NEEDED = (
    "torch", "triton", "transformers", "filelock", "matplotlib", "networkx", "numpy", "platformdirs", "rich",
    "safetensors", "scipy", "sympy", "typer",
)  # fmt: skip
SECTIONS = ("ceilings", "attention", "model", "speculation", "correctness")
SCHEMA = "graphwright.benchmark.gpu/1"
# What attention may take of the time, so that the model has its turn.
_ATTENTION_SHARE = 0.45
_SHORTEST = 20.0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--seconds", type=float, default=540.0, help="time limit of all of it")
    parser.add_argument("--toy", action="store_true", help="rehearse without a GPU")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    options.only = [name.strip() for name in options.only.split(",") if name.strip()]
    if unknown := sorted(set(options.only) - set(SECTIONS)):
        parser.error(f"no such section: {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what was asked for; the record as it is written."""
    import gpu_device
    from gpu_targets import judge

    device = gpu_device.Device.of(options.toy, options.seconds)
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "rehearsal": options.toy,
        "machine": gpu_device.describe(device),
        "command": gpu_device.command(),
        "date": time.strftime("%Y-%m-%d"),
        "dtype": str(device.dtype).removeprefix("torch."),
        "sections": {},
        "seconds": {},
        "notes": device.notes,
    }

    def save(name: str, found: dict[str, Any]) -> None:
        record["sections"][name] = found
        record["targets"] = judge(record["sections"], options.toy)
        gpu_device.write(options.json, record)

    sections = _Sections(device, save)
    names = ["ceilings", *(n for n in SECTIONS[1:] if n in options.only)]  # the others need the ceilings
    for name in names:
        started = time.monotonic()
        if device.left < _SHORTEST and name != "ceilings":
            device.note(f"{name} is skipped: no time is left")
            continue
        print(f"{name} ...", flush=True)
        found = device.attempt(name, getattr(sections, name))
        if found is not None:
            save(name, found)
        record["seconds"][name] = round(time.monotonic() - started, 1)
        gpu_device.write(options.json, record)
    return record


class _Sections:
    """One method a section; what several of them need is made once."""

    def __init__(self, device: Any, save: Callable[[str, dict[str, Any]], None]) -> None:
        self.device, self._save = device, save
        self._copy = 1.0
        self._bench: Any = None

    def _saving(self, name: str) -> Callable[[dict[str, Any]], None]:
        return partial(self._save, name)

    def ceilings(self) -> dict[str, Any]:
        """Copy bandwidth and matmul rate."""
        from gpu_device import ceilings

        found = ceilings(self.device)
        self._copy = found["copy_bytes_per_second"]
        return found

    def attention(self) -> dict[str, Any]:
        """Decode attention alone."""
        from gpu_attention import measure

        device = self.device
        end, device.deadline = device.deadline, time.monotonic() + device.left * _ATTENTION_SHARE
        try:
            return measure(device, self._copy, self._saving("attention"))
        finally:
            device.deadline = end

    def bench(self) -> Any:
        """The model."""
        if self._bench is None:
            from gpu_model import Bench

            self._bench = Bench(self.device)
        return self._bench

    def model(self) -> dict[str, Any]:
        """The whole model."""
        from gpu_model import measure

        return measure(self.device, self.bench(), self._copy, self._saving("model"))

    def speculation(self) -> dict[str, Any]:
        """Verification and what the host costs."""
        from gpu_model import speculation

        return speculation(self.device, self.bench(), self._saving("speculation"))

    def correctness(self) -> dict[str, Any]:
        """The tests on the chip."""
        from gpu_checks import measure

        self._bench = None
        self.device.free()
        return measure(self.device)


def main() -> None:
    """Measure, write, and print the table."""
    options = parse()
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise SystemExit(f"not installed here: {', '.join(missing)}; bring them as wheels, or pip install .")
    if importlib.util.find_spec("graphwright") is None:  # a checkout, not installed
        sys.path.insert(0, str(ROOT))
    os.environ["TRITON_INTERPRET"] = str(int(options.toy))  # before Triton's kernels are imported
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    record = run(options)
    from gpu_targets import show

    show(record)


if __name__ == "__main__":
    main()
