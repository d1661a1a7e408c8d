"""Decode attention at the heads of Llama-3.1-8B, beside the copy bandwidth and torch's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_device import Device, OutOfTime
from gpu_stores import Dense, Heads, Maker, Packed, Place, Selected, codec_errors, dense_error

from graphwright.kernels.triton import configs, tuning
from graphwright.kernels.triton.ahead import compile_launches, install
from graphwright.kernels.triton.configs import AttendConfig, AttendShape, planning_for
from graphwright.kernels.triton.launch import Launch, recording
from graphwright.kernels.triton.shipped import CODECS

_K = 1024
#: Batch and context of dense attention; the first ones matter most.
DENSE = (
    (8, 32 * _K), (1, 128 * _K), (8, 128 * _K), (1, 32 * _K), (64, 4 * _K), (64, 32 * _K), (8, 4 * _K),
    (1, 4 * _K), (1, 256 * _K), (8, 256 * _K),
)  # fmt: skip
PACKED = ((8, 128 * _K), (1, 128 * _K))
# FlexAttention is compiled anew for every size.
_FLEX = ((8, 128 * _K), (1, 128 * _K), (8, 32 * _K))
_CANDIDATES = 6


def sizes(device: Device) -> tuple[Heads, Sequence[tuple[int, int]], Sequence[tuple[int, int]]]:
    """Heads, dense cases and packed cases."""
    if device.toy:
        return Heads(4, 2, 64), ((2, 320), (1, 320)), ((1, 320),)  # sizes of no test, as tuning is kept
    return Heads(), DENSE, PACKED


def measure(device: Device, copy: float, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All of this section.

    Args:
        device: where.
        copy: bytes per second of a copy.
        save: called with the figures so far.
    """
    found: dict[str, Any] = {"dense": [], "codecs": [], "selection": []}
    heads, dense, packed = sizes(device)
    place = Place(device.device, device.dtype)
    try:
        found["compiled_ahead"] = device.attempt(
            "compiling ahead of time", partial(compile_ahead, device, list(_makers(device)))
        )
        save(found)
        for row in _measure_dense(device, place, heads, dense, copy):
            found["dense"].append(row)
            save(found)
        rivals = {(r["batch"], r["context"]): r for r in found["dense"]}
        for batch, context in packed:
            row = _measure_selected(device, place, heads, batch, context, copy)
            row["speedup_over_dense"] = _over(rivals.get((batch, context), {}).get("seconds"), row)
            found["selection"].append(row)
            save(found)
            for name in CODECS if not device.toy else ("int4", "combined3"):
                device.need(5, f"codec {name} at batch {batch}")
                made = partial(Packed.make, heads=heads, batch=batch, context=context, codecs=CODECS[name])
                row = {"codec": name, **_timed(device, place, made, batch, context, copy)}
                row["speedup"] = _over(rivals.get((batch, context), {}).get("best_seconds"), row)
                found["codecs"].append(row)
                save(found)
    except OutOfTime as late:
        device.note(f"attention stopped: {late}")
    found["relative_errors"] = _errors(device, place, heads)
    return found


def _over(rival: float | None, row: dict[str, Any]) -> float | None:
    return None if rival is None or row["seconds"] is None else rival / row["seconds"]


# --- ours ------------------------------------------------------------------------------------------


def _makers(device: Device) -> Iterator[Maker]:
    """Every kind of attention that is measured, at sizes that decide nothing but candidates."""
    heads, dense, packed = sizes(device)
    for batch, context in dense[:1] if device.toy else dense:
        yield partial(Dense.make, heads=heads, batch=batch, context=context)
    if device.toy:
        return
    for batch, context in packed:
        yield partial(Selected.make, heads=heads, batch=batch, context=context)
        for codecs in CODECS.values():
            yield partial(Packed.make, heads=heads, batch=batch, context=context, codecs=codecs)


def compile_ahead(device: Device, makers: Sequence[Maker]) -> dict[str, Any]:
    """Compile every candidate on all cores into Triton's cache, where tuning finds them.

    Launches are recorded on meta tensors, as for a GPU that is not here.
    """
    arch, meta = device.architecture, Place(torch.device("meta"), device.dtype)
    if not arch:
        return {"kernels": 0, "note": "Triton's name of this architecture is not known"}
    started = time.perf_counter()
    launches: list[Launch] = []
    for make in makers:
        with planning_for(device.facts):
            made = make(meta)
            with recording(), configs.asked() as shapes:
                made.run()
            for shape in dict.fromkeys(shapes):
                for config in configs.candidates(shape)[: 1 if device.toy else _CANDIDATES]:
                    with recording() as own, configs.trying(shape, config):
                        made.run()
                    launches += own
    kernels = compile_launches(launches, arch)
    usable = {k.key: k for k in kernels if k.error is None}
    if not device.toy:
        for key, k in usable.items():
            content = {f"{k.name}.{k.kind}": k.binary, f"{k.name}.json": k.metadata.encode()}
            install(key, k.name, content)
    errors = sorted({f"{k.label}: {k.error}"[:300] for k in kernels if k.error is not None})
    seconds = time.perf_counter() - started
    return {"kernels": len(usable), "seconds": seconds, "errors": errors}


