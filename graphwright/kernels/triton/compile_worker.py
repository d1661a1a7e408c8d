"""The process that compiles: ``python -m graphwright.kernels.triton.compile_worker``.

One JSON document a line. In, first ``{"backend", "arch", "warp_size"}``, then variants as
:func:`graphwright.kernels.triton.variant.describe` writes them; out, for each variant in order, what was
compiled or ``{"error": text}``. Triton's own just-in-time call does the work, over a driver that only names
the target: the binary and the key in Triton's cache are those of a machine with such a GPU.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

_MOST_TEXT = 2000


@dataclass(frozen=True)
class NamedTarget:
    """A driver without a device: as much of one as compiling asks for."""

    target: Any

    def get_current_target(self) -> Any:
        """The ``GPUTarget`` that is compiled for."""
        return self.target

    def get_current_device(self) -> int:
        """The only device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Nothing is launched."""
        return 0


def activate(backend: str, arch: int | str, warp_size: int) -> None:
    """Let this process compile for a target, whatever GPU it has."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    driver.set_active(NamedTarget(GPUTarget(backend, arch, warp_size)))


def compile_variant(data: dict[str, Any]) -> dict[str, Any]:
    """Compile one variant for the active target."""
    from graphwright.kernels.triton.variant import rebuild

    kernel, call = rebuild(data)
    made = kernel.run(grid=(1,), warmup=True, **call)
    binary = next(kind for kind in ("cubin", "hsaco") if kind in made.asm)
    group = {name: Path(path) for name, path in made.metadata_group.items()}
    note = next(path for name, path in group.items() if name.endswith(".json"))
    usage = nvidia_usage(made.asm[binary]) if binary == "cubin" else amd_usage(made.asm["amdgcn"])
    return {
        "key": made.hash,
        "name": note.stem,
        "kind": binary,
        "binary": base64.b64encode(made.asm[binary]).decode(),
        "metadata": note.read_text(),
        "shared": made.metadata.shared,
        "num_warps": made.metadata.num_warps,
        **usage,
    }


def nvidia_usage(cubin: bytes) -> dict[str, int]:
    """Registers and private bytes of a thread, as ``cuobjdump`` (part of Triton) reads them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "spills": found["STACK"] + found["LOCAL"]}


def amd_usage(assembly: str) -> dict[str, int]:
    """The same of an AMD kernel, from the metadata in its assembly."""
    counts = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", assembly))
    return {"registers": int(counts["vgpr_count"]), "spills": int(counts["private_segment_fixed_size"])}


def _text(error: BaseException) -> str:
    """What an error and those that it came from say; the innermost, which says most, last."""
    own = f"{type(error).__name__}: {error}".strip()
    return own if error.__cause__ is None else f"{own}\n{_text(error.__cause__)}"


def _answer(line: str) -> dict[str, Any]:
    try:
        return compile_variant(json.loads(line))
    except Exception as error:
        return {"error": _text(error)[-_MOST_TEXT:]}


def main(lines: TextIO, answers: TextIO) -> None:
    """Answer until the input ends."""
    target = json.loads(lines.readline())
    activate(target["backend"], target["arch"], target["warp_size"])
    for line in lines:
        answers.write(json.dumps(_answer(line)) + "\n")
        answers.flush()


if __name__ == "__main__":
    # Compilers print where they like: answers get a channel of their own.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main(sys.stdin, channel)
