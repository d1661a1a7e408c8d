"""Refuse what cannot be compiled before anything is done: what is wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch._dynamo.eval_frame import OptimizedModule
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from graphwright.cost_model.target import Target
from graphwright.ir.errors import InputError, UnsupportedModelError
from graphwright.runtime.model import OptimizedModel

_LOAD = "load one with transformers.AutoModelForCausalLM.from_pretrained(...)"
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_WEIGHT_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
_STOCK = "use the stock model; graphwright compiles decoders in which attention alone carries the past"


def check_model(model: Any) -> None:
    """Refuse a model that graphwright cannot compile.

    Args:
        model: anything a caller passed. A model on the meta device is fine; its weights are not read.

    Raises:
        InputError: not a transformers model, or a weight that is NaN or infinite.
        UnsupportedModelError: an encoder, a recurrent model, a quantized, compiled or distributed one.
    """
    _check_kind(model)
    _check_compiled(model)
    _check_architecture(model)
    _check_quantized(model)
    _check_devices(model)
    _check_dtypes(model)
    check_weights(model)


def check_target_device(model: PreTrainedModel, target: Target) -> str | None:
    """What to note if a program for ``target`` would run on another kind of machine; None if it fits."""
    device = model.device.type
    if device == "meta" or (target.kind == "cpu") == (device == "cpu"):
        return None
    return f"planned for {target.name}, but the model is on {model.device}, where the program runs"


def check_calibration(calibration: Any, vocab_size: int) -> list[torch.Tensor] | None:
    """Calibration prompts as ``[T]`` int64 tensors on the CPU; None if none were given.

    Args:
        calibration: None, a ``[N, T]`` tensor, or a sequence of ``[T]`` or ``[1, T]`` integer tensors
            and lists of ids.
        vocab_size: ids lie in ``0 .. vocab_size - 1``.

    Raises:
        InputError: names the prompt that is not usable.
    """
    if calibration is None:
        return None
    shape = isinstance(calibration, torch.Tensor) and calibration.dim() == 2
    if not shape and (isinstance(calibration, str | bytes) or not isinstance(calibration, Sequence)):
        raise InputError(
            f"calibration is a {type(calibration).__name__}",
            where="calibration",
            hint="pass a list of token sequences, e.g. [tokenizer(text).input_ids for text in texts]",
        )
    rows = [_calibration_row(row, index, vocab_size) for index, row in enumerate(calibration)]
    if not rows:
        raise InputError(
            "calibration is empty", where="calibration", hint="leave it out for synthetic tokens"
        )
    return rows


def _calibration_row(row: Any, index: int, vocab_size: int) -> torch.Tensor:
    where = f"calibration[{index}]"
    hint = "pass token ids, as tokenizer(text).input_ids gives them"
    try:
        if isinstance(row, str | bytes):
            raise TypeError("it is text")
        ids = torch.as_tensor(row).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"a prompt is not a sequence of token ids: {error}", where=where, hint=hint
        ) from None
    if ids.dim() == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.dim() != 1 or ids.numel() == 0:
        raise InputError(f"a prompt has the shape {list(ids.shape)}, not [T]", where=where, hint=hint)
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype is torch.bool:
        raise InputError(f"a prompt holds {ids.dtype}, not integers", where=where, hint=hint)
    ids = ids.to(torch.int64)
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= vocab_size:
        wrong = least if least < 0 else most
        raise InputError(
            f"token id {wrong} is outside the vocabulary of {vocab_size}",
            where=where,
            hint="tokenize with the model's own tokenizer",
        )
    return ids


# --- parts of check_model ------------------------------------------------------------------------


def _check_kind(model: Any) -> None:
    if isinstance(model, OptimizedModel):
        raise UnsupportedModelError(
            "the model is a graphwright program already",
            where="optimize(model)",
            hint="pass the stock model that it was made from",
        )
    if isinstance(model, OptimizedModule):
        raise _compiled("torch.compile(model)")
    if not isinstance(model, PreTrainedModel):
        hint = _LOAD
        if isinstance(model, torch.nn.Module):
            hint = f'for a plain module use torch.compile(module, backend="graphwright"), or {_LOAD}'
        raise InputError(
            f"a transformers causal language model was expected, not a {type(model).__name__}",
            where="optimize(model)",
            hint=hint,
        )


def _compiled(where: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        "the model is compiled already",
        where=where,
        hint="pass the model as it was before torch.compile; graphwright compiles it itself",
    )


def _check_compiled(model: PreTrainedModel) -> None:
    for name, module in model.named_modules():
        if isinstance(module, OptimizedModule) or getattr(module, "_compiled_call_impl", None) is not None:
            raise _compiled(name or type(model).__name__)


def _check_architecture(model: PreTrainedModel) -> None:
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            "the model is an encoder-decoder", where=name, hint="graphwright compiles decoder-only models"
        )
    text = model.config.get_text_config()
    others = sorted({str(kind) for kind in getattr(text, "layer_types", None) or ()} - _LAYER_TYPES)
    if others:
        raise UnsupportedModelError(
            f"the model has layers of a kind that is not supported: {', '.join(others)}",
            where=f"{name}.config.layer_types",
            hint=_STOCK,
        )
    if getattr(model, "_is_stateful", False):
        raise UnsupportedModelError("the model is recurrent or a state-space model", where=name, hint=_STOCK)
    causal = any(getattr(module, "is_causal", None) for module in model.modules())
    if getattr(text, "is_decoder", None) is False and not causal:
        raise UnsupportedModelError(
            "the model is an encoder: its attention looks ahead",
            where=name,
            hint=f"set is_decoder, or {_LOAD}",
        )
    if not model.can_generate():
        raise UnsupportedModelError(
            "the model has no language model head: it is an encoder, a classifier or a bare decoder",
            where=name,
            hint=_LOAD,
        )


def _check_quantized(model: PreTrainedModel) -> None:
    name = type(model).__name__
    how = getattr(model.config, "quantization_config", None)
    if how is None and getattr(model, "hf_quantizer", None) is not None:
        how = model.hf_quantizer.quantization_config
        if getattr(how, "dequantize", False):
            how = None
    if how is not None:
        method = how.get("quant_method") if isinstance(how, dict) else getattr(how, "quant_method", how)
        method = str(getattr(method, "value", method))
        # A GGUF file that was unpacked while it was loaded keeps the note in its configuration.
        if method != "gguf" or _has_packed_gguf(model):
            raise UnsupportedModelError(
                f"the model is quantized ({method})",
                where=f"{name}.config.quantization_config",
                hint=_unquantized(method),
            )
    for key, tensor in model.named_parameters():
        packed = tensor.dtype not in _WEIGHT_DTYPES
        if packed or is_traceable_wrapper_subclass(tensor):
            kind = str(tensor.dtype) if packed else type(tensor.data).__name__
            raise UnsupportedModelError(
                f"the model is quantized or sharded: a weight is stored as {kind}",
                where=key,
                hint=_unquantized(""),
            )


def _has_packed_gguf(model: PreTrainedModel) -> bool:
    return any(type(m).__module__.startswith("transformers.integrations.gguf") for m in model.modules())


def _unquantized(method: str) -> str:
    if method == "gguf":
        return (
            "load it dequantized: from_pretrained(folder, gguf_file=..., dtype=torch.bfloat16, "
            "quantization_config=GgufConfig(dequantize=True))"
        )
    return "load the model in bfloat16, float16 or float32, without a quantization_config"


def _check_devices(model: PreTrainedModel) -> None:
    name = type(model).__name__
    hint = "load the model on one device, without device_map, or with device_map={'': device}"
    placed = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(placed) > 1 or "disk" in placed:
        raise UnsupportedModelError(
            f"the model is spread over several places: {', '.join(sorted(placed))}",
            where=f"{name}.hf_device_map",
            hint=hint,
        )
    first: dict[torch.device, str] = {}
    for key, tensor in _tensors(model):
        first.setdefault(tensor.device, key)
    if not first:
        raise InputError("the model has no weights", where=name, hint=_LOAD)
    if len(first) > 1:
        where = ", ".join(f"{key} on {device}" for device, key in first.items())
        raise UnsupportedModelError("the model is on several devices", where=where, hint=hint)


def _check_dtypes(model: PreTrainedModel) -> None:
    """Matrices of one dtype; norms and routers in float32 inside a half-precision model are common."""
    first: dict[torch.dtype, str] = {}
    for key, tensor in model.named_parameters():
        if tensor.dim() >= 2 and tensor.dtype is not torch.float32:
            first.setdefault(tensor.dtype, key)
    if len(first) > 1:
        raise UnsupportedModelError(
            "the model's matrices have several dtypes",
            where=", ".join(f"{key} in {dtype}" for dtype, key in first.items()),
            hint="convert it to one, e.g. model.to(torch.bfloat16)",
        )


def check_weights(model: torch.nn.Module) -> None:
    """Refuse NaN and infinite weights, and NaN in buffers (an infinite one can be a mask).

    Each storage is read once; tensors on the meta device and integers are skipped.

    Raises:
        InputError: names the tensor and one position.
    """
    seen: set[tuple[int, int, torch.Size]] = set()
    parameters = {id(t) for t in model.parameters()}
    for key, tensor in _tensors(model):
        if tensor.device.type == "meta" or not tensor.dtype.is_floating_point or tensor.numel() == 0:
            continue
        place = (tensor.data_ptr(), tensor.storage_offset(), tensor.shape)
        if place in seen:
            continue
        seen.add(place)
        with torch.no_grad():
            least, most = (float(x) for x in torch.aminmax(tensor.detach()))
        if least != least or (id(tensor) in parameters and (least == -torch.inf or most == torch.inf)):
            raise _bad_weight(key, tensor.detach())


def _bad_weight(key: str, tensor: torch.Tensor) -> InputError:
    bad = ~torch.isfinite(tensor)
    position = [int(i) for i in bad.nonzero()[0]]
    kind = "NaN" if bool(tensor[bad].isnan().any()) else "infinite"
    return InputError(
        f"a weight is {kind}: {int(bad.sum())} of {tensor.numel():,} elements, the first at {position}",
        where=key,
        hint="the checkpoint is damaged or training diverged; load it again, or from an earlier step",
    )


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