def _timed(
    device: Device, place: Place, make: Maker, batch: int, context: int, copy: float
) -> dict[str, Any]:
    """Tune and time one attention; the first candidate as well."""
    row: dict[str, Any] = {"batch": batch, "context": context, "seconds": None}
    found = device.attempt(f"batch {batch}, context {context}", partial(_tune_and_time, device, place, make))
    if found is None:
        return row
    row |= found
    row["bytes_per_second"] = row["bytes"] / row["seconds"]
    row["share_of_copy"] = row["bytes_per_second"] / copy
    return row


def _tune_and_time(device: Device, place: Place, make: Maker) -> dict[str, Any]:
    one = make(place)
    inputs = [one, *(make(place) for _ in range(device.sets(one.nbytes) - 1))]
    calls = [i.run for i in inputs]
    started = time.perf_counter()
    most = 2 if device.toy else _CANDIDATES
    chosen = tuning.tune_attention(one.run, timer=device.timer, most=most)
    tuning_seconds = time.perf_counter() - started
    (shape, config), *_ = chosen.items()
    first = configs.candidates(shape)[0]
    seconds = device.seconds(calls)
    return {
        "seconds": seconds,
        "bytes": one.nbytes,
        "tuning_seconds": tuning_seconds,
        "config": asdict(config),
        "first_config": asdict(first),
        "first_seconds": seconds if _same(config, first) else _time_with(device, calls, shape, first),
    }


def _same(one: AttendConfig, other: AttendConfig) -> bool:
    return replace(one, block_m=other.block_m) == other


def _time_with(
    device: Device, calls: Sequence[Callable[[], object]], shape: AttendShape, config: AttendConfig
) -> float:
    with configs.trying(shape, config):
        return device.seconds(calls)


def _measure_dense(
    device: Device, place: Place, heads: Heads, cases: Sequence[tuple[int, int]], copy: float
) -> Iterator[dict[str, Any]]:
    for batch, context in cases:
        device.need(8, f"dense attention, batch {batch}, context {context}")
        nbytes = 2 * batch * heads.groups * context * heads.width * device.dtype.itemsize
        if nbytes * 1.25 > device.memory:
            device.note(f"batch {batch}, context {context} does not fit: {nbytes / 2**30:.0f} GiB")
            continue
        make = partial(Dense.make, heads=heads, batch=batch, context=context)
        row = _timed(device, place, make, batch, context, copy)
        made = [make(place) for _ in range(device.sets(nbytes))]
        row |= _rivals(device, made, (batch, context) in _FLEX or device.toy)
        del made
        device.free()
        times = [row[k] for k in ("seconds", "sdpa_seconds", "flex_seconds") if row.get(k)]
        row["best_seconds"] = min(times) if times else None
        yield row


def _measure_selected(
    device: Device, place: Place, heads: Heads, batch: int, context: int, copy: float
) -> dict[str, Any]:
    device.need(8, f"selection of pages at batch {batch}")
    make = partial(Selected.make, heads=heads, batch=batch, context=context)
    return {"share_of_pages": 1 / 16, **_timed(device, place, make, batch, context, copy)}


# --- torch's own -----------------------------------------------------------------------------------


def _rivals(device: Device, made: Sequence[Dense], with_flex: bool) -> dict[str, Any]:
    """Seconds of scaled_dot_product_attention, by backend, and of FlexAttention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def sdpa(x: Dense) -> torch.Tensor:
        return F.scaled_dot_product_attention(x.q, x.keys, x.values, enable_gqa=True)

    times: dict[str, float | None] = {}
    backends: dict[str, Any] = {"default": None}
    if not device.toy:
        backends |= {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    for name, backend in backends.items():

        def body(backend: Any = backend) -> float:
            calls = [partial(sdpa, x) for x in made]
            if backend is None:
                return device.seconds(calls)
            with sdpa_kernel(backend):
                return device.seconds(calls)

        times[name] = device.attempt(f"scaled_dot_product_attention ({name})", body)
    worked = [t for t in times.values() if t is not None]
    row: dict[str, Any] = {"sdpa": times, "sdpa_seconds": min(worked) if worked else None}
    if with_flex and (device.toy or device.left > 60):
        row["flex_seconds"] = device.attempt("FlexAttention", partial(_flex, device, made))
    return row


def _flex(device: Device, made: Sequence[Dense]) -> float:
    from torch.nn.attention.flex_attention import flex_attention

    # Without a GPU it is not compiled: that takes longer than all of a rehearsal.
    run = flex_attention if device.toy else torch.compile(flex_attention, dynamic=False)
    with torch.no_grad():
        return device.seconds([partial(run, x.q, x.keys, x.values, enable_gqa=True) for x in made])


# --- errors ----------------------------------------------------------------------------------------


def _errors(device: Device, place: Place, heads: Heads) -> dict[str, Any]:
    """Of every codec at a small context, against float64."""
    context = 256 if device.toy else 4 * _K
    found: dict[str, Any] = {"context": context, "codecs": {}}
    found["dense"] = device.attempt("dense error", partial(dense_error, place, heads, context))
    for name, codecs in CODECS.items():
        body = partial(codec_errors, place, heads, context, codecs)
        found["codecs"][name] = device.attempt(f"error of {name}", body)
    return found
