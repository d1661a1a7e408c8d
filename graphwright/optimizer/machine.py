"""What this machine is, and whether the library's bfloat16 matrix products survive on it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from graphwright.cost_model.host import cache_folder, cpu_name

_PROBE = (
    "import torch; x = torch.ones(64, 576, dtype=torch.bfloat16); "
    "torch.nn.functional.linear(x, torch.ones(576, 576, dtype=torch.bfloat16)).sum().item()"
)
_LIMIT = "ONEDNN_MAX_CPU_ISA"


def versions() -> dict[str, str]:
    """What a number in a report depends on."""
    import transformers

    try:
        own = version("graphwright")
    except PackageNotFoundError:
        own = "source"
    return {
        "graphwright": own,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "threads": str(torch.get_num_threads()),
    }


@cache
def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def library_bfloat16_works() -> bool:
    """Whether torch's own bfloat16 products run here.

    Some virtual machines announce AMX and refuse its instructions; oneDNN then dies with SIGILL unless
    it is limited with ``ONEDNN_MAX_CPU_ISA``. Tried once in a process of its own, and remembered.
    """
    if "amx_tile" not in _cpuinfo() or os.environ.get(_LIMIT):
        return True
    key = hashlib.sha256(f"{cpu_name()} {torch.__version__} {platform.release()}".encode()).hexdigest()[:16]
    record = cache_folder() / f"bfloat16-{key}.json"
    with contextlib.suppress(OSError, ValueError, KeyError):
        return bool(json.loads(record.read_text())["works"])
    works = subprocess.run([sys.executable, "-c", _PROBE], check=False, capture_output=True).returncode == 0
    with contextlib.suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps({"works": works}))
    return works


@contextlib.contextmanager
def safe_library(dtype: torch.dtype, device: torch.device) -> Iterator[bool]:
    """Run stock modules without crashing; yields whether the library runs at its own speed."""
    if device.type != "cpu" or dtype is not torch.bfloat16 or library_bfloat16_works():
        yield True
        return
    with torch.backends.mkldnn.flags(enabled=False):
        yield False
