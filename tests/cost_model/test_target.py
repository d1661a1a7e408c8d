from __future__ import annotations

from dataclasses import replace

import pytest

from graphwright.cost_model import load_target, match_device, resolve_target, targets
from graphwright.cost_model.target import FOLDER
from graphwright.ir.errors import InputError, UnknownTargetError

GPUS = [name for name in targets() if name != "cpu"]


def test_the_targets_that_the_project_promises():
    assert {"cpu", "a100", "a100-40gb", "h100", "h100-pcie", "h200"} <= set(targets())
    assert all("\n" not in line and line for line in targets().values())
    assert {path.stem for path in FOLDER.glob("*.toml")} == set(targets())


@pytest.mark.parametrize("name", GPUS)
def test_every_figure_has_a_source(name):
    target = resolve_target(name)
    figures = {"memory", "bandwidth", "launch_overhead", *(f"peak_flops.{d}" for d in target.peak_flops)}
    assert figures <= set(target.sources)
    assert all(len(source) > 20 for source in target.sources.values())
    assert target.flops_rate("bfloat16") > target.flops_rate("float32")


def test_peaks_are_dense():
    """Data sheets print twice these numbers, with structured sparsity."""
    assert resolve_target("h100").flops_rate("bfloat16") == 989.4e12
    assert resolve_target("h200").flops_rate("bfloat16") == 989.5e12
    assert resolve_target("a100").flops_rate("bfloat16") == 312e12
    assert resolve_target("mi300x").flops_rate("bfloat16") == 1307.4e12


@pytest.mark.parametrize("name", ["H100", " h100 ", "h100-sxm", "H100_SXM", "h100 80gb"])
def test_spellings(name):
    assert resolve_target(name).name == "h100"


def test_a_target_resolves_to_itself():
    target = resolve_target("h200")
    assert resolve_target(target) is target


@pytest.mark.parametrize(("wrong", "near"), [("h10", "h100"), ("mi300", "mi300x"), ("gtx4090", "rtx4090")])
def test_an_unknown_target_names_the_nearest(wrong, near):
    with pytest.raises(UnknownTargetError, match=near):
        resolve_target(wrong)


def test_a_name_that_resembles_nothing_lists_what_exists():
    with pytest.raises(UnknownTargetError, match="h100"):
        resolve_target("zzzzzzzz")
    with pytest.raises(InputError, match="name"):
        resolve_target(3)


@pytest.mark.parametrize(
    ("device", "gib", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 79, "h100"),
        ("NVIDIA H100 PCIe", 79, "h100-pcie"),
        ("NVIDIA H200", 139, "h200"),
        ("NVIDIA A100-SXM4-40GB", 39, "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", 79, "a100"),
        ("NVIDIA L4", 22, "l4"),
        ("NVIDIA L40S", 44, "l40s"),
        ("AMD Instinct MI300X", 191, "mi300x"),
    ],
)
def test_devices_are_recognized(device, gib, name):
    found = match_device(device, gib * 2**30)
    assert found.name == name
    assert found.memory_bytes == gib * 2**30
    assert match_device("Some Accelerator", 2**34) is None


def test_auto_follows_the_device(monkeypatch):
    import torch

    class Properties:
        name, total_memory = "NVIDIA H200", 139 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    assert resolve_target("auto").name == "h200"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_target("auto").name == "cpu"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("value = 3.35e12", "value = 3350"),
        ("value = 3.35e12", 'value = "fast"'),
        ("value = 3.35e12", "value = nan"),
        ("value = 3.35e12", "value = inf"),
        ("value = 3.35e12", "value = true"),
        ("value = 3.35e12", "value = 0"),
        ("value = 80_000_000_000", "value = 80"),
        ("value = 52_428_800", 'value = "50MB"'),
        ("value = 2.5e-6", "value = 2.5"),
        ("value = 989.4e12", "value = -1"),
        ("[bandwidth]", "[bandwith]"),
        ("[peak_flops.float32]", "[peak_flops.float31]"),
        ("name = ", "nam = "),
        ("[memory]", "[memory"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, old, new):
    text = (FOLDER / "h100.toml").read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "mine.toml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(InputError, match="where"):
        load_target(path)


