"""Kernels compiled without a GPU: the just-in-time compiler's own keys, errors of compilers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from graphwright.cost_model.target import resolve_target, targets
from graphwright.kernels import registry
from graphwright.kernels.triton import ahead, shipped
from graphwright.kernels.triton.ahead import ARCHITECTURES, CompileError, compile_launches
from graphwright.kernels.triton.launch import Launch, recording
from graphwright.kernels.triton.variant import describe
from tests.numerics import small_kernels
from tests.numerics.small_kernels import mixed_launch

ROOT = Path(__file__).resolve().parents[2]

# What the just-in-time compiler itself computes for a launch with real tensors on a machine with the GPU.
JUST_IN_TIME = """
import json, sys
from graphwright.kernels.triton.compile_worker import activate
from tests.numerics import test_triton_ahead as test
for backend, arch, warp in (("cuda", 80, 32), ("hip", "gfx942", 64)):
    activate(backend, arch, warp)
    for launch in test.variants("cpu"):
        launch.kernel.device_caches.clear()
        options = dict(num_warps=launch.num_warps, num_stages=launch.num_stages, **launch.options)
        made = launch.kernel.run(
            grid=(1,), warmup=True, **launch.arguments, **launch.constants, **options
        )
        print("KEY", made.hash)
"""


@pytest.fixture(scope="module", autouse=True)
def _cache() -> Any:
    """Triton's cache beside those of the other tests: its keys cover the sources."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(Path(os.environ["GRAPHWRIGHT_CACHE_DIR"]) / "triton"))
        yield


def variants(device: str) -> list[Launch]:
    """Launches that Triton compiles differently, each for a reason of its own."""
    wide = torch.zeros(256, dtype=torch.float32, device=device)
    mask = torch.zeros(256, dtype=torch.bool, device=device)
    return [
        mixed_launch(device),
        mixed_launch(device, rows=1),
        mixed_launch(device, rows=48),
        mixed_launch(device, wide=8),
        mixed_launch(device, wide=2**63 + 5),
        mixed_launch(device, mask=mask),
        mixed_launch(device, x=wide),
        mixed_launch(device, x=wide[1:]),
        mixed_launch(device, DECODE=small_kernels.double),
        mixed_launch(device, BLOCK=64, num_warps=2),
        mixed_launch(device, NAMES=("a", 1)),
        mixed_launch(device, strides=(1, 1)),
    ]


def test_keys_are_the_just_in_time_compilers_own() -> None:
    made = [c for arch in ("sm_80", "gfx942") for c in compile_launches(variants("meta"), arch)]
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment = {**kept, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", JUST_IN_TIME]
    done = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True)
    expected = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("KEY")]
    assert [c.error for c in made] == [None] * len(made)
    assert [c.key for c in made] == expected
    assert len(set(expected)) == len(expected)


def test_numbers_that_compile_alike_are_one_variant() -> None:
    first = describe(mixed_launch(tokens=5, rows=7, scale=2.5, wide=2**40))
    assert describe(mixed_launch(tokens=9, rows=1001, scale=-1e30, wide=-(2**50) + 1 - 1)) == first
    assert describe(mixed_launch(rows=8)) == first  # not a multiple of 16
    assert describe(mixed_launch(rows=0)) == describe(mixed_launch(rows=160)) != first


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_architecture_gives_a_binary_and_its_resources(arch: str) -> None:
    (made,) = compile_launches([mixed_launch()], arch)
    assert made.error is None and made.label == "mixed" and made.arch == arch
    assert made.binary[:4] == b"\x7fELF" and made.kind == ("hsaco" if "gfx" in arch else "cubin")
    assert made.name == "mixed" and json.loads(made.metadata)["hash"] == made.key
    assert 4 <= made.registers <= 255 and made.spills == 0 and made.num_warps == 4 and made.shared == 0


def test_shared_memory_that_the_architecture_lacks_is_an_error() -> None:
    x = torch.zeros(256, 256, dtype=torch.bfloat16, device="meta")
    launch = Launch(small_kernels.product, (1,), {"a": x, "b": x, "out": x}, {"SIZE": 256}, 8, label="big")
    (made,) = compile_launches([launch], "sm_80")
    assert made.shared > ARCHITECTURES["sm_80"].shared
    assert made.error is not None and f"{made.shared} bytes of shared memory" in made.error


def test_a_variant_that_fails_leaves_the_others() -> None:
    x = torch.zeros(8, device="meta")
    broken = Launch(small_kernels.broken, (1,), {"x": x}, {"SIZE": 8}, label="broken")
    crashing = Launch(small_kernels.crashing, (1,), {}, {}, label="crashing")
    good = mixed_launch()
    made = compile_launches([good, broken, crashing, good, mixed_launch(rows=1)], "sm_80", processes=1)
    assert [c.error is None for c in made] == [True, False, False, True, True]
    assert "SIZE must be 0" in str(made[1].error)
    assert "died" in str(made[2].error) and "nonsense on the compiler's own output" in str(made[2].error)
    assert made[3].key == made[0].key


def test_a_compiler_that_hangs_is_stopped() -> None:
    hanging = Launch(small_kernels.hanging, (1,), {}, {}, label="hanging")
    (made,) = compile_launches([hanging], "sm_80", time_limit=8)
    assert made.error == "the compiler took longer than 8 s"


