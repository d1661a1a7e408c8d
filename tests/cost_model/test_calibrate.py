from __future__ import annotations

import json

import pytest
import torch

from graphwright.cost_model import calibrate, resolve_target
from graphwright.ir.errors import InputError

MEASURED = calibrate.Measured(
    cpu=calibrate.cpu_name(),
    threads=1,
    bandwidth=2e10,
    flops={"float32": 1e11, "bfloat16": 3e11},
    launch_overhead=2e-6,
    buffer_bytes=2**29,
    bandwidths=[[2.0**25, 4e10], [2.0**29, 2e10]],
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(calibrate.CACHE_VARIABLE, str(tmp_path))
    return tmp_path


@pytest.fixture
def quick(monkeypatch):
    """Measures a small buffer, and counts how often it measures."""
    runs = []
    measure = calibrate._measure

    def counted(tell, seconds):
        runs.append(seconds)
        return measure(tell, seconds)

    monkeypatch.setattr(calibrate, "_BUFFER_BYTES", 2**24)
    monkeypatch.setattr(calibrate, "_bfloat16_rate", lambda limit: None)
    monkeypatch.setattr(calibrate, "_measure", counted)
    return runs


def test_measures_once_and_remembers(folder, quick):
    steps = []
    first = calibrate.measure_cpu(lambda step, done: steps.append((step, done)), seconds=0.05)
    assert first.bandwidth > 0
    assert first.flops["float32"] > 0
    assert 0 < first.launch_overhead < 1
    assert [done for _, done in steps] == sorted(done for _, done in steps)
    assert steps[-1][1] == 1.0
    assert calibrate.measure_cpu(seconds=0.05) == first
    assert len(quick) == 1
    calibrate.measure_cpu(seconds=0.05, refresh=True)
    assert len(quick) == 2
    assert len(list(folder.iterdir())) == 1


def test_larger_buffers_are_not_read_faster(folder, quick):
    sizes, rates = zip(*calibrate.measure_cpu(seconds=0.05).bandwidths, strict=True)
    assert list(sizes) == sorted(sizes)
    assert list(rates) == sorted(rates, reverse=True)


def test_the_programs_linear_is_measured_beside_it(folder, quick):
    def linear(x, weight):
        return torch.nn.functional.linear(x.float(), weight.float())

    fraction = calibrate.measure_cpu(seconds=0.05, linear=linear).efficiencies["linear_bandwidth"]
    assert fraction > 0
    assert calibrate.cached_measured().efficiencies == {"linear_bandwidth": fraction}
    assert resolve_target("cpu").measured["linear_bandwidth"] == fraction


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"version": 1}', json.dumps({"version": 0, **MEASURED.__dict__})]
)
def test_a_damaged_file_is_measured_again(folder, text):
    calibrate._store(MEASURED)
    assert calibrate.cached_measured() == MEASURED
    next(folder.iterdir()).write_text(text, encoding="utf-8")
    assert calibrate.cached_measured() is None


def test_an_absurd_figure_counts_as_none(folder):
    from dataclasses import replace

    calibrate._store(replace(MEASURED, bandwidth=0.0))
    assert calibrate.cached_measured() is None


def test_an_interrupted_write_leaves_the_old_figures(folder, monkeypatch):
    calibrate._store(MEASURED)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate._store(MEASURED)
    assert calibrate.cached_measured() == MEASURED
    assert len(list(folder.iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_no_error(folder, monkeypatch, quick):
    blocked = folder / "file"
    blocked.write_text("", encoding="utf-8")
    monkeypatch.setenv(calibrate.CACHE_VARIABLE, str(blocked / "below"))
    assert calibrate.measure_cpu(seconds=0.02).bandwidth > 0
    assert calibrate.cached_measured() is None


def test_without_measuring_the_figures_are_assumed(folder, quick):
    target = resolve_target("cpu", calibrate=False)
    assert not quick
    assert target.sources["bandwidth"].startswith("assumed")
    assert target.sources["memory"].startswith("reported")
    assert target.memory_bytes == calibrate.system_memory()
    assert target.measured == {}


def test_measured_figures_say_where_they_are_from(folder):
    calibrate._store(MEASURED)
    target = resolve_target("cpu")
    assert target.title == calibrate.cpu_name()
    assert target.bandwidth == 2e10
    assert target.flops_rate("bfloat16") == 3e11
    assert target.read_rate(2**20) == 4e10
    assert target.read_rate(2**40) == 2e10
    assert target.sources["bandwidth"].startswith("measured on")
    assert target.sources["peak_flops.bfloat16"].startswith("measured on")


def test_a_crashing_product_is_left_out(monkeypatch):
    """Some virtual machines end a process that multiplies in bfloat16."""
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGILL)"
    monkeypatch.setattr(calibrate, "_CHILD", crash)
    assert calibrate._bfloat16_rate(0.1) is None
    monkeypatch.setattr(calibrate, "_CHILD", "print(12.5)")
    assert calibrate._bfloat16_rate(0.1) == 12.5


def test_no_time_is_no_measurement(folder):
    with pytest.raises(InputError, match="seconds"):
        calibrate.measure_cpu(seconds=0)
