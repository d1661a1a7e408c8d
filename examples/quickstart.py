"""Optimize a model, check that it generates the same tokens, and read the report.

Runs offline in seconds on a tiny random Llama. With a real model, only the loading differs:
``AutoModelForCausalLM.from_pretrained(name)``.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import graphwright as gw


def tiny_llama() -> LlamaForCausalLM:
    """Four layers with random weights: nothing to download."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).eval()


def main() -> None:
    """The whole tour."""
    model = tiny_llama()
    fast = gw.optimize(model, target="cpu", workload=gw.Workload(batch=2, prompt=16, generate=32))

    prompts = torch.randint(3, 512, (2, 16))
    mask = torch.ones_like(prompts)
    mask[0, :6] = 0  # the first prompt is shorter: left padding, as a tokenizer gives it
    settings = {"attention_mask": mask, "max_new_tokens": 32, "do_sample": False, "pad_token_id": 0}

    expected = model.generate(prompts, **settings)
    got = fast.generate(prompts, **settings)
    assert torch.equal(got, expected), "greedy tokens differ from the stock model's"
    print(f"greedy tokens identical to stock transformers: {got.shape[1] - 16} new tokens, 2 rows\n")

    print(fast.report)


if __name__ == "__main__":
    main()
