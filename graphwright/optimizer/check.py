"""Check: run the stock model and the program side by side; quality, time and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from graphwright.cost_model.workload import Workload
from graphwright.ir.errors import VerificationError
from graphwright.runtime.program import Program
from graphwright.runtime.shared_prefix import prefix_for

# How far exact passes may move logits, in units of the largest logit: rounding of the dtype, through
# all layers, with room. A wrong graph is off by orders of magnitude more.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.bfloat16: 0.25, torch.float16: 0.1}
_TOKENS = 48
_STEP = 16
_REPEATS = 5
_SECONDS = 1.5


def calibration_rows(
    calibration: Sequence[Any] | None, program: Program, seed: int, tokens: int = _TOKENS
) -> torch.Tensor:
    """``[B, T]`` token ids to compare on: the caller's first rows, or seeded draws from the vocabulary."""
    limit = min(tokens, program.max_positions or tokens)
    if calibration:
        rows = [torch.as_tensor(row, dtype=torch.int64).reshape(-1)[:limit] for row in calibration[:4]]
        width = min(len(row) for row in rows)
        return torch.stack([row[:width] for row in rows]).to(program.device)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, program.vocab_size, (2, limit), generator=generator).to(program.device)


def compare_logits(model: PreTrainedModel, program: Program, ids: torch.Tensor) -> dict[str, float]:
    """Stock logits against the program's own, through its cache in steps.

    Returns:
        ``max_abs_logit_difference``, ``relative_logit_difference`` (to the largest logit),
        ``mean_kl`` (nats per token), ``top1_agreement`` (share).
    """
    with torch.no_grad():
        was_training = model.training
        expected = model.eval()(input_ids=ids, use_cache=False).logits.float()
        model.train(was_training)
    actual = torch.cat(list(_steps(program, ids)), dim=1).float()
    difference = (actual - expected).abs().max()
    kl = torch.nn.functional.kl_div(
        actual.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    return {
        "max_abs_logit_difference": float(difference),
        "relative_logit_difference": float(difference / expected.abs().max().clamp(min=1e-6)),
        "mean_kl": max(float(kl.mean()), 0.0),  # below zero is rounding
        "top1_agreement": float((actual.argmax(-1) == expected.argmax(-1)).float().mean()),
        "tokens": float(ids.numel()),
    }


def require_equal(quality: dict[str, float], dtype: torch.dtype, where: str) -> None:
    """Refuse a program of exact passes whose logits are not the stock model's.

    Raises:
        VerificationError: the difference is beyond what rounding explains.
    """
    found, allowed = quality["relative_logit_difference"], _TOLERANCE.get(dtype, 1e-3)
    if not found <= allowed:
        raise VerificationError(
            f"the program's logits differ from the stock model's by {found:.2g} of the largest logit",
            where=where,
            hint="this is a defect: use passes=[] and report the model's configuration",
        )


def measure_decode(program: Program, workload: Workload, tokens: int = 1) -> dict[str, float]:
    """Time of one step at the workload's mean context, over a cache for all of the workload.

    Args:
        tokens: of each row; more than one is a verification, with logits for each of them.

    Returns:
        ``seconds_per_token`` of the step (as if it gained one token a row), ``tokens_per_second``,
        ``context``, ``cache_bytes``.
    """
    context = _context(program, workload, tokens)
    capacity = min(workload.capacity, program.max_positions or workload.capacity)
    capacity = max(capacity, context + tokens)
    shared = prefix_for(program.shared_prefix, workload.batch, context + 1)
    state = program.allocate(workload.batch, capacity, shared)
    state.pretend(context)
    state.end_prompt([min(context, workload.prompt)] * workload.batch)
    ids = torch.zeros((workload.batch, tokens), dtype=torch.int64, device=program.device)
    counts = torch.full((workload.batch,), tokens, dtype=torch.int64, device=program.device)
    wanted: Literal["last", "all"] = "last" if tokens == 1 else "all"
    seconds = _median_seconds(lambda: program.step(state, ids, counts, logits=wanted), program.device)
    return {
        "seconds_per_token": seconds,
        "tokens_per_second": workload.batch / seconds,
        "context": float(context),
        "cache_bytes": float(state.nbytes()),
    }


def measure_stock(model: PreTrainedModel, program: Program, workload: Workload) -> dict[str, float]:
    """The same step in the stock model over a ``DynamicCache`` of the same length."""
    context = _context(program, workload)
    cache = DynamicCache(config=model.config)
    tokens = torch.zeros((workload.batch, 1), dtype=torch.int64, device=program.device)
    with torch.no_grad():
        model(input_ids=tokens, past_key_values=cache, use_cache=True)
        for index, layer in enumerate(cache.layers):
            keys, values = layer.keys, layer.values
            filler = [t[:, :, :1].expand(-1, -1, context - 1, -1) for t in (keys, values)]
            cache.update(*filler, index)

        def step() -> None:
            model(input_ids=tokens, past_key_values=cache, use_cache=True)  # grows by one: not worth a crop

        seconds = _median_seconds(step, program.device)
    return {"seconds_per_token": seconds, "tokens_per_second": workload.batch / seconds}


def _context(program: Program, workload: Workload, tokens: int = 1) -> int:
    context = int(workload.mean_context)
    room = context if program.max_positions is None else program.max_positions - tokens - _REPEATS - 1
    return max(1, min(context, room))


def _steps(program: Program, ids: torch.Tensor):  # type: ignore[no-untyped-def]
    state = program.allocate(ids.shape[0], ids.shape[1])
    state.end_prompt([min(_STEP, ids.shape[1])] * ids.shape[0])
    for start in range(0, ids.shape[1], _STEP):
        chunk = ids[:, start : start + _STEP]
        counts = torch.full((ids.shape[0],), chunk.shape[1], dtype=torch.int64, device=ids.device)
        yield program.step(state, chunk, counts)
        state.commit(counts)


def _median_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Median of a few runs after those that warm up; stops early where a run is slow.

    On a GPU two runs warm up: the first compiles kernels, the second records the step as a graph.
    """
    times: list[float] = []
    warm = 2 if device.type == "cuda" else 1
    for index in range(_REPEATS + warm):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elapsed = time.perf_counter() - started
        if index >= warm:
            times.append(elapsed)
        if index + 1 >= warm and elapsed * (index + 2) > _SECONDS:
            times = times or [elapsed]
            break
    return statistics.median(times)
