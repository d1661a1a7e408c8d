"""Write the environment that torch's CPU kernels need on this machine to the file that is named.

Some virtual machines announce AMX and then refuse its instructions: any bfloat16 matmul of stock torch
dies there with SIGILL. oneDNN can be told to stay below AMX. The file has the setting, or nothing
where torch works as it is; `make` reads it before it runs anything in bfloat16.
"""

from __future__ import annotations

import os
import subprocess
import sys

PROBE = """
import torch
x = torch.ones(64, 576, dtype=torch.bfloat16)
torch.nn.functional.linear(x, torch.ones(576, 576, dtype=torch.bfloat16)).sum().item()
"""
SETTING = "ONEDNN_MAX_CPU_ISA"
CANDIDATES = ("AVX512_CORE_FP16", "AVX512_CORE_BF16", "AVX2")


def works(isa: str | None) -> bool:
    """Whether a bfloat16 matmul survives with oneDNN limited to ``isa``."""
    environment = {key: value for key, value in os.environ.items() if key != SETTING}
    if isa is not None:
        environment[SETTING] = isa
    return subprocess.run([sys.executable, "-c", PROBE], env=environment, check=False).returncode == 0


def main(path: str) -> None:
    """Try stock settings first, then the limits from the widest down."""
    line = ""
    if not works(None):
        isa = next((isa for isa in CANDIDATES if works(isa)), None)
        if isa is None:
            sys.exit("torch cannot multiply bfloat16 matrices on this machine, whatever oneDNN uses")
        line = f"{SETTING}={isa}\n"
    with open(path, "w", encoding="utf-8") as file:
        file.write(line)


if __name__ == "__main__":
    main(sys.argv[1])
