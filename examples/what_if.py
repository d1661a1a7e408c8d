"""Does it fit, and how fast would it be, on GPUs that are not here?

Planning needs a configuration: no weights, no hardware. This one has the shape of a Llama 3.1 8B.
`graphwright plan config.json --compare a100,h100,h200 --prompt 128000` prints the same table.
"""

from __future__ import annotations

from transformers import LlamaConfig

import graphwright as gw
from graphwright.optimizer.compare import compare

CONFIG = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131_072,
    dtype="bfloat16",
)


def main() -> None:
    """One row for each machine, where the answer turns, then one report in full."""
    workload = gw.Workload(prompt=128_000, generate=512)
    comparison = compare(CONFIG, ["rtx4090", "a100", "h100", "h200", "mi300x"], workload=workload)
    print(comparison)
    for target, report in comparison.reports.items():
        for crossover in report.crossovers:
            if crossover["value"] is not None:
                print(f"{target}: {crossover['note']}")
    print()
    print(comparison.reports["h100"])


if __name__ == "__main__":
    main()
