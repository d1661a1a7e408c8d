"""Configurations that were found fastest on a GPU, kept on disk.

Nothing is tuned by itself, least of all in the middle of a generation: :func:`tune_attention` is called
before, with something that runs the attentions in question, a step of one token for example. What it finds is
used from then on, by later processes too, as long as the GPU, Triton and these kernels stay the same.

There is one small file for a key. Files are replaced whole, so that writers need not wait for one another
and readers see all of a file or none; one that is damaged counts as absent and is written anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from graphwright.kernels.cpp.build import cache_dir
from graphwright.kernels.triton import configs
from graphwright.kernels.triton.configs import AttendConfig, AttendShape

Config = TypeVar("Config")
#: Gives the seconds that one call takes.
Timer = Callable[[Callable[[], object]], float]

_SCHEMA = "graphwright.tuned/1"
#: Candidates that are timed.
MOST = 8
#: How much faster than the predicted one another must be: what times differ by from run to run.
NOISE = 1.03


@dataclass(frozen=True)
class Key:
    """What a configuration was found for.

    Attributes:
        kernel: by name.
        device: as torch reports it.
        sizes: plain data; the tokens of a step are none of them.
    """

    kernel: str
    device: str
    sizes: Mapping[str, Any]

    def as_data(self) -> dict[str, Any]:
        """All that the fastest configuration depends on."""
        return {
            "kernel": self.kernel,
            "device": self.device,
            "sizes": dict(self.sizes),
            "triton": _triton_version(),
            "source": source_digest(),
        }

    @property
    def path(self) -> Path:
        """The file of this key."""
        text = json.dumps(self.as_data(), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:24]
        return cache_dir() / "tuned" / f"{self.kernel}-{digest}.json"


def attend_key(shape: AttendShape) -> Key:
    """The key of an attention."""
    sizes: dict[str, Any] = {f.name: getattr(shape, f.name) for f in fields(shape)}
    del sizes["device"], sizes["tokens"]
    sizes["dtype"] = str(shape.dtype).removeprefix("torch.")
    sizes["codecs"] = list(shape.codecs)
    return Key("attend", shape.device.name, sizes)


@cache
def _triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return ""


@cache
def source_digest() -> str:
    """Of the kernels' source: another kernel may like another configuration."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


# --- reading and writing -------------------------------------------------------------------------


def tuned(key: Key, kind: type[Config] = AttendConfig) -> Config | None:  # type: ignore[assignment]
    """What was found fastest; None if nothing was, or its file is damaged.

    Args:
        key: what for.
        kind: a dataclass of whole numbers.
    """
    try:
        data = json.loads(key.path.read_text(encoding="utf-8"))
        found = data["config"] if data["schema"] == _SCHEMA and data["key"] == key.as_data() else {}
    except (OSError, ValueError, LookupError, TypeError):
        return None
    names = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    if not isinstance(found, dict) or sorted(found) != sorted(names):
        return None
    if not all(type(number) is int and number > 0 for number in found.values()):
        return None
    return kind(**found)


def store(key: Key, config: Any, seconds: Sequence[float | None] = ()) -> bool:
    """Keep a configuration, with the times of all candidates; whether the folder could be written."""
    data = {"schema": _SCHEMA, "key": key.as_data(), "config": asdict(config), "seconds": list(seconds)}
    try:
        _replace_file(key.path, json.dumps(data, indent=1).encode())
    except OSError:
        return False
    configs.forget()
    return True


def _replace_file(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


# --- tuning --------------------------------------------------------------------------------------


def tune(
    runner: Callable[[Config], Callable[[], object]],
    candidates: Sequence[Config],
    key: Key,
    *,
    timer: Timer | None = None,
    most: int = MOST,
) -> Config:
    """Time the first candidates and keep the fastest.

    Args:
        runner: gives a function that runs the kernel in a configuration.
        candidates: by predicted time. The first stays unless another is faster by more than noise.
        key: under which the answer is kept.
        timer: seconds of a call; by default the median on the GPU at hand, caches flushed.
        most: how many candidates are timed.

    Raises:
        Exception: what the first candidate raised, if none of them runs.
    """
    timer = timer or _gpu_seconds
    times: list[float | None] = []
    failure: Exception | None = None
    for config in candidates[:most]:
        try:
            times.append(timer(runner(config)))
        except Exception as error:  # too much shared memory, or the compiler gives up
            failure = failure or error
            times.append(None)
    worked = [(seconds, config) for seconds, config in zip(times, candidates, strict=False) if seconds]
    if not worked:
        raise failure or ValueError("there is nothing to tune")
    fastest, best = min(worked, key=lambda pair: pair[0])
    if worked[0][0] <= fastest * NOISE:
        best = worked[0][1]
    store(key, best, times)
    return best


def tune_attention(
    run: Callable[[], object], *, timer: Timer | None = None, most: int = MOST
) -> dict[AttendShape, AttendConfig]:
    """Tune the attentions that a call runs and that were not tuned before.

    Args:
        run: something on the GPU that can be repeated and takes about the same time again: an attention, or a
            step of one token. Not while a CUDA graph is captured.
        timer, most: as in :func:`tune`.

    Returns:
        The configuration of each attention, new or kept.
    """
    with configs.asked() as shapes:
        run()
    chosen: dict[AttendShape, AttendConfig] = {}
    for shape in dict.fromkeys(replace(shape, tokens=1) for shape in shapes):
        key = attend_key(shape)

        def runner(config: AttendConfig, shape: AttendShape = shape) -> Callable[[], object]:
            def call() -> object:
                with configs.trying(shape, config):
                    return run()

            return call

        chosen[shape] = tuned(key) or tune(runner, configs.candidates(shape), key, timer=timer, most=most)
    return chosen


def _gpu_seconds(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, return_mode="median")) / 1e3
