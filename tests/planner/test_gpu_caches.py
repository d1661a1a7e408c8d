"""Packed caches on GPUs that are not at hand: which codecs the kernels read, and what a plan gains by it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers

import graphwright as gw
from graphwright.cost_model.streaming import find_streaming
from graphwright.cost_model.target import resolve_target
from graphwright.ir.graph import Graph
from graphwright.optimizer.driver import capture_step
from graphwright.optimizer.planner import Planned, Request, plan_given, store_kernels

CONTEXT = 131_072
LAYERS = 2
INT4 = "token_scale >> uniform(bits=4)"
SMALL_GROUPS = "token_scale(group=16) >> uniform(bits=4)"
CORRECTED = f"{INT4} >> low_rank(rank=2)"


@pytest.fixture(scope="module")
def llama() -> Graph:
    """Two layers of Llama 3.1 8B's sizes."""
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14_336, num_hidden_layers=LAYERS, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=32_768, max_position_embeddings=CONTEXT, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return capture_step(model)[0]


def planned(graph: Graph, target: str, codec: str = "") -> Planned:
    workload = gw.Workload(batch=1, prompt=CONTEXT - 512, generate=512)
    passes = [
        "place_cache{cut=kv}",
        *([f"quantize_cache{{codec={codec},page=64}}"] if codec else []),
        "compile_layers",
    ]
    return plan_given(graph.copy(), passes, Request(resolve_target(target), workload, gw.Budget(), CONTEXT))


def attention_seconds(plan: Planned) -> float:
    parts = plan.predicted["decode"]["seconds_by_op"]
    return sum(
        seconds
        for name, seconds in parts.items()
        if name in ("cache_attention", "packed_attention", "cache_read")
    )


@pytest.mark.parametrize("target", ["a100", "h200", "b200", "mi300x"])
def test_four_bits_read_a_long_cache_almost_four_times_as_fast(llama: Graph, target: str) -> None:
    pytest.importorskip("triton")
    plain, small = planned(llama, target), planned(llama, target, INT4)
    assert len(find_streaming(small.graph).in_kernel) == 3 * LAYERS
    assert 3.0 < attention_seconds(plain) / attention_seconds(small) < 4.0
    saved = plain.plan.seconds_per_token - small.plan.seconds_per_token
    assert saved > 0.9 * (attention_seconds(plain) - attention_seconds(small))
    assert small.predicted["memory"]["cache_bytes"] < 0.28 * plain.predicted["memory"]["cache_bytes"]


def test_a_family_of_kernels_reads_its_own_codecs(llama: Graph) -> None:
    """The C++ kernel takes scales of 32 features and more, the Triton kernel of any number."""
    pytest.importorskip("triton")
    gpu, cpu = (find_streaming(planned(llama, target, SMALL_GROUPS).graph) for target in ("h200", "cpu"))
    assert len(gpu.in_kernel) == 3 * LAYERS and not gpu.obstacles
    assert not cpu.in_kernel and "groups of 16" in next(iter(cpu.obstacles.values()))


def test_what_no_kernel_reads_is_priced_as_the_reference(llama: Graph) -> None:
    pytest.importorskip("triton")
    plain, slow = planned(llama, "h200"), planned(llama, "h200", CORRECTED)
    assert "low_rank" in next(iter(find_streaming(slow.graph).obstacles.values()))
    assert slow.plan.seconds_per_token > 10 * plain.plan.seconds_per_token


def test_stores_that_are_paged_differently_are_not_read_together(llama: Graph) -> None:
    pytest.importorskip("triton")
    graph = planned(llama, "h200", INT4).graph
    attention = graph.calls("cache_attention")[0]
    read = next(n for n in attention.all_input_nodes if n in graph.calls("cache_read"))
    read.args = tuple(128 if argument == 64 else argument for argument in read.args)
    read.kwargs = {k: 128 if argument == 64 else argument for k, argument in read.kwargs.items()}
    found = find_streaming(graph)
    assert list(found.obstacles) == [attention]
    assert "pages of keys have 128 tokens" in found.obstacles[attention]


def test_without_triton_the_reason_is_said(llama: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> Any:
        return ()

    monkeypatch.setattr(store_kernels, "kernels", missing)
    monkeypatch.setattr("graphwright.kernels.triton.installed", lambda: "Triton is not installed")
    plan = planned(llama, "h200", INT4)
    found = find_streaming(plan.graph)
    assert not found.in_kernel and set(found.obstacles.values()) == {"Triton is not installed"}
    assert json.loads(json.dumps(plan.graph.annotations)) == plan.graph.annotations
