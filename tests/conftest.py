"""What every test shares: no network, one torch thread, a cache of its own, markers."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Before transformers and graphwright read them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Every machine tests the same library kernels; and some virtual machines announce AMX and refuse it.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
os.environ.setdefault("GRAPHWRIGHT_CACHE_DIR", str(ROOT / ".cache" / "tests"))

import pytest  # noqa: E402
import torch  # noqa: E402

# Without a GPU Triton's kernels run on the CPU; what compiles them does so in processes of its own.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def pytest_configure(config: pytest.Config) -> None:
    """Two workers on two cores must not fight over them, nor measure the machine."""
    torch.set_num_threads(1)
    from tests.machine import install

    install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` need a GPU, those of Triton's interpreter the interpreter: one of them at a time.

    ``GRAPHWRIGHT_GPU_TESTS=cpu`` rehearses the former in the interpreter.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    on_gpu = torch.cuda.is_available() and not interpreted
    rehearsed = interpreted and os.environ.get("GRAPHWRIGHT_GPU_TESTS") == "cpu"
    reason = "the interpreter is on: TRITON_INTERPRET=0" if torch.cuda.is_available() else "torch sees no GPU"
    for item in items:
        if item.get_closest_marker("gpu"):
            if not (on_gpu or rehearsed):
                item.add_marker(pytest.mark.skip(reason=reason))
        elif not interpreted and item.path.name.startswith("test_triton_"):
            item.add_marker(pytest.mark.skip(reason="runs in Triton's interpreter: TRITON_INTERPRET=1"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def demo_model_dir() -> Path:
    """The folder that holds SmolLM2-135M-Instruct as GGUF; ``make test`` fetches it."""
    default = ROOT / ".cache" / "models" / "smollm2-135m-instruct"
    folder = Path(os.environ.get("GRAPHWRIGHT_DEMO_MODEL", default))
    if not (folder / MODEL_FILE).is_file():
        pytest.skip("the demo model is not fetched; `make test` does it")
    return folder