def test_a_figure_without_a_source_is_refused(tmp_path):
    lines = (FOLDER / "h100.toml").read_text(encoding="utf-8").splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("source"))
    path = tmp_path / "mine.toml"
    path.write_text("\n".join(lines[:at] + lines[at + 1 :]), encoding="utf-8")
    with pytest.raises(InputError, match="source"):
        load_target(path)


@pytest.mark.parametrize(
    ("entry", "line", "words"),
    [
        ("source = ", 'source = ""', "no source"),
        ("source = ", 'source = "  "', "no source"),
        ("source = ", "source = 2023", "no source"),
        ("source = ", 'source = "\\u001b[31mred"', "no source"),
        ("vendor = ", 'vendor = "acme"', "acme"),
        ("kind = ", 'kind = "tpu"', "cuda"),
        ("kind = ", "kind = 3", "not a name"),
        ("name = ", 'name = ""', "not a name"),
        ("name = ", 'name = "\\u001b[31mred"', "not a name"),
        ("aliases = ", 'aliases = "h100"', "list of names"),
        ("aliases = ", "aliases = [3]", "list of names"),
        ("aliases = ", "alias = []", "did you mean aliases"),
        ("value = ", "valu = 80e9", "no value"),
        ("value = ", "value = 80e9\nvalues = 1", "memory.values"),
        ("[bandwidth]", "[bandwith]", "did you mean bandwidth"),
        ("[peak_flops.int8]", "[peak_flops.int33]", "not a dtype"),
        ("name = ", 'memory = 80e9\nname = "h100"', "not a readable|no value"),
        ("name = ", 'measured = 1\nname = "h100"', "not a table"),
    ],
)  # fmt: skip
def test_a_file_with_an_entry_that_means_nothing_is_refused(tmp_path, entry, line, words):
    lines = (FOLDER / "h100.toml").read_text(encoding="utf-8").splitlines()
    at = next(i for i, found in enumerate(lines) if found.startswith(entry))
    path = tmp_path / "mine.toml"
    path.write_text("\n".join([*lines[:at], line, *lines[at + 1 :]]), encoding="utf-8")
    with pytest.raises(InputError, match=words) as error:
        load_target(path)
    assert error.value.hint and error.value.where == str(path)
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize("share", ["nan", "inf", "0", "-0.5", "1.5", "true", '"most"'])
def test_a_measured_share_is_above_zero_and_at_most_one(tmp_path, share):
    text = (FOLDER / "h100.toml").read_text(encoding="utf-8")
    path = tmp_path / "mine.toml"
    path.write_text(f"{text}\n[measured]\nlinear_bandwidth = {share}\n", encoding="utf-8")
    with pytest.raises(InputError, match="linear_bandwidth"):
        load_target(path)
    path.write_text(f"{text}\n[measured]\nlinear_bandwidth = 0.8\n", encoding="utf-8")
    assert load_target(path).efficiency("linear_bandwidth") == 0.8


def test_a_file_that_is_not_there(tmp_path):
    for path in ("nowhere.toml", tmp_path):
        with pytest.raises(InputError, match="readable"):
            load_target(path)


@pytest.mark.parametrize("content", [bytes(range(256)), b"", b"name = 1\nname = 2\n", b"{}"])
def test_a_file_that_is_no_target(tmp_path, content):
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(InputError, match="mine"):
        load_target(path)


def test_targets_are_immutable_and_print_their_name():
    target = resolve_target("h100")
    assert str(target) == "h100"
    with pytest.raises(TypeError):
        target.peak_flops["float32"] = 1.0
    with pytest.raises(InputError, match="bandwidth"):
        replace(target, bandwidth=0.0)
