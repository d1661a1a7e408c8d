"""Configurations: what must hold for every proposal, whatever the model of time says."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from graphwright.cost_model.target import resolve_target, targets
from graphwright.ir.errors import InputError
from graphwright.kernels.triton import configs, proposals
from graphwright.kernels.triton.configs import (
    AttendShape,
    attend_config,
    candidates,
    device_facts,
    planned_device,
    planning_for,
)

GPUS = ("a100", "h200", "b200", "mi300x", "rtx4090", "l4")
CONTEXTS = (4096, 32_768, 131_072, 262_144)
# Stored bytes of a token of 128 features and tokens of a page.
STORES = {"bf16": (256.0, 0), "int4": (66.0, 64), "int2": (34.0, 128)}


@pytest.fixture(autouse=True)
def _no_tuned(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAPHWRIGHT_CACHE_DIR", str(tmp_path))
    configs.forget()
    yield
    configs.forget()


def shape(gpu="h200", store="bf16", **given):
    """Llama-3.1-8B's heads at 128k tokens unless said otherwise."""
    nbytes, page = STORES[store]
    usual = {
        "batch": 1, "groups": 8, "group": 4, "tokens": 1, "key_width": 128, "value_width": 128,
        "slots": 131_072, "page": page, "key_bytes": nbytes, "value_bytes": nbytes, "dtype": torch.bfloat16,
    }  # fmt: skip
    return AttendShape(device=planned_device(gpu), **{**usual, **given})


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("store", STORES)
def test_a_token_is_computed_alike_in_steps_of_any_length(gpu, store):
    """Only the rows of a tile depend on the step: 16 where they suffice, else 32."""
    one = attend_config(shape(gpu, store))
    for tokens in (1, 2, 4, 5, 8, 17, 64):
        asked = shape(gpu, store, tokens=tokens)
        found = attend_config(asked)
        assert replace(found, block_m=0) == replace(one, block_m=0)
        assert found.block_m == (16 if 4 * tokens <= 16 else 32)
        assert [replace(c, block_m=0) for c in candidates(asked)] == [
            replace(c, block_m=0) for c in candidates(shape(gpu, store))
        ]


@pytest.mark.parametrize("page", [0, 16, 32, 48, 64, 80, 128, 1024, 4096])
@pytest.mark.parametrize("slots", [1, 37, 64, 1000, 131_072])
def test_chunks_are_whole_tiles_and_pages(page, slots):
    for gpu in GPUS:
        for config in candidates(shape(gpu, "int4", page=page, slots=slots)):
            assert config.block_n >= 16 and config.block_n & (config.block_n - 1) == 0
            assert config.chunk > 0 and config.chunk % config.block_n == 0
            if page:
                assert config.chunk % page == 0 and page % config.block_n == 0


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_every_multiprocessor_has_work(gpu, store, batch):
    """And partial results stay a small part of what is read, unless there is too little to read."""
    for slots in CONTEXTS:
        asked = shape(gpu, store, batch=batch, slots=slots)
        found = attend_config(asked)
        made = batch * asked.groups * math.ceil(slots / found.chunk)
        smallest = max(128, asked.page)
        assert made >= asked.device.multiprocessors or found.chunk == smallest
        parts = made * asked.group * (asked.value_width + 1) * 4 if slots > found.chunk else 0
        read = batch * asked.groups * slots * (asked.key_bytes + asked.value_bytes)
        assert parts <= read / (8 if slots > 4096 else 4)


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("width", [64, 80, 128, 256])
def test_tiles_fit(arch, dtype, width):
    """Of the widest heads in the widest dtype too, with the rows of a long step."""
    for page, nbytes in ((0, width * dtype.itemsize), (64, width / 2 + 2)):
        asked = shape(
            arch,
            key_width=width,
            value_width=width,
            key_bytes=nbytes,
            value_bytes=nbytes,
            dtype=dtype,
            page=page,
        )
        for config in candidates(asked):
            assert proposals.shared_bytes(asked, config) <= asked.device.shared_memory
            limit = 512 if asked.device.kind == "rocm" else 255
            assert proposals.registers(asked, config) <= limit


def test_candidates_are_ordered_and_differ():
    asked = shape(store="int4")
    found = candidates(asked)
    assert len(set(found)) == len(found) >= 8
    times = [proposals.seconds(asked, c) for c in found]
    # Tiles that are further from the usual one must be better by a little.
    assert all(later >= 0.96 * earlier for earlier, later in itertools.pairwise(times))
    assert times[0] <= 1.04 * min(times)
    assert candidates(asked)[0] == attend_config(asked)


def test_more_multiprocessors_make_more_splits():
    """A device with few keeps long chunks; short programs would only be combined again."""
    few, many = (attend_config(shape(gpu, "int4", slots=32_768)).chunk for gpu in ("l4", "mi300x"))
    assert few > many


def test_idle_multiprocessors_cost_time():
    """One split on each head leaves most of the device idle, and the model says so."""
    asked = shape()
    best = candidates(asked)[0]
    assert proposals.seconds(asked, replace(best, chunk=asked.slots)) > 3 * proposals.seconds(asked, best)
    shortest = replace(best, chunk=128)
    assert proposals.seconds(asked, shortest) > 1.1 * proposals.seconds(asked, best)


# --- devices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in targets() if n != "cpu"])
def test_planned_devices_agree_with_the_targets(name):
    target, facts = resolve_target(name), planned_device(name)
    assert facts.kind == target.kind
    assert facts.bandwidth == target.bandwidth
    assert facts.l2 == target.on_chip_cache
    assert planned_device(target.arch).shared_memory == facts.shared_memory


def test_tensors_on_no_gpu_are_planned_for_one():
    usual, meta = device_facts(torch.device("cpu")), torch.device("meta")
    with planning_for("b200") as facts:
        assert device_facts(meta) == facts == planned_device("b200")
        with planning_for(planned_device("gfx942")):
            assert device_facts(meta).kind == "rocm"
        assert device_facts(meta) == facts
    assert device_facts(meta) == usual


def test_an_unknown_gpu_is_an_error():
    with pytest.raises(InputError, match="nothing is known of a GPU 'sm_35'"):
        planned_device("sm_35")


@pytest.mark.parametrize("store", STORES)
def test_prompts_have_few_splits(store):
    """Their partial results would be larger than the cache: every split writes a vector for each row."""
    one, found = attend_config(shape("h100", store)), attend_config(shape("h100", store, tokens=512))
    assert attend_config(shape("h100", store, tokens=configs.MAX_STEP)).chunk == one.chunk
    assert replace(found, chunk=one.chunk, block_m=one.block_m) == one
    assert found.chunk % math.lcm(found.block_n, STORES[store][1] or 1) == 0
    assert 131_072 // found.chunk <= 2 < 131_072 // one.chunk
