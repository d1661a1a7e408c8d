"""Programs with the append and pack kernels of GPUs, in Triton's interpreter.

Lowering joins rotary embeddings with the appends after them where a kernel does both, and pages are packed
by a kernel where one knows the codec.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphwright.ir.codecs import PageShape
from graphwright.ir.graph import Graph
from graphwright.kernels import registry
from graphwright.runtime import packed_storage
from graphwright.runtime.lowering import LoweringOptions, kernels, lower
from tests.architectures import tiny_model
from tests.e2e.packed_programs import PAGE, PackedModel, full_model, random_text, windowed_model

pytest.importorskip("triton")
PLACE = "place_cache{cut=kv}"
PACK = f"quantize_cache{{codec=int,bits=4,page={PAGE}}}"


@pytest.fixture
def by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """``rotary_append`` as a GPU would run it, in the interpreter."""

    def select(name: str, device: Any, **arguments: Any) -> registry.Kernel:
        asked = "triton" if name == "rotary_append" else None
        return registry.select(name, device, asked, **arguments)

    monkeypatch.setattr(kernels, "select", select)


def fused(graph: Graph) -> dict[str, int]:
    """How often each op of interest is there after the rewrite."""
    graph = graph.copy()
    kernels.fuse_rotary_appends(graph, torch.device("cpu"))
    graph.fx.lint()
    wanted = ("rotary", "cache_append", "rotary_append", "cache_attention")
    return {name: len(graph.calls(name)) for name in wanted}


@pytest.mark.parametrize("passes", [[PLACE], [PLACE, PACK]], ids=["plain", "packed"])
@pytest.mark.parametrize("make", [full_model, windowed_model])
def test_programs_give_the_same_logits(make: Any, passes: list[str], request: pytest.FixtureRequest) -> None:
    model = PackedModel(make())
    ids = random_text(2, 40)
    expected = model.program(passes)(ids).logits
    request.getfixturevalue("by_triton")
    graph, _ = model.rewrite(passes)
    uses = {use.op: use for use in lower(graph, model.model.device, LoweringOptions(compile=False)).kernels}
    assert (uses["rotary_append"].provider, uses["rotary_append"].sites) == ("triton", 2)
    assert "cache_append" not in uses and "append_attention" not in uses
    assert torch.equal(model.run(graph)(ids).logits, expected)


@pytest.mark.usefixtures("by_triton")
def test_both_kinds_of_store_match() -> None:
    model = PackedModel(full_model())
    for passes in ([PLACE], [PLACE, PACK]):
        assert fused(model.rewrite(passes)[0]) == {
            "rotary": 0, "cache_append": 0, "rotary_append": 2, "cache_attention": 2
        }  # fmt: skip


@pytest.mark.usefixtures("by_triton")
@pytest.mark.parametrize(
    ("make", "place"),
    [
        (full_model, "place_cache{cut=pre_rotary}"),  # keys are stored as they were before
        (lambda: tiny_model("glm4"), PLACE),  # a part of each head is rotated
    ],
    ids=["pre-rotary", "partial"],
)
def test_what_does_not_match_stays(make: Any, place: str) -> None:
    graph, _ = PackedModel(make()).rewrite([place])
    before = graph.counts()
    found = fused(graph)
    assert found["rotary_append"] == 0 and found["rotary"] == before["rotary"] > 0
    assert found["cache_append"] == before["cache_append"] == 4


def test_without_a_kernel_nothing_changes() -> None:
    graph, _ = PackedModel(full_model()).rewrite([PLACE])
    assert fused(graph) == {"rotary": 4, "cache_append": 4, "rotary_append": 0, "cache_attention": 2}


@pytest.mark.parametrize("bits", [2, 4])
def test_pages_packed_by_the_kernel_give_the_same_logits(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of a window's ring among them; the kernel packs them all."""
    model = PackedModel(windowed_model())
    program = model.program([PLACE, f"quantize_cache{{codec=int,bits={bits},page={PAGE}}}"])
    ids = random_text(2, 180)
    expected = program.score(ids)
    real, calls = packed_storage.page_kernel, []

    def page_kernel(codec: str, shape: PageShape, device: str) -> Any:
        kernel = real(codec, shape, "cuda")
        assert kernel is not None
        calls.append(codec)
        return kernel

    monkeypatch.setattr(packed_storage, "page_kernel", page_kernel)
    assert torch.equal(program.score(ids), expected)
    assert calls


def test_who_packs_pages() -> None:
    """The kernel on GPUs, where it knows the codec; the reference elsewhere."""
    shape = PageShape(2, 16, 64)
    known, unknown = "token_scale >> uniform(bits=4)", "balance >> uniform(bits=4)"
    assert packed_storage.page_kernel(known, shape, "cuda") is not None
    assert packed_storage.page_kernel(unknown, shape, "cuda") is None
    assert packed_storage.page_kernel(known, shape, "cpu") is None


@pytest.mark.parametrize(("codec", "sites"), [("int,bits=4", 0), ("gear,bits=2", 4)])
def test_pages_that_the_reference_packs_are_reported(codec: str, sites: int) -> None:
    """On a GPU; on the CPU the reference packs everything, and nothing is lost."""
    graph, _ = PackedModel(full_model()).rewrite([PLACE, f"quantize_cache{{codec={codec},page={PAGE}}}"])
    with registry.assuming_available("triton"):
        uses = lower(graph, torch.device("cuda"), LoweringOptions(compile=False)).kernels
    assert sum(use.sites for use in uses if use.op == "pack pages") == sites
    assert all(use.provider == "reference" and use.reason for use in uses if use.op == "pack pages")
    assert not [use for use in lower(graph, torch.device("cpu"), LoweringOptions(compile=False)).kernels
                if use.op == "pack pages"]  # fmt: skip


def test_selected_pages_by_kernels_give_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt is read whole."""
    model = PackedModel(full_model())
    graph, _ = model.rewrite([PLACE, PACK, f"sparsify_attention{{page={PAGE},keep=0.8,recent=10}}"])
    ids = random_text(1, 70)
    options = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.run(graph)
    names = {"score_pages", "choose_pages", "packed_attention"}

    def select(name: str, device: Any, **arguments: Any) -> registry.Kernel:
        return registry.select(name, device, "triton" if name in names else None, **arguments)

    want = expected.generate(ids, **options)
    monkeypatch.setattr(kernels, "select", select)
    lowered = lower(graph, model.model.device, LoweringOptions(compile=False)).kernels
    assert {use.op for use in lowered if use.provider == "triton"} == names
    assert torch.equal(model.run(graph).generate(ids, **options), want)
