"""Where the GPU benchmark runs: the GPU at hand, or a stand-in for rehearsals on a CPU.

The stand-in runs the same code at toy sizes, kernels in Triton's interpreter. What it measures means nothing.
"""

from __future__ import annotations

import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from graphwright.kernels.triton.devices import DeviceFacts, device_facts, planned_device

Call = Callable[[], object]

# A graph that is timed holds launches for about so long, and is replayed for about so long in all.
_GRAPH_SECONDS, _REPLAY_SECONDS = 2e-3, 8e-2
_LEAST_REPLAYS, _MOST_LAUNCHES = 10, 200


class OutOfTime(Exception):
    """The time that was given is used up."""


@dataclass
class Device:
    """A device and how work on it is timed.

    Attributes:
        device: where tensors are.
        dtype: of models and caches: bfloat16, on the stand-in float32.
        toy: this is the stand-in.
        deadline: ``time.monotonic()`` when to stop.
        notes: what did not go as planned.
    """

    device: torch.device
    dtype: torch.dtype
    toy: bool
    deadline: float
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, toy: bool, seconds: float) -> Device:
        """The first GPU, or the stand-in.

        Raises:
            SystemExit: there is no GPU.
        """
        deadline = time.monotonic() + seconds
        if toy:
            return cls(torch.device("cpu"), torch.float32, True, deadline)
        if not torch.cuda.is_available():
            raise SystemExit("torch sees no GPU; --toy rehearses this benchmark without one")
        return cls(torch.device("cuda", 0), torch.bfloat16, False, deadline)

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def need(self, seconds: float, what: str) -> None:
        """Go on only if so many seconds are left.

        Raises:
            OutOfTime: they are not.
        """
        if self.left < seconds:
            raise OutOfTime(f"{what}: {max(self.left, 0):.0f} s left, about {seconds:.0f} needed")

    def note(self, text: str) -> None:
        """Say and keep what did not go as planned."""
        print(f"  note: {text}", flush=True)
        self.notes.append(text)

    def attempt(self, what: str, body: Callable[[], Any]) -> Any:
        """What ``body`` gives, or None with a note if it fails: for what others' code does."""
        try:
            return body()
        except OutOfTime:
            raise
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            self.note(f"{what} failed: {type(error).__name__}: {lines[0][:300]}")
            return None
        finally:
            self.free()

    def sync(self) -> None:
        """Wait until everything that was queued is done."""
        if not self.toy:
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Give unused memory back."""
        gc.collect()
        if not self.toy:
            torch.cuda.empty_cache()

    @property
    def memory(self) -> int:
        """Bytes that may still be allocated."""
        return 1 << 28 if self.toy else int(torch.cuda.mem_get_info(self.device)[0])

    @property
    def facts(self) -> DeviceFacts:
        """What kernels' configurations depend on."""
        return planned_device("h200") if self.toy else device_facts(self.device)

    @property
    def architecture(self) -> str:
        """What Triton compiles for here, as ``ahead.py`` names it; empty if it does not know it."""
        from graphwright.kernels.triton.ahead import ARCHITECTURES

        if self.toy:
            return "sm_90"
        found = torch.cuda.get_device_properties(self.device)
        if torch.version.hip:
            name = found.gcnArchName.split(":")[0]
        else:
            name = "sm_{}{}".format(*torch.cuda.get_device_capability(self.device))
        return name if name in ARCHITECTURES else ""

    # --- timing ----------------------------------------------------------------------------------

    def seconds(self, calls: Sequence[Call]) -> float:
        """Median seconds of one call: a graph runs all of them in turn, over inputs of their own.

        Inputs that are larger than the caches together are read from memory every time.
        """
        for call in calls:
            call()
        self.sync()
        if self.toy:
            return self._wall(calls)
        once = self._events(calls) / len(calls)
        rounds = max(1, min(_MOST_LAUNCHES // len(calls), round(_GRAPH_SECONDS / (once * len(calls)))))
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for _ in range(rounds):
                    for call in calls:
                        call()
        except RuntimeError as error:
            self.note(f"timed without a graph: {str(error).splitlines()[0][:200]}")
            return statistics.median(self._events(calls) for _ in range(_LEAST_REPLAYS)) / len(calls)
        graph.replay()
        whole = self._events([graph.replay])
        replays = max(_LEAST_REPLAYS, min(100, round(_REPLAY_SECONDS / whole)))
        return statistics.median(self._events([graph.replay]) for _ in range(replays)) / (rounds * len(calls))

    def elapsed(self, body: Call) -> float:
        """Seconds from the start of ``body`` to the end of what it queued."""
        self.sync()
        return self._wall([body]) if self.toy else self._events([body])

    def _events(self, calls: Sequence[Call]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def _wall(self, calls: Sequence[Call]) -> float:
        started = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - started) / len(calls)

    def host_seconds(self, body: Call) -> float:
        """Seconds that the host is busy with ``body``, whatever the device still does."""
        self.sync()
        started = time.perf_counter()
        body()
        took = time.perf_counter() - started
        self.sync()
        return took

    def timer(self, call: Call) -> float:
        """For tuning: seconds of one call, without a graph's capture for each candidate."""
        if self.toy:
            return self._wall([call])
        from triton.testing import do_bench

        return float(do_bench(call, warmup=5, rep=25, return_mode="median")) / 1e3

    def sets(self, nbytes: float) -> int:
        """How many input sets of so many bytes it takes to get past the last-level cache."""
        return 1 if self.toy else max(1, min(16, -(-3 * self.facts.l2 // max(int(nbytes), 1))))


# --- what the machine is ---------------------------------------------------------------------------


def describe(device: Device) -> dict[str, Any]:
    """GPU, driver and versions."""
    import transformers
    import triton

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
    }
    if device.toy:
        return {"gpu": "none: a rehearsal in Triton's interpreter", **found}
    properties = torch.cuda.get_device_properties(device.device)
    return {
        "gpu": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "driver": _driver(),
        "cuda": torch.version.cuda or torch.version.hip,
        **found,
    }


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def command() -> str:
    """How this process was called."""
    return " ".join(["python", *sys.argv])


def write(path: Path | None, record: dict[str, Any]) -> None:
    """Write the results so far, whole or not at all."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(record, indent=2) + "\n")
    draft.replace(path)


# --- ceilings --------------------------------------------------------------------------------------


def ceilings(device: Device) -> dict[str, float]:
    """Bytes per second of copying (read and written), operations per second of a product of matrices."""
    nbytes, side = (1 << 20, 64) if device.toy else (4 << 30, 8192)
    source = torch.randint(-128, 127, (nbytes,), dtype=torch.int8, device=device.device)
    target = torch.empty_like(source)
    copy = device.seconds([partial(target.copy_, source)])
    a, b = (torch.randn(side, side, device=device.device).to(device.dtype) for _ in range(2))
    product = device.seconds([partial(torch.mm, a, b)])
    return {"copy_bytes_per_second": 2 * nbytes / copy, "matmul_flops_per_second": 2 * side**3 / product}
