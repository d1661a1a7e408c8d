"""The choice of a kernel and its reason; the build, its cache and its failures."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from graphwright.ir.errors import PassError
from graphwright.kernels import registry, triton
from graphwright.kernels.cpp import build

ROOT = Path(__file__).resolve().parents[2]


def test_first_provider_that_takes_the_arguments() -> None:
    kernel = registry.select("linear", "cpu", x=torch.zeros(2, 4), weight=torch.zeros(3, 4))
    assert kernel.provider == "cpp" and kernel.op is torch.ops.graphwright_cpp.linear.default
    assert "cpp" in kernel.reason
    assert torch.equal(kernel(torch.ones(2, 4), torch.ones(3, 4)), torch.full((2, 3), 4.0))


@pytest.mark.parametrize(("x", "weight", "device", "reason"), [
    (torch.zeros(2, 4).half(), torch.zeros(3, 4).half(), "cpu", "float16"),
    (torch.zeros(2, 4), torch.zeros(3, 4).bfloat16(), "cpu", "several dtypes"),
    (torch.zeros(2, 4), torch.zeros(4, 3).t(), "cpu", "row-major"),
    (torch.zeros(2, 4), torch.zeros(3, 4), "mps", "does not serve mps"),
])  # fmt: skip
def test_fallback_says_why(x: torch.Tensor, weight: torch.Tensor, device: str, reason: str) -> None:
    kernel = registry.select("linear", device, x=x, weight=weight)
    assert kernel.provider == registry.REFERENCE and kernel.op is torch.ops.graphwright.linear.default
    assert reason in kernel.reason


@pytest.mark.parametrize(("changed", "reason"), [
    (dict(weight=torch.zeros(3, 4, 5).transpose(1, 2)), "of the experts' weights has a stride"),
    (dict(x=torch.zeros(2, 4, 2).transpose(1, 2)), "of x has a stride"),
    (dict(index=torch.zeros(2, 2, dtype=torch.int32)), "int32, not int64"),
    (dict(bias=torch.zeros(3, 5).bfloat16()), "several dtypes"),
])  # fmt: skip
def test_routed_linear_refuses_with_a_reason(changed: dict[str, torch.Tensor], reason: str) -> None:
    given = dict(x=torch.zeros(2, 1, 4), index=torch.zeros(2, 2).long(), weight=torch.zeros(3, 5, 4))
    assert registry.select("routed_linear", "cpu", **given).provider == "cpp"
    kernel = registry.select("routed_linear", "cpu", **{**given, **changed})
    assert kernel.provider == registry.REFERENCE and reason in kernel.reason


def test_other_dtypes_of_attention_are_refused() -> None:
    q = torch.zeros(1, 2, 1, 8, dtype=torch.float16)
    kernel = registry.select("cache_attention", "cpu", q=q, keys=q, values=q)
    assert kernel.provider == registry.REFERENCE and "float16" in kernel.reason


def test_op_without_a_kernel_runs_its_reference() -> None:
    kernel = registry.select("slot_positions", "cpu")
    assert kernel.provider == registry.REFERENCE and "no kernel for slot_positions" in kernel.reason


def test_reference_by_name() -> None:
    kernel = registry.select("linear", "cpu", "reference", x=torch.zeros(1, 4), weight=torch.zeros(3, 4))
    assert kernel.provider == registry.REFERENCE and "by name" in kernel.reason


def test_asking_for_what_is_missing_raises() -> None:
    with pytest.raises(PassError, match="no kernel provider 'nonsense'"):
        registry.select("linear", "cpu", ["nonsense"])
    with pytest.raises(PassError, match="'cpp' has no kernel for slot_positions"):
        registry.select("slot_positions", "cpu", "cpp")
    with pytest.raises(PassError, match="no semantic op 'convolution'"):
        registry.select("convolution", "cpu")
    with pytest.raises(PassError, match="no argument 'y'"):
        registry.select("linear", "cpu", y=1)


def test_list_of_kernels() -> None:
    listed = {k.op_name for k in registry.kernels() if k.provider == "cpp"}
    assert listed == {
        "linear", "linear_group", "routed_linear", "cache_append", "cache_attention", "append_attention",
        "packed_attention", "prefix_attention", "score_pages", "choose_pages",
    }  # fmt: skip
    assert {k.op_name for k in registry.kernels("linear")} == {"linear"}
    assert "cpp" in [p.name for p in registry.providers()]


@pytest.fixture
def spare_provider(monkeypatch: pytest.MonkeyPatch) -> str:
    """A provider that exists for one test."""
    monkeypatch.setattr(registry, "_PROVIDERS", dict(registry._PROVIDERS))
    monkeypatch.setattr(registry, "_IMPLEMENTATIONS", dict(registry._IMPLEMENTATIONS))
    registry.register_provider("spare", ("cpu",), lambda: (True, ""))
    return "spare"


def test_python_kernel_becomes_an_op(spare_provider: str) -> None:
    @registry.implements("rms_norm", spare_provider, lambda x, **_: None if x.dim() == 2 else "not a matrix")
    def rms_norm(x, weight, eps, offset=0.0, weight_in_float=False):  # type: ignore[no-untyped-def]
        return x * weight

    matrix, weight = torch.full((2, 3), 2.0), torch.full((3,), 3.0)
    kernel = registry.select("rms_norm", "cpu", x=matrix, weight=weight, eps=1e-5)
    assert kernel.provider == spare_provider and str(kernel.op) == "graphwright_spare.rms_norm.default"
    assert torch.equal(kernel(matrix, weight, 1e-5), torch.full((2, 3), 6.0))
    refused = registry.select("rms_norm", "cpu", x=weight, weight=weight, eps=1e-5)
    assert refused.provider == registry.REFERENCE and "spare: not a matrix" in refused.reason


def test_parameters_are_checked(spare_provider: str) -> None:
    with pytest.raises(PassError, match=r"takes \['x', 'w'\]"):
        registry.implements("linear", spare_provider)(lambda x, w: x)
    with pytest.raises(PassError, match="defaults"):
        registry.implements("linear", spare_provider)(lambda x, weight, bias: x)


def test_no_compiler_means_the_reference(tmp_path: Path) -> None:
    code = (
        "import torch; from graphwright.kernels import registry\n"
        "k = registry.select('linear', 'cpu', x=torch.ones(1, 4), weight=torch.ones(3, 4))\n"
        "print(k.provider, '|', k.reason, '|', k(torch.ones(1, 4), torch.ones(3, 4)).sum().item())"
    )
    environment = {**os.environ, "CXX": "/nonexistent/c++", build.CACHE_VARIABLE: str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    provider, reason, total = done.stdout.strip().split(" | ")
    assert provider == "reference" and "no C++ compiler" in reason and total == "12.0"
    assert not list(tmp_path.rglob("*.so"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """One small C++ file."""
    path = tmp_path / "small.cpp"
    path.write_text('extern "C" int answer() { return 42; }\n')
    return path


def test_build_is_cached_and_keyed_by_the_source(source: Path, tmp_path: Path) -> None:
    said: list[str] = []
    first = build.build([source], tmp_path / "cache", said.append)
    assert said == ["building the C++ kernels, once"]
    assert build.build([source], tmp_path / "cache", said.append) == first and len(said) == 1
    source.write_text(source.read_text() + "// changed\n")
    assert build.build([source], tmp_path / "cache", said.append) != first and len(said) == 2


def test_damaged_library_is_built_again(source: Path, tmp_path: Path) -> None:
    library = build.build([source], tmp_path)
    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 2])
    assert build.build([source], tmp_path) == library
    assert library.stat().st_size == len(whole)


def test_two_builds_at_once(source: Path, tmp_path: Path) -> None:
    found: list[Path] = []
    workers = [
        threading.Thread(target=lambda: found.append(build.build([source], tmp_path / "c"))) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(set(found)) == 1 and build._intact(found[0])
    assert sorted(p.suffix for p in (tmp_path / "c").iterdir()) == [".sha256", ".so"]


def test_compiler_error_is_a_reason(source: Path, tmp_path: Path) -> None:
    source.write_text("this is no C++\n")
    with pytest.raises(build.BuildFailure, match="error"):
        build.build([source], tmp_path)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_one_openmp_runtime() -> None:
    assert build.available()[0]
    lines = Path("/proc/self/maps").read_text().splitlines()
    runtimes = {
        line.split()[-1] for line in lines if any(n in line for n in ("libgomp", "libomp.", "libiomp5"))
    }
    assert len(runtimes) == 1, runtimes


# --- who may run Triton's kernels --------------------------------------------------------------------


def test_cards_without_bfloat16_are_refused() -> None:
    assert triton.card_reason((8, 0)) == (True, "")
    assert triton.card_reason((9, 4), is_amd=True)[0]
    ok, why = triton.card_reason((7, 5))
    assert not ok and why == "the card has compute capability 7.5; bfloat16 kernels need 8.0"


def test_without_triton_the_reason_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert triton.available() == (False, "Triton is not installed")


def test_a_triton_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("triton")
    monkeypatch.setattr(module, "__version__", "3.5.1")
    ok, why = triton.available()
    assert not ok and "Triton 3.5.1 is too old, 3.6 is the oldest" in why


def test_the_interpreter_is_only_used_by_name() -> None:
    arguments = dict(x=torch.zeros(2, 4).half(), weight=torch.zeros(3, 4).half())
    assert registry.select("linear", "cpu", **arguments).provider == registry.REFERENCE
    assert registry.select("linear", "cpu", "triton", **arguments).provider == "triton"


def test_what_runs_elsewhere_may_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the device were here; the kernel's own reasons still count."""
    provider = next(p for p in registry.providers() if p.name == "triton")
    missing = dataclasses.replace(provider, available=lambda: (False, "torch sees no GPU"))
    monkeypatch.setitem(registry._PROVIDERS, "triton", missing)
    arguments = dict(x=torch.zeros(2, 4), weight=torch.zeros(3, 4))
    assert "torch sees no GPU" in registry.select("linear", "cuda", **arguments).reason
    with registry.assuming_available("triton"):
        assert registry.select("linear", "cuda", **arguments).provider == "triton"
        double = {name: x.double() for name, x in arguments.items()}
        assert registry.select("linear", "cuda", **double).provider == registry.REFERENCE
    assert registry.select("linear", "cuda", **arguments).provider == registry.REFERENCE
