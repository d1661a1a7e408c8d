"""Programs that draft with themselves: tiny models over every kind of cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from graphwright.runtime.model import OptimizedModel
from graphwright.runtime.program import Program
from graphwright.runtime.speculation import make_speculation
from graphwright.runtime.speculation.skip_calibration import calibrate_skips, save_domains
from tests.architectures import tiny_model
from tests.e2e.graph_stand_in import PACKED, PLAIN
from tests.e2e.packed_programs import PackedModel, random_text, repetitive_prompts

LAYERS = 4
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "gemma2": {"sliding_window": 16, "dtype": torch.bfloat16},
}
EVICTED = (*PLAIN, "evict_tokens{method=snapkv,tokens=12,window=4,sinks=2,slack=72}")
CACHES = {
    "dense": PLAIN,
    "packed": PACKED,
    "evicted": EVICTED,
    "shared": (*PLAIN, "share_prefix{tokens=2}"),
    "selected": (*PLAIN, "sparsify_attention{keep=0.25,refresh=8}"),
}
RAGGED = [5, 9, 20, 33, 7, 12, 17, 3]
KINDS = [
    ("llama", "dense"), ("llama", "packed"), ("llama", "evicted"), ("llama", "shared"), ("llama", "selected"),
    ("gemma2", "dense"), ("gemma2", "packed"), ("gpt2", "dense"),
]  # fmt: skip
DRAFTERS = [
    "skip(layers=1+3)",
    "skip(count=2)",
    "swift(share=0.25, trial=4)",
    "clasp(share=0.5, every=2)",
    "del",
    "knn_ssd",
]
TREES = ["chain", "fixed(widths=2+2+1)"]
Make = Callable[..., OptimizedModel]


def program_maker() -> Make:
    """``make(model, cache)``: a tiny model with that cache, op by op."""
    labs: dict[str, PackedModel] = {}
    made: dict[tuple[str, str], OptimizedModel] = {}

    def build(model: str, cache: str = "dense") -> OptimizedModel:
        if model not in labs:
            labs[model] = PackedModel(tiny_model(model, layers=LAYERS, **MODELS[model]))
        if (model, cache) not in made:
            made[model, cache] = labs[model].program(CACHES[cache])
            made[model, cache].lab = labs[model]  # type: ignore[attr-defined]
        made[model, cache].speculation = None
        return made[model, cache]

    return build


def speculate(drafter: str, tree: str = "chain", length: int = 5) -> Any:
    options = {"drafter": drafter, "tree": tree, "rule": f"fixed(tokens={length})", "tokens": 16}
    return make_speculation(options)


def domains_file(program: Program, folder: Path) -> Path:
    path = folder / "domains.json"
    texts = {"a": random_text(2, 24, 5).tolist(), "b": random_text(2, 16, 6).tolist()}
    save_domains(calibrate_skips(program, texts, 2), path)
    return path


def generate(model: OptimizedModel, lengths: Sequence[int], tokens: int = 12) -> torch.Tensor:
    ids, mask = repetitive_prompts(lengths)
    ids[mask.bool().cumsum(1).le(2) & mask.bool()] = 7  # rows begin alike: where a prefix is shared, it is
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )


def lab_of(model: OptimizedModel) -> PackedModel:
    lab = model.lab  # type: ignore[attr-defined]
    assert isinstance(lab, PackedModel)
    return lab


def program_of(model: OptimizedModel) -> Program:
    assert isinstance(model.program, Program)
    return model.program
