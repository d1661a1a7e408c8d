"""Cache sizes of published models: one layer of each kind, captured without weights, times the layers.

Full depth takes a capture of ten to twenty-five seconds each and adds nothing: layers of one kind store
the same. Every figure is bfloat16, two bytes an element.
"""

from __future__ import annotations

import pytest
from transformers import DeepseekV3Config, Gemma3TextConfig, LlamaConfig, Qwen3Config

from graphwright.cost_model import (
    Workload,
    cache_bytes,
    cache_bytes_per_token,
    default_stores,
    plan_memory,
    resolve_target,
)
from graphwright.ir.canonicalize import canonicalize
from graphwright.passes.base import parse_pass

ONE = {"num_hidden_layers": 1, "tie_word_embeddings": False}
LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, **ONE,
)  # fmt: skip
LLAMA_70B = LlamaConfig(
    hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8,
    vocab_size=128256, **ONE,
)  # fmt: skip
QWEN3_32B = Qwen3Config(
    hidden_size=5120, intermediate_size=25600, num_attention_heads=64, num_key_value_heads=8, head_dim=128,
    vocab_size=151936, **ONE,
)  # fmt: skip
GEMMA_SIZES = {
    "hidden_size": 5376, "intermediate_size": 21504, "num_attention_heads": 32, "num_key_value_heads": 16,
    "head_dim": 128, "sliding_window": 1024, "vocab_size": 262208, "max_position_embeddings": 131072,
}  # fmt: skip
# A dense layer stores what a layer with experts does.
DEEPSEEK_V3 = DeepseekV3Config(
    hidden_size=7168, intermediate_size=18432, num_attention_heads=128, num_key_value_heads=128,
    q_lora_rank=1536, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128,
    first_k_dense_replace=1, vocab_size=129280, **ONE,
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "layers", "heads", "width", "published"),
    [
        (LLAMA_8B, 32, 8, 128, 131_072),
        (LLAMA_70B, 80, 8, 128, 327_680),
        (QWEN3_32B, 64, 8, 128, 262_144),
    ],
    ids=["Llama-3.1-8B", "Llama-3.1-70B", "Qwen3-32B"],
)
def test_keys_and_values_of_grouped_heads(captured, config, layers, heads, width, published):
    keys_and_values, bfloat16 = 2, 2
    assert keys_and_values * layers * heads * width * bfloat16 == published
    assert layers * cache_bytes_per_token(captured(config)) == published


def test_gemma_3_27b_and_its_windows(captured):
    """62 layers, of which every sixth is full; the others see 1,024 tokens. 16 heads of 128."""
    kinds = Gemma3TextConfig(num_hidden_layers=62, **GEMMA_SIZES).layer_types
    full, windows = kinds.count("full_attention"), kinds.count("sliding_attention")
    assert (full, windows) == (10, 52)
    assert kinds[4:6] == ["sliding_attention", "full_attention"]
    graph = captured(Gemma3TextConfig(num_hidden_layers=2, layer_types=kinds[4:6], **GEMMA_SIZES))
    stores = default_stores(graph)
    window, whole = ([s for s in stores if s.window == size] for size in (1024, 0))

    slot = 2 * 16 * 128 * 2  # keys and values of one layer
    assert slot == 8_192
    assert sum(s.bytes_per_token for s in window) == sum(s.bytes_per_token for s in whole) == slot
    # While no window is full, a token takes a slot in every layer.
    assert (full + windows) * slot == 507_904
    assert (full + windows) * cache_bytes_per_token(graph) / 2 == 507_904
    # Afterwards it takes one in the full layers only.
    assert full * sum(s.bytes_per_token for s in whole) == 81_920

    tokens = 131_072
    by_hand = 10 * tokens * slot + 52 * 1024 * slot
    assert by_hand == 10_737_418_240 + 436_207_616

    def total(slack: int | None) -> int:
        parts = ((full, whole), (windows, window))
        return sum(layers * cache_bytes(kind, 1, tokens, slack) for layers, kind in parts)

    assert total(0) == by_hand
    # The program's rings hold 512 slots more, for the step.
    assert total(None) == by_hand + 52 * 512 * slot


def test_deepseek_v3_and_its_latent(captured):
    """61 layers; a latent of 512 and a rotary part of 64 that all 128 heads share."""
    graph = captured(DEEPSEEK_V3).copy()
    canonicalize(graph)
    expanded = 61 * 128 * (128 + 64 + 128) * 2
    assert expanded == 4_997_120
    assert 61 * cache_bytes_per_token(graph) == expanded
    parse_pass("place_cache{cut=minimum}")(graph, Workload(), resolve_target("h200"), force=True)
    assert 61 * (512 + 64) * 2 == 70_272
    assert 61 * cache_bytes_per_token(graph) == 70_272


def test_expanding_a_latent_takes_workspace(captured):
    """Keys and values that are computed again are alive for all slots of a layer; absorbed, they are not."""
    graph = captured(DEEPSEEK_V3).copy()
    canonicalize(graph)
    workload, target = Workload(), resolve_target("h200")
    parse_pass("place_cache{cut=minimum}")(graph, workload, target, force=True)
    options = {"batch": 1, "limit": 2**40, "step_tokens": 1}
    short, long = (plan_memory(graph, capacity=n, **options).workspace_bytes for n in (10_000, 20_000))
    heads_of_one_slot = 128 * (128 + 128) * 2  # what the projection of the latent makes
    assert long - short >= 10_000 * heads_of_one_slot
    parse_pass("absorb_projections")(graph, workload, target, force=True)
    short, long = (plan_memory(graph, capacity=n, **options).workspace_bytes for n in (10_000, 20_000))
    assert long == short
