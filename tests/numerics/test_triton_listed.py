"""Attention over lists of pages in Triton's interpreter against the ops' reference bodies."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from graphwright.ir.ops import SEMANTIC_OPS
from graphwright.kernels import registry
from graphwright.kernels.triton import attention, listed_attention
from graphwright.kernels.triton.configs import AttendConfig, AttendShape
from tests.numerics import inputs
from tests.numerics.packed_inputs import Packing, packed_step

TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3}  # as in test_triton_attention.py
INT4 = "token_range >> uniform(bits=4)"
TURNED = "random_rotation >> token_norm >> lloyd_max(bits=3)"
RECENT, SETTLED = 12, 5


@pytest.fixture(autouse=True)
def _several_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short lists are split too."""
    own = attention.attend_config

    def short(shape: AttendShape) -> AttendConfig:
        found = own(shape)
        return AttendConfig(found.block_m, min(found.block_n, 32), max(128, shape.page), 4, 2)

    monkeypatch.setattr(attention, "attend_config", short)
    monkeypatch.setattr(listed_attention, "_EXPECTED", 1.0)


def lists(step: dict[str, Any], groups: int, page: int, first: int, dense: list[int]) -> dict[str, Any]:
    """A step's lists of pages, by random scores; the first ``dense`` tokens of each row read everything."""
    lengths, counts, tokens = step["lengths"], step["counts"], step["positions"].shape[1]
    pages = -(-(int((lengths + counts).max()) + 9 - first) // page)
    scores = torch.rand(len(lengths), tokens, groups, pages)
    where = (step["positions"], lengths, counts, torch.tensor(dense), page, first, RECENT, SETTLED)
    made, chosen = SEMANTIC_OPS["choose_pages"].overload(scores, *where, 1, 0.4, 0.0)
    unused = torch.arange(pages) >= chosen[..., None]
    return dict(pages=made.masked_fill(unused, 2**30), chosen=chosen, page=page, first=first)


def dense_step(dtype: torch.dtype, page: int, first: int, dense: list[int], **options: Any) -> dict[str, Any]:
    """Arguments of ``cache_attention``; slots that hold nothing are NaN."""
    step = inputs.after_append(inputs.step(dtype, **options))
    slots, whole = torch.arange(step["keys"].shape[2]), (step["lengths"] + step["counts"])[:, None]
    for store in ("keys", "values"):
        step[store].masked_fill_((slots >= whole)[:, None, :, None], torch.nan)
    return {**step, **lists(step, step["keys"].shape[1], page, first, dense)}


def run(op_name: str, arguments: dict[str, Any]) -> torch.Tensor:
    found = registry.select(op_name, "cpu", ("triton",), **arguments)
    assert found.provider == "triton", found.reason
    result: torch.Tensor = found(**arguments)
    return result


def wide(value: Any) -> Any:
    """In float32, without what no query may see."""
    if isinstance(value, list):
        return [wide(v) for v in value[:3]] + value[3:]
    is_number = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.float().nan_to_num() if is_number else value


def check(op_name: str, arguments: dict[str, Any], **same_lists: torch.Tensor) -> None:
    """The kernel gives what the reference gives."""
    mine, dtype = run(op_name, arguments), arguments["q"].dtype
    assert mine.dtype == dtype and mine.is_contiguous() and not mine.isnan().any()
    kept = {name: x if name.endswith("constants") else wide(x) for name, x in arguments.items()}
    expected = SEMANTIC_OPS[op_name].overload(**kept | same_lists)
    error = (mine.float() - expected).norm() / expected.norm()
    assert error < TOLERANCE[dtype], error
    everything = SEMANTIC_OPS[op_name].overload(**kept | {"chosen": torch.full_like(kept["chosen"], -1)})
    assert (everything - expected).norm() > 0.05 * expected.norm()  # lists make a difference


@pytest.mark.parametrize(("page", "first", "options"), [
    (16, 0, dict(tokens=1, lengths=[500, 130], slots=640, dense=[0, 0])),
    (16, 3, dict(tokens=3, lengths=[260, 0, 31], heads=(2, 1), dense=[0, 0, 2])),
    (64, 0, dict(tokens=3, lengths=[290, 280], counts=[3, 2], heads=(3, 1), dense=[3, 1], sinks=True)),
    (5, 1, dict(tokens=2, lengths=[90], heads=(20, 1), dense=[0], softcap=3.0)),
    (24, 0, dict(tokens=2, lengths=[200], dims=(80, 64), dense=[0])),
], ids=str)  # fmt: skip
def test_dense_stores(page: int, first: int, options: dict[str, Any], poisoned: None) -> None:
    dtype = torch.float16 if options["tokens"] == 1 else torch.float32
    check("cache_attention", dense_step(dtype, page, first, **options))


@pytest.mark.parametrize(("codecs", "options"), [
    ((INT4, INT4), dict(tokens=1, lengths=[420], heads=(9, 3), dense=[0])),
    ((INT4, INT4), dict(tokens=3, lengths=[333, 0, 190], counts=[3, 3, 2], heads=(2, 1), dense=[0, 0, 1],
                        sinks=True)),
    ((TURNED, "channel_range >> uniform(bits=2)"), dict(tokens=2, lengths=[290], dense=[0], softcap=3.0)),
    (("float(bits=16)", "float(bits=16)"), dict(tokens=2, lengths=[245], dense=[1])),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("first", [0, 4])
def test_packed_stores(codecs: tuple[str, str], options: dict[str, Any], first: int, poisoned: None) -> None:
    """Pages that are listed and not packed yet are read from the tail."""
    keys, values = (Packing(codec, page=32, first=first, lag=SETTLED) for codec in codecs)
    dense = options["dense"]
    step = packed_step(torch.float16, keys, values, **{k: v for k, v in options.items() if k != "dense"})
    check("packed_attention", step | lists(step, step["keys"][1].shape[1], 32, first, dense))


def test_packed_stores_in_float32(poisoned: None) -> None:
    store = Packing(INT4, page=16, lag=SETTLED)
    step = packed_step(torch.float32, store, store, tokens=2, lengths=[140, 90], dims=(64, 64))
    check("packed_attention", step | lists(step, 2, 16, 0, [0, 1]))


@pytest.mark.parametrize("packed", [False, True])
def test_trees(packed: bool, poisoned: None) -> None:
    """A tree's tokens are read where their masks say so, on pages past that of their position too."""
    page = 16
    options: dict[str, Any] = dict(tokens=7, lengths=[141, 60], heads=(2, 1), tree=True)
    if packed:
        store = Packing(INT4, page=page, lag=SETTLED)
        step = packed_step(torch.float32, store, store, **options)
    else:
        step = inputs.after_append(inputs.step(torch.float32, **options))
    groups = (step["keys"][1] if packed else step["keys"]).shape[1]
    own = lists(step, groups, page, 0, [0, 3])
    # For the reference: with all pages that hold tokens of the step.
    number = torch.arange(own["pages"].shape[3])
    valid = number < own["chosen"][..., None]
    held = torch.zeros(*own["pages"].shape[:3], len(number) + 1, dtype=torch.bool)
    held.scatter_(3, torch.where(valid, own["pages"], len(number)).long(), True)
    lengths, ends = step["lengths"][:, None, None, None], (step["lengths"] + 7)[:, None, None, None]
    held = held[..., :-1] | ((number >= lengths // page) & (number * page < ends))
    full = torch.where(held, number, len(number)).sort(-1).values.int()
    chosen = torch.where(own["chosen"] < 0, -1, held.sum(-1)).int()
    assert bool((chosen > own["chosen"]).any())
    check("packed_attention" if packed else "cache_attention", step | own, pages=full, chosen=chosen)


@pytest.mark.parametrize("codec", [None, INT4])
def test_a_token_alone_and_in_a_step(codec: str | None, fair_dots: None) -> None:
    """The same bits, of tokens that read lists and of those that read everything."""
    if codec is None:
        op_name, whole = (
            "cache_attention",
            dense_step(torch.float16, 16, 0, [1], tokens=3, lengths=[413], slots=420, heads=(4, 1)),
        )
    else:
        store, op_name = Packing(codec, page=32, first=4, lag=SETTLED), "packed_attention"
        whole = packed_step(torch.float16, store, store, tokens=3, lengths=[327], heads=(4, 1))
        whole |= lists(whole, 1, 32, 4, [1])
    among = run(op_name, whole)
    for t in (0, 2):
        alone = dict(whole)
        for name, dim in (("q", 2), ("positions", 1), ("pages", 1), ("chosen", 1)):
            alone[name] = whole[name].narrow(dim, t, 1)
        alone["lengths"], alone["counts"] = whole["lengths"] + t, torch.ones_like(whole["counts"])
        assert torch.equal(run(op_name, alone)[:, 0], among[:, t]), t


def test_lists_of_everything_and_prompts_without_lists() -> None:
    """All pages listed, nothing listed by number, and more tokens than lists are made for: one result."""
    step = dense_step(torch.float32, 16, 0, [9], tokens=1, lengths=[230], heads=(2, 1))
    everything = run("cache_attention", step)
    pages = torch.arange(step["pages"].shape[3], dtype=torch.int32).expand_as(step["pages"])
    full = {**step, "pages": pages, "chosen": torch.full_like(step["chosen"], 15)}
    assert torch.equal(run("cache_attention", full), everything)
    none = {name: None for name in ("pages", "chosen")}
    torch.testing.assert_close(run("cache_attention", step | none), everything, rtol=1e-5, atol=1e-6)
    prompt = dense_step(torch.float32, 16, 0, [65], tokens=65, lengths=[9], heads=(1, 1))
    assert torch.equal(run("cache_attention", prompt), run("cache_attention", prompt | none))


def test_refusals_say_why() -> None:
    step = dense_step(torch.float16, 16, 0, [0], tokens=1, lengths=[40])
    found = registry.select("cache_attention", "cpu", ("triton",), **{**step, "window": 32})
    assert found.provider == registry.REFERENCE and "do not go with a window" in found.reason
    store = Packing(INT4, page=32, lag=SETTLED)
    packed = packed_step(torch.float16, store, store, tokens=1, lengths=[200])
    other = packed | lists(packed, 2, 16, 0, [0])
    found = registry.select("packed_attention", "cpu", ("triton",), **other)
    assert found.provider == registry.REFERENCE
    assert "listed pages have 16 tokens after 0, packed ones 32 after 0" in found.reason
