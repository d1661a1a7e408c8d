"""Tiny configurations of the nineteen architectures that every test of the compiler runs on.

Small enough that a capture takes seconds, and irregular enough to tell dimensions apart: grouped
heads, windows shorter than the test sequences, more than one expert.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 96
WINDOW = 16
POSITIONS = 256

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TOKENS = {key: _COMMON[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def _without(*names: str) -> dict[str, Any]:
    return {key: value for key, value in _COMMON.items() if key not in names}


# Name of the layer count's key aside, these are the arguments of each model's configuration class.
_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "qwen2": _COMMON,
    "qwen3": _COMMON,
    "qwen3_moe": _COMMON
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1},
    "gemma2": _COMMON | {"sliding_window": WINDOW},
    "gemma3_text": _COMMON | {"sliding_window": WINDOW},
    "mistral": _COMMON | {"sliding_window": WINDOW},
    "mixtral": _COMMON | _EXPERTS,
    "phi3": _COMMON,
    "gpt2": _TOKENS | {"n_embd": 64, "n_head": 4, "n_positions": POSITIONS},
    "gpt_neox": _without("num_key_value_heads", "head_dim"),
    # A YaRN factor of 8 over 32 original positions: the configuration's own default (32 over 4096)
    # does not fit 256 positions.
    "gpt_oss": _COMMON
    | _EXPERTS
    | {
        "sliding_window": WINDOW,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 32,
        },
    },
    "opt": _TOKENS
    | {
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 96,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "pad_token_id": 0,
    },
    "olmo2": _COMMON,
    "granite": _COMMON,
    "smollm3": _COMMON,
    "starcoder2": _COMMON,
    "deepseek_v3": _without("head_dim", "num_key_value_heads")
    | {
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 32,
    },
    "glm4": _COMMON,
}

ARCHITECTURES: tuple[str, ...] = tuple(_CONFIGS)


def tiny_config(name: str, layers: int = 2, **overrides: Any) -> PreTrainedConfig:
    """The configuration of a tiny model.

    Args:
        name: one of :data:`ARCHITECTURES` (transformers' ``model_type``).
        layers: number of decoder layers.
        overrides: further arguments of the configuration class; they win.
    """
    depth = {"n_layer" if name == "gpt2" else "num_hidden_layers": layers}
    return CONFIG_MAPPING[name](**(_CONFIGS[name] | depth | overrides))


def tiny_model(
    name: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    layers: int = 2,
    device: str = "cpu",
    **overrides: Any,
) -> PreTrainedModel:
    """A tiny model with random weights, in evaluation mode.

    Norm weights and biases, which transformers initializes to ones and zeros, are made random too: a
    compiler that loses one of them must not pass.

    Args:
        name, layers, overrides: as in :func:`tiny_config`.
        dtype: of the weights.
        seed: of the weights; the global generator is left as it was.
        device: ``"cpu"`` or ``"meta"``.
    """
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        config = tiny_config(name, layers, **overrides)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()
