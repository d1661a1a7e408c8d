"""The pass ``skip_layers``: which layers it leaves out, what it says and refuses, what it composes with."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import graphwright as gw
from graphwright.cost_model import Workload
from graphwright.cost_model.graph_cost import graph_cost
from graphwright.cost_model.prediction import predict
from graphwright.cost_model.stores import cache_bytes, default_stores
from graphwright.ir.blocks import find_blocks
from graphwright.ir.errors import PassError
from graphwright.ir.graph import Graph, layer_number
from graphwright.optimizer.quality.samples import StoreSamples
from graphwright.passes.base import SiteRecord, order_passes, parse_pass
from graphwright.passes.layer_order import measure_angles, with_cache
from graphwright.passes.skip_layers import SkipLayers
from tests.architectures import VOCAB
from tests.rewrite.cached_programs import TARGET, WORKLOAD, program, rewrite

LAYERS = 3
KV = "place_cache{cut=kv}"


@pytest.fixture(scope="module")
def tiny(captured) -> Any:
    """A llama of three layers with text to calibrate on, the second of which adds little."""
    found = captured("llama", layers=LAYERS)
    graph = found.canonical.copy()
    for name, tensor in found.canonical.parameters.items():
        if "layers.1." in name and ("o_proj" in name or "down_proj" in name):
            graph.parameters[name] = tensor * 1e-3
    rows = torch.randint(3, VOCAB, (2, 90), generator=torch.Generator().manual_seed(1)).tolist()
    graph.samples = StoreSamples(lambda g: program(found.model, g), lambda: rows)
    return SimpleNamespace(model=found.model, canonical=graph, rows=rows)


def skipping(records: list[SiteRecord]) -> list[SiteRecord]:
    return [r for r in records if r.pass_string.startswith("skip_layers")]


def logits(found: Any, graph: Graph, ids: torch.Tensor, step: int = 9) -> torch.Tensor:
    """``[B, T, V]`` of a graph with a cache, some tokens at a time."""
    runs = program(found.model, graph)
    state, parts = runs.allocate(*ids.shape), []
    for start in range(0, ids.shape[1], step):
        part = ids[:, start : start + step].contiguous()
        counts = torch.full((ids.shape[0],), part.shape[1])
        parts.append(runs.step(state, part, counts))
        state.commit(counts)
    return torch.cat(parts, dim=1)


# --- which layers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("part", "site"), [("whole", ""), ("attention", ".attention"), ("mlp", ".mlp")])
def test_named_layers(tiny, part: str, site: str) -> None:
    graph, records = rewrite(tiny, f"skip_layers{{part={part},layers=0+2}}", KV)
    own = skipping(records)
    assert [(r.site, r.status, r.fidelity) for r in own] == [
        (f"model.layers.{n}{site}", "applied", "lossy") for n in (0, 2)
    ]
    assert len(graph.calls("cache_attention")) == (3 if part == "mlp" else 1)
    assert len(graph.calls("gated_mlp")) == (3 if part == "attention" else 1)
    stored = {layer_number(n.meta["name"]) for n in graph.placeholders("state")}
    assert stored == ({0, 1, 2} if part == "mlp" else {1})


@pytest.mark.parametrize(("count", "chosen"), [(1, [1]), (2, [0, 1])])
def test_the_middle_needs_no_data(captured, count: int, chosen: list[int]) -> None:
    _, records = rewrite(captured("llama", layers=LAYERS), f"skip_layers{{count={count},order=middle}}")
    assert [r.site for r in records] == [f"model.layers.{n}" for n in chosen]
    assert all("left out: in the middle of the model" in r.reason for r in records)


@pytest.mark.parametrize("part", ["whole", "attention", "mlp"])
def test_angles_find_the_layer_that_does_least(tiny, part: str) -> None:
    _, records = rewrite(tiny, f"skip_layers{{count=1,order=angular,part={part}}}")
    assert len(records) == 1 and records[0].site.startswith("model.layers.1")
    assert "calibration text" in records[0].reason


def test_auto_measures_where_there_is_text(tiny, captured) -> None:
    _, (record,) = rewrite(tiny, "skip_layers{count=1}")
    assert record.site == "model.layers.1" and "0.000 pi on the calibration text" in record.reason
    _, (record,) = rewrite(captured("llama", layers=LAYERS), "skip_layers{count=1}")
    assert "in the middle of the model, as there is no text to calibrate on" in record.reason


def test_angles_are_those_of_the_stock_model(captured) -> None:
    """Of whole layers; of parallel halves, what the stream alone and this one addend make."""
    for name, layers in (("llama", "model.layers"), ("gpt_neox", "gpt_neox.layers")):
        found = captured(name, layers=LAYERS)
        rows = torch.randint(3, VOCAB, (2, 70))
        source = StoreSamples(lambda g, own=found: program(own.model, g), rows.tolist)
        with torch.no_grad():
            states = found.model(rows, output_hidden_states=True, use_cache=False).hidden_states
            second = found.model.get_submodule(layers)[1]
            angles = measure_angles(found.canonical, "whole", source)
            for layer in (0, 1):
                assert angles[layer] == pytest.approx(angle(states[layer], states[layer + 1]), abs=1e-4)
            if name == "gpt_neox":
                added = second.mlp(second.post_attention_layernorm(states[1]))
                measured = measure_angles(found.canonical, "mlp", source)[1]
                assert measured == pytest.approx(angle(states[1], states[1] + added), abs=1e-4)


def angle(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(torch.cosine_similarity(x, y, dim=-1).clamp(-1, 1).acos().mean() / torch.pi)


def test_trim_measures_again_after_each_drop(tiny) -> None:
    """The second drop is the best one beside the first, not the second best by itself."""
    seen: list[tuple[int, ...]] = []

    class Scripted:
        """Losses by the layers that are left."""

        script: Mapping[tuple[int, ...], float] = {
            (1, 2): 2.0, (0, 2): 1.0, (0, 1): 3.0, (2,): 9.0, (0,): 4.0,
        }  # fmt: skip

        def __call__(self, graph: Graph) -> Mapping[str, torch.Tensor]:
            raise AssertionError("no store is asked for")

        def fresh(self, graph: Graph) -> Mapping[str, torch.Tensor]:
            raise AssertionError("no store is asked for")

        def loss(self, graph: Graph) -> float:
            seen.append(tuple(b.layer for b in find_blocks(graph).of("whole")))
            return self.script[seen[-1]]

    graph = tiny.canonical.copy()
    graph.samples = Scripted()
    records = parse_pass("skip_layers{count=2,order=trim}")(graph, WORKLOAD, TARGET, force=True)
    assert [r.site for r in records] == ["model.layers.1", "model.layers.2"]
    assert (
        "drop 1: without it the calibration text takes 1 nats a token, without the worst 3"
        in records[0].reason
    )
    assert "drop 2: without it the calibration text takes 4 nats" in records[1].reason
    assert seen == [(1, 2), (0, 2), (0, 1), (2,), (0,)]


def test_the_loss_of_the_text(tiny, captured) -> None:
    """Of every token but the first, steps of 64 tokens included, against the stock model."""
    graph = with_cache(captured("llama", layers=LAYERS).canonical)
    rows = torch.tensor(tiny.rows)
    with torch.no_grad():
        out = tiny.model(rows[:, :-1]).logits.log_softmax(-1)
    expected = -out.gather(2, rows[:, 1:, None]).mean()
    assert tiny.canonical.samples.loss(graph) == pytest.approx(float(expected), rel=1e-5)


# --- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ("", "neither layers nor count", "layers=10-14"),
        ("layers=1,count=2", "both layers and count", "count=5"),
        ("count=-1", "not a number of layers", "1 or more"),
        ("part=norm,count=1", "no part 'norm'", "whole, attention, mlp"),
        ("order=last,count=1", "no order 'last'", "angular"),
        ("order=trim,layers=1", "order=trim chooses layers", "count="),
        ("layers=5-3", "names no layers", "layers=0-3"),
    ],
)
def test_options_that_make_no_sense(options: str, message: str, hint: str) -> None:
    with pytest.raises(PassError, match=message) as caught:
        parse_pass(f"skip_layers{{{options}}}")
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ("layers=2-4", "no layer 3-4", "the layers of this model are 0-2"),
        ("layers=0-2", "none of the model's 3 layers", "fewer of 0-2"),
        ("part=mlp,layers=0-2", "none of the model's 3 layers", "fewer of 0-2"),
        ("count=3", "the model has 3 layers", "give 1 to 2"),
        ("count=1,order=angular", "needs calibration text", "order=middle"),
        ("count=1,order=trim", "needs calibration text", "layers=10-14"),
    ],
)
def test_layers_that_cannot_go(captured, options: str, message: str, hint: str) -> None:
    with pytest.raises(PassError, match=message) as caught:
        rewrite(captured("llama", layers=LAYERS), f"skip_layers{{{options}}}")
    assert hint in (caught.value.hint or "")


def test_it_prints_and_parses_back() -> None:
    for text in ("skip_layers{part=mlp,layers=3-5}", "skip_layers{count=8,order=trim}"):
        assert str(parse_pass(text)) == text
    assert SkipLayers.variants() == []


# --- what it saves -----------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["whole", "attention", "mlp"])
def test_the_price_is_that_of_the_rewritten_graph(captured, part: str) -> None:
    found, workload = captured("llama", layers=LAYERS), Workload(batch=2, prompt=1000, generate=100)
    chosen = parse_pass(f"skip_layers{{part={part},layers=1}}")
    before, after = found.canonical.copy(), found.canonical.copy()
    (record,) = chosen(after, workload, TARGET, force=True)
    graphs = (before, after)
    seconds = [
        predict(graph_cost(g), TARGET, batch=2, context=workload.mean_context, phase="decode").seconds
        for g in graphs
    ]
    held = [cache_bytes(default_stores(g), 2, 1100) for g in graphs]
    weights = [sum(t.nbytes for t in g.parameters.values()) for g in graphs]
    assert record.predicted is not None and record.predicted["seconds_per_token"] < 0
    assert record.predicted["seconds_per_token"] == pytest.approx(seconds[1] - seconds[0], rel=0.1)
    assert record.predicted["memory_bytes"] == held[1] - held[0] + weights[1] - weights[0]


# --- with other passes -------------------------------------------------------------------------------


OTHERS = (
    "quantize_cache{codec=float(bits=32),page=16,layers=0+2}",
    "sparsify_attention{keep=1.0,layers=0+2}",
    "evict_tokens{tokens=100,window=8,layers=0+2}",
    "share_prefix",
)


@pytest.mark.parametrize("other", OTHERS)
def test_layers_keep_their_numbers_for_other_passes(tiny, other: str) -> None:
    """What others do to a program without layer 1 is what they do to one: here nothing."""
    ids = torch.randint(3, VOCAB, (2, 50))
    skip = "skip_layers{layers=1}"
    plain, _ = rewrite(tiny, skip, KV)
    graph, records = rewrite(tiny, skip, KV, other)
    own = [r for r in records if r.pass_string == other]
    assert [(layer_number(r.site), r.status) for r in own] == [(0, "applied"), (2, "applied")]
    torch.testing.assert_close(logits(tiny, graph, ids), logits(tiny, plain, ids), atol=1e-5, rtol=1e-4)


def test_skipping_before_and_after_the_cache_is_the_same(captured) -> None:
    found, ids = captured("llama", layers=LAYERS), torch.randint(3, VOCAB, (2, 20))
    skip = "skip_layers{part=attention,layers=0-1}"
    graphs = [rewrite(found, *passes)[0] for passes in ((skip, KV), (KV, skip))]
    assert graphs[0].counts() == graphs[1].counts()
    assert {n.meta["name"] for n in graphs[0].placeholders("state")} == {
        n.meta["name"] for n in graphs[1].placeholders("state")
    }
    torch.testing.assert_close(logits(found, graphs[0], ids), logits(found, graphs[1], ids))


def test_it_comes_before_the_cache() -> None:
    given = ["speculate", "quantize_cache", KV, "skip_layers{layers=1}", "slide_attention"]
    names = [p.name for p in order_passes(map(parse_pass, given))]
    assert names.index("skip_layers") < names.index("place_cache") > names.index("slide_attention")


def test_optimize_and_drafts(captured) -> None:
    """Through the public call: fewer layers are stored, and drafts verify what the lossy program says."""
    model = captured("llama", layers=LAYERS).model
    skip, workload = "skip_layers{layers=1}", gw.Workload(prompt=24, generate=8)
    fast = gw.optimize(model, "cpu", workload=workload, passes=[KV, "speculate", skip])
    assert fast.plan.passes[:2] == (skip, KV)
    assert fast.program.allocate(1, 10).nbytes() == 10 * 2 * 2 * 2 * 16 * 4
    assert fast.report.measured["quality"]["mean_kl"] > 0
    ids = torch.randint(3, VOCAB, (1, 24)).repeat(1, 2)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    drafted = fast.generate(ids, **options)
    fast.speculation = None
    assert torch.equal(fast.generate(ids, **options), drafted)
