"""What the benchmarks share: the model, text to run it on, and a description of the machine."""

from __future__ import annotations

import os
import platform
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from graphwright.cost_model.host import cpu_name


def load_model(folder: str, gguf: str | None) -> Any:
    """The model in bfloat16, ready for inference."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=gguf, dtype=torch.bfloat16, local_files_only=True
    )
    return model.eval()


def load_tokenizer(folder: str, gguf: str | None) -> Any:
    """The model's tokenizer."""
    return AutoTokenizer.from_pretrained(folder, gguf_file=gguf, local_files_only=True)


def load_prose(folder: str, gguf: str | None, length: int) -> torch.Tensor:
    """``[1, length]`` tokens of the English prose that Python ships."""
    return prose(load_tokenizer(folder, gguf), length)


def prose(tokenizer: Any, length: int) -> torch.Tensor:
    """``[1, length]`` tokens of the English prose that Python ships."""
    text = "\n\n".join(topics[name] for name in sorted(topics))[: 8 * length]
    tokens = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
    if tokens.shape[1] < length:
        raise SystemExit(f"the prose has {tokens.shape[1]} tokens only; choose shorter contexts")
    return tokens[:, :length]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "onednn_max_cpu_isa": os.environ.get("ONEDNN_MAX_CPU_ISA", "not limited"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
