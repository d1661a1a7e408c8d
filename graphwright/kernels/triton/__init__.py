"""The Triton provider: kernels for NVIDIA and AMD GPUs, compiled when they are first needed.

Attention is one template, specialized by the device functions of codec parts (``attend.py``, ``tiles.py``);
so are appending and packing (``append.py``, ``encode.py``). Without a GPU the same kernels compile ahead of
time (``ahead.py``), and run in Triton's interpreter where ``TRITON_INTERPRET=1`` is set and the provider is
asked for by name.
"""

from __future__ import annotations

import importlib
import importlib.util
import os

import torch

from graphwright.kernels.registry import register_provider

PROVIDER = "triton"
#: Before it a template's tuples of tiles do not compile.
OLDEST = (3, 6)
#: Below it a card multiplies no bfloat16.
OLDEST_CARD = (8, 0)
#: The modules that register kernels.
MODULES = ("attention_ops", "prefix", "append", "linear", "routed", "score_pages", "choose_pages")


def installed() -> str | None:
    """Why Triton's kernels cannot even be compiled here; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    import triton

    found = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if found < OLDEST:
        return f"Triton {triton.__version__} is too old, {OLDEST[0]}.{OLDEST[1]} is the oldest that will do"
    return None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def available() -> tuple[bool, str]:
    """Whether kernels can run on this machine, and why not."""
    reason = installed()
    if reason is not None:
        return False, reason
    if interpreted():
        return True, "the interpreter"
    if not torch.cuda.is_available():
        return False, "torch sees no GPU"
    return card_reason(torch.cuda.get_device_capability(), torch.version.hip is not None)


def card_reason(capability: tuple[int, int], is_amd: bool = False) -> tuple[bool, str]:
    """Whether a card of this compute capability can run the kernels, and why not."""
    if is_amd or capability >= OLDEST_CARD:
        return True, ""
    found, needed = (".".join(map(str, version)) for version in (capability, OLDEST_CARD))
    return False, f"the card has compute capability {found}; bfloat16 kernels need {needed}"


register_provider(PROVIDER, ("cuda",), available, on_request=("cpu",) if interpreted() else ())
if installed() is None:
    for _module in MODULES:
        importlib.import_module(f"{__name__}.{_module}")
