"""Models and arguments that are refused before anything runs: what was wrong, where, what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import graphwright
from graphwright.cost_model.target import resolve_target
from graphwright.ir.errors import (
    CaptureError,
    GraphwrightError,
    InputError,
    PassError,
    UnknownTargetError,
    UnsupportedModelError,
)
from graphwright.optimizer.validate import check_calibration, check_model, check_target_device
from graphwright.runtime.model import OptimizedModel
from tests.architectures import ARCHITECTURES, VOCAB, tiny_config, tiny_model
from tests.e2e.fake_program import ReferenceProgram

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "vocab_size": 50,
}


def refused(kind: type[GraphwrightError], act: Callable[[], object]) -> GraphwrightError:
    """The error, which must say where and what to do; the message holds all of it."""
    with pytest.raises(kind) as caught:
        act()
    error = caught.value
    assert isinstance(error, GraphwrightError)
    assert error.where and error.hint and error.what
    assert error.where in str(error) and error.hint in str(error)
    return error


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_passes(name: str) -> None:
    check_model(tiny_model(name, device="meta"))
    check_model(tiny_model(name, torch.bfloat16))


# --- the kind of model ---------------------------------------------------------------------------


def _other(name: str, auto: Any = transformers.AutoModelForCausalLM, **more: Any) -> Any:
    with torch.device("meta"):
        return auto.from_config(CONFIG_MAPPING[name](**(SMALL | more)))


def _t5() -> Any:
    config = transformers.T5Config(d_model=32, d_ff=32, num_layers=1, num_heads=2, vocab_size=50)
    with torch.device("meta"):
        return transformers.T5ForConditionalGeneration(config)


KINDS: dict[str, tuple[Callable[[], Any], str]] = {
    "masked language model": (
        lambda: _other("bert", transformers.AutoModelForMaskedLM),
        "encoder",
    ),
    "bare encoder": (lambda: _other("bert", transformers.AutoModel), "encoder"),
    "encoder with a language model head": (lambda: _other("bert"), "encoder"),
    "bare decoder": (lambda: tiny_model("llama").model, "no language model head"),
    "encoder-decoder": (_t5, "encoder-decoder"),
    "state-space": (lambda: _other("mamba"), "linear_attention|recurrent"),
    "hybrid": (lambda: _other("qwen3_next", num_key_value_heads=2, head_dim=16), "linear_attention"),
    "chunked attention": (
        lambda: _other("llama4_text", num_key_value_heads=2, head_dim=16, intermediate_size_mlp=32),
        "chunked_attention",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_another_kind(kind: str) -> None:
    make, expected = KINDS[kind]
    model = make()
    error = refused(UnsupportedModelError, lambda: check_model(model))
    assert any(word in error.what for word in expected.split("|")), error.what
    assert type(model).__name__ in str(error.where)


@pytest.mark.parametrize(
    "thing", [None, "gpt2", 3, torch.nn.Linear(2, 2), torch.zeros(2), tiny_config("llama")]
)
def test_things_that_are_no_model(thing: Any) -> None:
    error = refused(InputError, lambda: check_model(thing))
    assert type(thing).__name__ in error.what
    if isinstance(thing, torch.nn.Module):
        assert "torch.compile" in str(error.hint)


# --- compiled, optimized, quantized --------------------------------------------------------------


def _compiled_in_place() -> Any:
    model = tiny_model("llama")
    model.compile()
    return model


def _compiled_layer() -> Any:
    model = tiny_model("llama")
    model.model.layers[1] = torch.compile(model.model.layers[1])
    return model


@pytest.mark.parametrize(
    ("make", "where"),
    [
        (lambda: torch.compile(tiny_model("llama")), "torch.compile"),
        (_compiled_in_place, "LlamaForCausalLM"),
        (_compiled_layer, "model.layers.1"),
    ],
)
def test_compiled_models(make: Callable[[], Any], where: str) -> None:
    model = make()
    error = refused(UnsupportedModelError, lambda: check_model(model))
    assert "compiled already" in error.what and where in str(error.where)


def test_an_optimized_model_is_not_optimized_again() -> None:
    model = tiny_model("llama")
    program = ReferenceProgram(model)
    fast = OptimizedModel(program, config=model.config, generation_config=model.generation_config)
    assert "already" in refused(UnsupportedModelError, lambda: check_model(fast)).what


def test_quantized_models_by_their_configuration() -> None:
    for how in ({"quant_method": "gptq", "bits": 4}, SimpleNamespace(quant_method="awq")):
        model = tiny_model("llama")
        model.config.quantization_config = how
        error = refused(UnsupportedModelError, lambda m=model: check_model(m))
        assert "gptq" in error.what or "awq" in error.what


def test_a_packed_gguf_says_how_to_load_it() -> None:
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "gguf"}
    check_model(model)  # unpacked while it was loaded: plain matrices
    packed = type("GgufLinear", (torch.nn.Linear,), {"__module__": "transformers.integrations.gguf.modules"})
    model.lm_head.__class__ = packed
    assert "GgufConfig(dequantize=True)" in str(
        refused(UnsupportedModelError, lambda: check_model(model)).hint
    )


def test_a_dequantized_model_is_fine() -> None:
    model = tiny_model("llama")
    model.config.quantization_config = None
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(dequantize=True))
    check_model(model)
    model.hf_quantizer = SimpleNamespace(
        quantization_config=SimpleNamespace(dequantize=False, quant_method="bitsandbytes")
    )
    assert "bitsandbytes" in refused(UnsupportedModelError, lambda: check_model(model)).what


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_packed_weights_are_quantized(dtype: torch.dtype) -> None:
    model = tiny_model("llama")
    packed = torch.zeros(96, 64).to(dtype)
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(packed, requires_grad=False)
    error = refused(UnsupportedModelError, lambda: check_model(model))
    assert error.where == "model.layers.0.mlp.up_proj.weight" and str(dtype) in error.what


# --- devices and dtypes --------------------------------------------------------------------------


def test_a_model_on_several_devices() -> None:
    model = tiny_model("llama")
    model.model.layers[1].to("meta")
    error = refused(UnsupportedModelError, lambda: check_model(model))
    assert "several devices" in error.what
    assert "model.layers.1" in str(error.where) and "meta" in str(error.where) and "cpu" in str(error.where)


@pytest.mark.parametrize("placed", [{"model": 0, "lm_head": "cpu"}, {"": "disk"}, {"a": "cpu", "b": "disk"}])
def test_a_spread_or_offloaded_model(placed: dict[str, Any]) -> None:
    model = tiny_model("llama")
    model.hf_device_map = placed
    assert "hf_device_map" in str(refused(UnsupportedModelError, lambda: check_model(model)).where)


def test_a_device_map_of_one_device_is_fine() -> None:
    model = tiny_model("llama")
    model.hf_device_map = {"": "cpu"}
    check_model(model)


def test_matrices_of_several_dtypes() -> None:
    model = tiny_model("llama", torch.bfloat16)
    model.model.norm.float()
    model.model.layers[0].mlp.up_proj.float()  # a router, say
    check_model(model)
    model.lm_head.half()
    error = refused(UnsupportedModelError, lambda: check_model(model))
    assert "lm_head.weight in torch.float16" in str(error.where)


# --- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("number", "kind"), [(float("nan"), "NaN"), (float("inf"), "infinite"), (float("-inf"), "infinite")]
)
def test_weights_that_are_not_finite(number: float, kind: str, dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = number
    error = refused(InputError, lambda: check_model(model))
    assert error.where == "model.layers.1.mlp.down_proj.weight"
    assert kind in error.what and "[3, 5]" in error.what and "1 of" in error.what


def test_large_finite_weights_are_fine() -> None:
    model = tiny_model("llama", torch.float16)
    with torch.no_grad():
        model.lm_head.weight.fill_(60000.0)  # their sum overflows
    check_model(model)


def test_infinities_in_buffers_are_masks_and_nan_is_not() -> None:
    model = tiny_model("llama")
    model.model.register_buffer("mask", torch.full((2, 2), float("-inf")))
    check_model(model)
    model.model.mask[0, 0] = float("nan")
    assert refused(InputError, lambda: check_model(model)).where == "model.mask"


def test_checking_leaves_the_model_alone() -> None:
    model = tiny_model("llama").train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    check_model(model)
    assert model.training and all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


# --- calibration and target ----------------------------------------------------------------------


def test_calibration_of_every_form() -> None:
    assert check_calibration(None, VOCAB) is None
    ids = torch.tensor([1, 2, 3])
    for form in ([[1, 2, 3]], [ids], [ids[None]], ids[None], [(1, 2, 3)], [ids.int()]):
        rows = check_calibration(form, VOCAB)
        assert rows is not None and [row.tolist() for row in rows] == [[1, 2, 3]]
        assert rows[0].dtype is torch.int64


@pytest.mark.parametrize(
    ("calibration", "where"),
    [
        ("text", "calibration"),
        (7, "calibration"),
        ({"input_ids": [1]}, "calibration"),
        ([], "calibration"),
        (["text"], "calibration[0]"),
        ([[1], []], "calibration[1]"),
        ([[1], [1, VOCAB]], "calibration[1]"),
        ([[-1]], "calibration[0]"),
        ([[1.5]], "calibration[0]"),
        ([torch.ones(2, 2, dtype=torch.int64)], "calibration[0]"),
        ([[1, "a"]], "calibration[0]"),
        ([torch.tensor([True])], "calibration[0]"),
    ],
)
def test_calibration_that_is_not_usable(calibration: Any, where: str) -> None:
    assert refused(InputError, lambda: check_calibration(calibration, VOCAB)).where == where


def test_a_target_of_another_kind_is_noted() -> None:
    note = check_target_device(tiny_model("llama"), resolve_target("h100"))
    assert note is not None and "h100" in note and "cpu" in note
    assert check_target_device(tiny_model("llama"), resolve_target("cpu")) is None
    assert check_target_device(tiny_model("llama", device="meta"), resolve_target("h100")) is None


# --- configurations to plan for ------------------------------------------------------------------

LLAMA = {"model_type": "llama"} | SMALL
HUB_CODE = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}


def _config_of(name: str, **sizes: Any) -> Any:
    return CONFIG_MAPPING[name](**sizes)


CONFIGS: dict[str, tuple[Callable[[], Any], str]] = {
    "encoder-decoder": (lambda: _config_of("t5", d_model=32, num_layers=1), "encoder-decoder"),
    "encoder-decoder with a causal half": (lambda: _config_of("bart", d_model=32), "encoder-decoder"),
    "vision": (lambda: _config_of("vit", hidden_size=32), "ViTConfig is not a causal language model"),
    "vision and text": (lambda: _config_of("clip"), "CLIPConfig is not a causal language model"),
    "dict": (lambda: dict(LLAMA), "a dict"),
    "nothing": (lambda: None, "a NoneType"),
    "bytes": (lambda: b"config.json", "a bytes"),
    "module": (lambda: torch.nn.Linear(2, 2), "a Linear"),
    "activation": (lambda: _config_of("llama", **SMALL, hidden_act="nonesuch"), "nonesuch"),
    "dtype": (lambda: _config_of("llama", **SMALL, dtype=torch.int8), "int8"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_configurations_that_no_plan_is_made_for(kind: str) -> None:
    make, words = CONFIGS[kind]
    config = make()
    assert words in refused(InputError, lambda: graphwright.plan(config, "h100")).what


FILES: dict[str, tuple[bytes, str]] = {
    "no bytes": (b"", "not readable as JSON"),
    "cut off": (b'{"model_type": "lla', "not readable as JSON"),
    "binary": (bytes(range(256)), "not readable as JSON"),
    "empty object": (b"{}", "names no model_type"),
    "null": (b"null", "names no model_type"),
    "number": (b"7", "names no model_type"),
    "list": (b'["model_type"]', "names no model_type"),
    "kind that is a list": (b'{"model_type": ["llama"]}', "names no model_type"),
    "unknown kind": (b'{"model_type": "nonesuch"}', "nonesuch"),
    "unknown kind with code": (
        json.dumps({"model_type": "nonesuch", "auto_map": HUB_CODE}).encode(),
        "custom code",
    ),
    "size that is a word": (json.dumps(LLAMA | {"hidden_size": "big"}).encode(), "hidden_size"),
    "heads that do not divide": (json.dumps(LLAMA | {"num_attention_heads": 3}).encode(), "hidden size"),
    "no heads": (json.dumps(LLAMA | {"num_attention_heads": 0}).encode(), "ZeroDivisionError"),
    "no layers": (json.dumps(LLAMA | {"num_hidden_layers": 0}).encode(), "num_hidden_layers is 0"),
    "fewer than no layers": (json.dumps(LLAMA | {"num_hidden_layers": -1}).encode(), "is -1"),
    "no vocabulary": (json.dumps(LLAMA | {"vocab_size": 0}).encode(), "vocab_size is 0"),
    "no positions": (json.dumps(LLAMA | {"max_position_embeddings": 0}).encode(), "position_embeddings is 0"),
    "negative width": (json.dumps(LLAMA | {"hidden_size": -32}).encode(), "hidden_size is -32"),
}


@pytest.mark.parametrize("name", FILES)
def test_configuration_files_that_are_not_usable(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []  # transformers asks whether to run code from a checkpoint, unless it is told
    monkeypatch.setattr("builtins.input", lambda *args: asked.append(args) or "n")
    content, words = FILES[name]
    path = tmp_path / "config.json"
    path.write_bytes(content)
    for source in (path, str(tmp_path)):
        error = refused(InputError, lambda source=source: graphwright.plan(source, "h100"))
        assert words in str(error.what) and str(tmp_path) in str(error.where) and not asked


def test_paths_that_hold_no_configuration(tmp_path: Path) -> None:
    for source in (tmp_path / "none", str(tmp_path / "none"), "nowhere/config.json", Path("nowhere")):
        error = refused(InputError, lambda source=source: graphwright.plan(source, "h100"))
        assert "no such file or folder" in error.what
    assert "no config.json" in refused(InputError, lambda: graphwright.plan(tmp_path, "h100")).what
    refused(InputError, lambda: graphwright.plan("not a model id", "h100"))


def test_a_message_shows_control_characters_and_does_not_send_them(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "\x1b[31mred\x9b"}))
    error = refused(InputError, lambda: graphwright.plan(path, "h100"))
    assert "[31mred" in error.what and not {"\x1b", "\x9b"} & set(str(error))


@pytest.mark.parametrize("name", ["kl", "perplexity", "memory", "latency"])
@pytest.mark.parametrize("bound", [0, -1, float("nan"), float("inf"), -float("inf"), True, "", "much", [1]])
def test_budgets_of_nothing(name: str, bound: Any) -> None:
    error = refused(InputError, lambda: graphwright.Budget(**{name: bound}))
    assert f"Budget({name}=" in str(error.where)


# --- through the public call ---------------------------------------------------------------------


def test_optimize_refuses_the_same_way() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    assert refused(InputError, lambda: graphwright.optimize(model)).where == "lm_head.weight"
    refused(UnsupportedModelError, lambda: graphwright.optimize(_t5()))


def test_an_unknown_target_names_the_nearest() -> None:
    with pytest.raises(UnknownTargetError) as error:
        graphwright.optimize(tiny_model("llama"), target="h10")
    assert "h100" in str(error.value)


def test_an_unknown_pass_names_the_known() -> None:
    with pytest.raises(PassError) as error:
        graphwright.optimize(tiny_model("llama"), target="h100", passes=["place_cash"])
    assert "place_cache" in str(error.value)


def test_a_model_without_weights_is_only_planned() -> None:
    with pytest.raises(UnsupportedModelError, match="meta device") as error:
        graphwright.optimize(tiny_model("llama", device="meta"))
    assert "plan" in str(error.value.hint)


def test_a_graph_break_names_the_source_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")

    def breaks(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()  # the line that is named
        return x

    monkeypatch.setattr(model.model.layers[1].mlp, "forward", breaks)
    with pytest.raises(CaptureError) as error:
        graphwright.optimize(model, target="h100")
    assert "test_bad_input.py" in str(error.value.where) and "graph_break" in str(error.value.where)
