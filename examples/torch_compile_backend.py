"""The same passes as a ``torch.compile`` backend.

The backend is found by its name; graphwright is imported here only to read the report. Decoding over
a static cache keeps its writes in place, and a graph that needs gradients goes to Inductor untouched:
the report says so.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import graphwright as gw


def tiny_llama() -> LlamaForCausalLM:
    """One layer with random weights: nothing to download."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def decode(step: torch.nn.Module, config: LlamaConfig, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy decoding by hand over a static cache: the prompt, then one token at a time."""
    cache = StaticCache(config=config, max_cache_len=64)
    logits = []
    for _ in range(count):
        logits.append(step(tokens, past_key_values=cache).logits[:, -1])
        tokens = logits[-1].argmax(-1, keepdim=True)
    return torch.stack(logits)


def main() -> None:
    """Compile, compare with the eager model, print what was rewritten."""
    model = tiny_llama()
    prompt = torch.randint(0, 256, (1, 24))
    compiled = torch.compile(model, backend="graphwright")
    expected = decode(model, model.config, prompt, 6)
    difference = (decode(compiled, model.config, prompt, 6) - expected).abs().max().item()
    print(f"largest difference of a logit: {difference:.1e}\n")
    assert difference < 1e-4
    print(gw.report(compiled))

    layer = torch.nn.Linear(8, 8)
    trained = torch.compile(layer, backend="graphwright")
    trained(torch.ones(2, 8)).sum().backward()
    print(gw.report(trained))


if __name__ == "__main__":
    main()