def test_recorded_launches_do_not_run() -> None:
    launch = mixed_launch()
    with recording() as found:
        launch.run()
    assert found == [launch]


def test_every_target_has_an_architecture_that_is_compiled_for() -> None:
    found = [resolve_target(name) for name in targets()]
    archs = {target.arch for target in found if target.kind != "cpu"}
    assert archs and archs <= ARCHITECTURES.keys()


def test_unknown_architectures_and_arguments_are_refused() -> None:
    with pytest.raises(CompileError, match=r"sm_12'[\s\S]*architectures: sm_80"):
        compile_launches([mixed_launch()], "sm_12")
    with pytest.raises(CompileError, match=r"no kernel takes a dict[\s\S]*where: rows"):
        compile_launches([mixed_launch(rows={})], "sm_80")
    with pytest.raises(CompileError, match=r"a constant cannot be a dict[\s\S]*where: NAMES"):
        compile_launches([mixed_launch(NAMES={})], "sm_80")


def test_a_missing_or_old_triton_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setattr(triton, "__version__", "3.5.1")
    with pytest.raises(CompileError, match=r"Triton 3.5.1 is too old[\s\S]*graphwright\[triton\]"):
        compile_launches([mixed_launch()], "sm_80")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CompileError, match=r"Triton is not installed[\s\S]*graphwright\[triton\]"):
        ahead.triton_version()


def test_an_installed_variant_is_a_hit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (made,) = compile_launches([mixed_launch()], "sm_90")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    files = {f"{made.name}.cubin": made.binary, f"{made.name}.json": made.metadata.encode()}
    assert ahead.install(made.key, made.name, files)
    assert not ahead.install(made.key, made.name, files)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    assert len(before) == 3  # binary, metadata, group
    (again,) = compile_launches([mixed_launch()], "sm_90")
    assert again.error is None and again.key == made.key and again.binary == made.binary
    after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    assert after == before  # a compilation writes the sources and the binary again


# --- the shipped set -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("arch", shipped.ARCHITECTURES)
def test_the_shipped_set_compiles_and_costs_what_the_table_says(arch: str) -> None:
    """With the table's version of Triton exactly; with another one nothing spills more."""
    table = shipped.read_table()
    expected = table["kernels"][arch]
    made = shipped.compile_shipped(arch)
    rows = {label: shipped.row_of(c) for label, c in made.items()}
    assert {label: row["error"] for label, row in rows.items() if "error" in row} == {}
    assert list(made) == list(expected), "python -m graphwright.kernels.triton.shipped --write"
    if ahead.triton_version() == table["triton"]:
        differ = {x: (row, expected[x]) for x, row in rows.items() if row != expected[x]}
        assert differ == {}, "python -m graphwright.kernels.triton.shipped --write"
    more = {x: c.spills for x, c in made.items() if c.spills > expected[x].get("spills", 0)}
    assert more == {}


def test_the_table_was_made_by_the_pinned_triton() -> None:
    pins = (ROOT / "constraints.txt").read_text()
    assert f"\ntriton=={shipped.read_table()['triton']};" in pins


def test_every_registered_kernel_is_in_the_shipped_set() -> None:
    """A new op of the provider needs a case."""
    names = " ".join(name for name, _ in shipped.cases())
    for kernel in registry.kernels():
        if kernel.provider == "triton":
            words = CASES_OF.get(kernel.op_name, kernel.op_name.replace("_", " "))
            assert words in names, kernel.op_name


# How cases name an op, where they do not spell it out.
CASES_OF = {
    "cache_append": "append", "cache_attention": "attend", "packed_attention": "packed",
    "routed_linear": "routed", "append_attention": "attend", "prefix_attention": "attend",
}  # fmt: skip


def test_a_case_without_a_kernel_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "cases", lambda: iter([("nothing", lambda: None)]))
    with pytest.raises(CompileError, match="the case 'nothing' launches nothing"):
        shipped.shipped_launches("sm_90")
    monkeypatch.setitem(shipped.CODECS, "odd", ("xor_sign", "xor_sign"))
    monkeypatch.setattr(shipped, "cases", lambda: iter([("odd", lambda: shipped._encode("odd", 0))]))
    with pytest.raises(CompileError, match=r"the case .odd. has no kernel"):
        shipped.shipped_launches("sm_90")


def test_the_table_is_not_written_if_a_case_does_not_compile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    x = torch.zeros(8, device="meta")
    broken = Launch(small_kernels.broken, (1,), {"x": x}, {"SIZE": 8}, label="broken")
    monkeypatch.setattr(shipped, "ARCHITECTURES", ("sm_80",))
    monkeypatch.setattr(shipped, "cases", lambda: iter([("bad", broken.run), ("good", mixed_launch().run)]))
    (wrong,) = shipped.write_table(tmp_path / "table.json")
    assert wrong.startswith("sm_80 bad: broken") and not (tmp_path / "table.json").exists()
    monkeypatch.setattr(shipped, "cases", lambda: iter([("good", mixed_launch().run)]))
    assert shipped.write_table(tmp_path / "table.json") == []
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["triton"] == ahead.triton_version()
    assert set(table["kernels"]["sm_80"]["good: mixed"]) == {"registers", "spills", "shared", "num_warps"}
