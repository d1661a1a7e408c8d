"""Compile launches without a GPU: for every architecture, in processes of their own.

A compiler that crashes or hangs costs one variant and not the caller. Triton's cache on disk
(``TRITON_CACHE_DIR``) serves both this and later runs on a GPU: :class:`Compiled` carries the key.
"""

from __future__ import annotations

import base64
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO, Any

from graphwright.kernels.triton import installed
from graphwright.kernels.triton.launch import Launch
from graphwright.kernels.triton.variant import CompileError, describe

#: Seconds that one variant may take.
TIME_LIMIT_S = 180.0
_INSTALL = 'pip install "graphwright[triton]" on Linux'
_WORKER = "graphwright.kernels.triton.compile_worker"


@dataclass(frozen=True)
class Architecture:
    """What kernels are compiled for.

    Attributes:
        name: as targets name it, ``sm_90`` or ``gfx942``.
        backend: Triton's: ``cuda`` or ``hip``.
        arch: as Triton names it.
        warp_size: lanes of a warp or wavefront.
        shared: bytes of shared memory that one program may use. NVIDIA: CUDA C++ Programming Guide 13.0,
            table "Technical Specifications per Compute Capability"; AMD: the CDNA 3 and CDNA 4
            instruction set references, size of the local data share.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared: int


_SM = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}  # KiB of shared memory
_GFX = {"gfx90a": 64, "gfx942": 64, "gfx950": 160}
ARCHITECTURES: dict[str, Architecture] = {
    **{f"sm_{n}": Architecture(f"sm_{n}", "cuda", n, 32, kib << 10) for n, kib in _SM.items()},
    **{name: Architecture(name, "hip", name, 64, kib << 10) for name, kib in _GFX.items()},
}


@dataclass(frozen=True)
class Compiled:
    """One compiled variant, or why there is none.

    Attributes:
        label: of the launch.
        arch: the architecture's name.
        key: Triton's cache key (hexadecimal) of the variant.
        name: of the kernel; files in Triton's cache begin so.
        kind: ``cubin`` or ``hsaco``.
        binary: what the GPU loads.
        metadata: what Triton keeps beside it, JSON text.
        registers: of a thread.
        spills: bytes of private memory of a thread: 0 unless registers ran out or were indexed.
        shared: bytes of shared memory of a program.
        num_warps: of a program.
        error: why it did not compile or cannot be launched; None if it can.
    """

    label: str
    arch: str
    key: str = ""
    name: str = ""
    kind: str = ""
    binary: bytes = field(default=b"", repr=False)
    metadata: str = field(default="", repr=False)
    registers: int = 0
    spills: int = 0
    shared: int = 0
    num_warps: int = 0
    error: str | None = None

    @property
    def resources(self) -> dict[str, int]:
        """Registers, spills, shared memory and warps."""
        return {name: getattr(self, name) for name in ("registers", "spills", "shared", "num_warps")}


def architecture(name: str) -> Architecture:
    """The architecture of that name.

    Raises:
        CompileError: there is none.
    """
    if name not in ARCHITECTURES:
        raise CompileError(
            f"kernels are not compiled for {name!r}", hint=f"architectures: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def triton_version() -> str:
    """The version of the installed Triton.

    Raises:
        CompileError: there is none, or it is too old.
    """
    reason = installed()
    if reason is not None:
        raise CompileError(reason, hint=_INSTALL)
    import triton

    return str(triton.__version__)


def compile_launches(
    launches: Sequence[Launch], arch: str, processes: int | None = None, time_limit: float = TIME_LIMIT_S
) -> list[Compiled]:
    """Compile launches that were recorded on meta tensors.

    Args:
        arch: the architecture's name.
        processes: at most so many compile at once; the default is one a core.
        time_limit: seconds for one variant.

    Returns:
        One for each launch, in order; launches of one variant share their result but the label. One
        that does not compile holds the compiler's text in ``error``.

    Raises:
        CompileError: the architecture is unknown, Triton is missing or too old, or a launch has an
            argument that no kernel takes.
    """
    target = architecture(arch)
    triton_version()
    texts = [json.dumps(describe(launch), sort_keys=True) for launch in launches]
    answers = _answers(dict.fromkeys(texts), target, processes or _cores(), time_limit)
    return [_compiled(x.label, target, answers[text]) for x, text in zip(launches, texts, strict=True)]


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _compiled(label: str, target: Architecture, answer: Mapping[str, Any]) -> Compiled:
    if "error" in answer:
        return Compiled(label, target.name, error=answer["error"])
    values = {**answer, "binary": base64.b64decode(answer["binary"])}
    if answer["shared"] > target.shared:
        limit = f"needs {answer['shared']} bytes of shared memory, {target.name} has {target.shared}"
        values["error"] = f"the kernel {limit}"
    return Compiled(label, target.name, **values)


def _answers(
    texts: Mapping[str, None], target: Architecture, processes: int, time_limit: float
) -> dict[str, dict[str, Any]]:
    """The workers' answers by variant."""
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for text in texts:
        waiting.put(text)
    answers: dict[str, dict[str, Any]] = {}

    def work() -> None:
        with _Worker(target, time_limit) as worker:
            while True:
                try:
                    text = waiting.get_nowait()
                except queue.Empty:
                    return
                answers[text] = worker.ask(text)

    count = min(processes, len(texts))
    with ThreadPoolExecutor(max_workers=max(count, 1)) as pool:
        for done in [pool.submit(work) for _ in range(count)]:
            done.result()
    return answers


class _Worker:
    """A process that compiles one variant after the other; started again after a crash."""

    def __init__(self, target: Architecture, time_limit: float) -> None:
        self._target = {"backend": target.backend, "arch": target.arch, "warp_size": target.warp_size}
        self._time_limit = time_limit
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[str] | None = None

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def ask(self, text: str) -> dict[str, Any]:
        """Compile a variant; whatever goes wrong is its ``error``."""
        if self._process is None:
            self._start()
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(self._time_limit, stop)
        timer.start()
        try:
            process.stdin.write(text + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if line.endswith("\n"):
            return json.loads(line)
        return {"error": self._stop(late=late.is_set())}

    def _start(self) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 closed in _stop
        self._process = subprocess.Popen(
            [sys.executable, "-m", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(self._target) + "\n")

    def _stop(self, late: bool = False) -> str:
        """End the process; says how it ended."""
        process, log = self._process, self._log
        self._process = self._log = None
        if process is None or log is None:
            return ""
        try:
            process.communicate(timeout=10)
        except (subprocess.TimeoutExpired, BrokenPipeError, ValueError):
            process.kill()
            process.wait()
        with log:
            log.seek(0)
            said = log.read()[-1500:].strip()
        if late:
            return f"the compiler took longer than {self._time_limit:g} s"
        return f"the compiler died (exit code {process.returncode}): {said or 'it said nothing'}"


def install(key: str, name: str, files: Mapping[str, bytes]) -> bool:
    """Put a compiled variant into Triton's cache on disk, where the just-in-time compiler looks first.

    Args:
        key: Triton's cache key, as :class:`Compiled` has it.
        name: of the kernel.
        files: the binary and the metadata under their names in the cache.

    Returns:
        Whether it was missing there.
    """
    from triton.runtime.cache import get_cache_manager

    cache = get_cache_manager(key)
    note = f"{name}.json"
    if cache.get_group(note):
        return False
    cache.put_group(note, {file: cache.put(content, file) for file, content in files.items()})
    return True
