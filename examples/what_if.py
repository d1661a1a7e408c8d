"""Does it fit, and how fast would it be, on a GPU that is not here?

Planning needs a configuration: no weights, no hardware. This one has the shape of a Llama 3.1 8B.
"""

from __future__ import annotations

from transformers import LlamaConfig

import graphwright as gw

CONFIG = LlamaConfig(
    architectures=["LlamaForCausalLM"],
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131_072,
    dtype="bfloat16",
)
GIB = 2**30


def main() -> None:
    """One line for each machine and context, then one report in full."""
    print(f"{'target':8} {'context':>9} {'tokens/s':>9} {'weights':>10} {'cache':>10}  bound")
    for target in ("a100", "h100", "h200"):
        for context in (8_000, 128_000):
            report = gw.plan(CONFIG, target, workload=gw.Workload(prompt=context, generate=512))
            decode, memory = report.predicted["decode"], report.predicted["memory"]
            print(
                f"{target:8} {context:9,} {decode['tokens_per_second']:9.0f} "
                f"{memory['weights_bytes'] / GIB:6.1f} GiB {memory['cache_bytes'] / GIB:6.1f} GiB  "
                f"{decode['bound']}"
            )
    print()
    print(report)


if __name__ == "__main__":
    main()
