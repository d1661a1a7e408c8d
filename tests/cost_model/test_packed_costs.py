"""What packed stores cost: bytes by where tokens lie, arithmetic by who decodes, launches by the tile."""

from __future__ import annotations

import pytest
import torch

from graphwright.cost_model import B, C, T, Workload, graph_cost, predict, resolve_target
from graphwright.cost_model import streaming as streams
from graphwright.cost_model.codec_work import KernelCounter, codec_work
from graphwright.cost_model.packed_costs import ATTEND_KERNELS, KERNEL_OPS, READ_KERNELS
from graphwright.cost_model.streaming import StoreKernels, find_streaming, kernel_decodes
from graphwright.cost_model.workspace import workspace_bytes
from graphwright.ir.canonicalize import canonicalize
from graphwright.ir.codecs import PageShape, parse_codec
from graphwright.ir.errors import InputError
from graphwright.ir.graph import op_name
from graphwright.ir.packed_ops import TILE, PackedStore, packed_attention, read_tile
from graphwright.kernels.registry import select
from graphwright.passes.place_cache import PlaceCache
from graphwright.passes.quantize_cache import QuantizeCache
from graphwright.runtime.lowering.stream import stream_reads
from tests.architectures import tiny_config

INT4 = "token_scale >> uniform(bits=4)"
ROTATED = "hadamard >> token_norm >> lloyd_max(bits=3)"
CORRECTED = "token_scale >> uniform(bits=2) >> low_rank(rank=2)"
PAGE, GROUPS, WIDTH, HEADS = 64, 2, 16, 4
FULL = GROUPS * WIDTH * 2  # bytes of a token's keys as they are computed


@pytest.fixture(scope="module")
def packed(captured):
    """``packed(codec)``: the graph of a two-layer model in bfloat16 whose cache that codec packs."""
    config = tiny_config("llama", hidden_size=64, num_attention_heads=HEADS, num_key_value_heads=GROUPS)

    def get(codec, cut="kv", **options):
        graph = captured(config).copy()
        canonicalize(graph)
        passes = [PlaceCache(cut=cut)]
        if codec:
            passes.append(QuantizeCache(codec=codec, page=PAGE, **options))
        for chosen in passes:
            records = chosen(graph, Workload(), resolve_target("h100"), force=True)
            assert {r.status for r in records} == {"applied"}
        return graph

    return get


def read(graph, context, **place):
    return graph_cost(graph).total.at(context=context, **place).read["cache"]


def token_bytes(codec):
    shape = PageShape(GROUPS, PAGE, WIDTH)
    return parse_codec(codec).page_bytes(shape) / PAGE


@pytest.mark.parametrize("codec", [INT4, ROTATED, CORRECTED])
def test_pages_and_the_tail_are_read(packed, codec):
    """Four stores: a long context reads its pages, and half a page and the step's token as they are.

    Each token is read once more when its page is packed.
    """
    unpacked = PAGE / 2 + 1
    expected = 4 * (unpacked * FULL + (4097 - unpacked) * token_bytes(codec) + FULL)
    assert read(packed(codec), 4096) == pytest.approx(expected)
    assert read(packed(codec), 4096, batch=3) == pytest.approx(3 * expected)


def test_a_short_context_is_all_in_the_tail(packed):
    packing = 4 * FULL
    assert read(packed(INT4), 8) - packing == read(packed(None), 8) == 4 * 9 * FULL


def test_first_and_recent_tokens_stay_as_they_are(packed):
    more = read(packed(INT4, first=4, recent=16), 4096) - read(packed(INT4), 4096)
    assert more == pytest.approx(4 * 20 * (FULL - token_bytes(INT4)))


def test_decoding_in_the_kernel_is_a_few_operations_a_value(packed):
    plain, small, turned = (graph_cost(packed(codec)).total for codec in (None, INT4, ROTATED))
    values = 4 * B * (C + T) * GROUPS * WIDTH
    packing = graph_cost(packed(INT4)).by_op["cache_append"].flops["float32"]
    rest = small.flops["float32"] - plain.flops["float32"] - packing
    assert (rest - KERNEL_OPS * values).expand() == 0
    # Rotations turn each query and each result, whatever the context: two layers, keys and values.
    again = graph_cost(packed(ROTATED)).by_op["cache_append"].flops["float32"]
    turning = turned.flops["float32"] - plain.flops["float32"] - again - KERNEL_OPS * values
    assert (turning - 4 * B * T * HEADS * 2 * WIDTH**2).expand() == 0


def test_the_kernel_is_one_launch_and_hands_nothing_on(packed):
    cost = graph_cost(packed(INT4)).by_op["packed_attention"]
    assert cost.launches == 2
    # Queries and results only: no keys and values.
    assert (cost.activation_bytes - 2 * B * T * 2 * HEADS * WIDTH * 2).expand() == 0


def test_the_reference_pays_by_the_tile(packed):
    """Each tile of each row and store starts the codec's kernels again."""
    groups = graph_cost(packed(CORRECTED)).by_op
    _, decoding = codec_work(CORRECTED, PageShape(GROUPS, PAGE, WIDTH))
    for context, count in ((10, 1), (TILE - 1, 1), (TILE, 2), (4 * TILE - 1, 4)):
        place = {"batch": 3, "context": context, "tokens": 1}
        assert groups["cache_read"].at(**place).launches == 4 * 3 * count * (READ_KERNELS + decoding.kernels)
        assert groups["cache_attention"].at(**place).launches == 2 * count * ATTEND_KERNELS


@pytest.mark.parametrize("target", ["cpu", "h100"])
def test_only_a_kernel_makes_packing_pay(packed, target):
    """With a long context four bits are faster in a kernel, and slower where the reference decodes them."""
    machine, place = resolve_target(target), {"batch": 1, "context": 65_536, "phase": "decode"}
    plain, small = (predict(graph_cost(packed(codec)), machine, **place) for codec in (None, INT4))
    graph = packed(INT4)
    graph.annotations["decode_kernels"] = False
    reference = predict(graph_cost(graph), machine, **place)
    assert small.bytes_read < plain.bytes_read
    assert small.memory_seconds < plain.memory_seconds
    assert reference.seconds > 2 * plain.seconds
    corrected = predict(graph_cost(packed(CORRECTED)), machine, **place)
    assert corrected.seconds > 2 * plain.seconds


def multi_head(captured, config, codec):
    graph = captured(config).copy()
    canonicalize(graph)
    for chosen in (PlaceCache(cut="minimum"), *([QuantizeCache(codec=codec)] if codec else [])):
        chosen(graph, Workload(), resolve_target("h100"), force=True)
    return graph


def test_recomputation_is_streamed_over_the_whole_context(captured):
    """GPT-2 stores its layers' input: the projections run over C slots, in as many starts as tiles."""
    config = tiny_config("gpt2")
    plain, small = (multi_head(captured, config, codec) for codec in (None, INT4))
    streaming = find_streaming(small)
    again = [n for n in streaming.runs if op_name(n) == "linear"]
    assert again and not streaming.in_kernel
    costs = [graph_cost(graph).by_node for graph in (plain, small)]
    projections = [[c for n, c in cost.items() if c.flops and op_name(n) == "linear"] for cost in costs]
    for one, two in zip(*projections, strict=True):
        assert one.flops == two.flops
    cost = graph_cost(small).by_node[again[0]]
    assert cost.total_flops.has(C)
    place = {"batch": 1, "context": 3 * TILE - 1, "tokens": 1}
    assert cost.at(**place).launches == 3
    # Decompressed, a tile exists at a time: the workspace does not grow with the slots.
    assert workspace_bytes(small, 1, 1, 100_000) < workspace_bytes(plain, 1, 1, 100_000) / 10


def test_lowered_graphs_cost_the_same(packed):
    """``packed_attention`` is what the reads and the attention were."""
    for codec in (INT4, ROTATED, CORRECTED):
        graph = packed(codec)
        before = graph_cost(graph).total.at(batch=2, context=5000)
        stream_reads(graph)
        assert graph.counts()["packed_attention"] == 2
        after = graph_cost(graph).total.at(batch=2, context=5000)
        assert after.read["cache"] == before.read["cache"]
        assert after.total_flops == pytest.approx(before.total_flops)
        assert after.launches == before.launches


# --- families of kernels -------------------------------------------------------------------------


@pytest.fixture
def split(monkeypatch):
    """Kernels that take two launches for an attention, turn queries in another, and pack 4-bit pages."""
    asked = []

    def supports(**given):
        asked.append(given)
        return "low ranks are not for it" if "low_rank" in given["key_codec"] else None

    family = StoreKernels(
        supports,
        lambda codec, shape: "bits=4" in codec,
        attention_launches=2,
        turning_launches=1,
        joins_rotary=True,
    )
    monkeypatch.setitem(streams._FAMILIES, "split", family)
    return asked


def with_kernels(graph, name):
    graph.annotations["decode_kernels"] = name
    return graph


def test_the_family_says_how_many_launches_an_attention_takes(packed, split):
    """In two layers: parts and their combination, and queries turned where keys are."""
    for codec, launches in ((INT4, 2 * 2), (ROTATED, 2 * 3)):
        cost = graph_cost(with_kernels(packed(codec), "split")).by_op["packed_attention"]
        usual = graph_cost(packed(codec)).by_op["packed_attention"]
        assert (cost.launches, usual.launches) == (launches, 2)
        assert (cost.total_flops - usual.total_flops).expand() == 0 and cost.read == usual.read
    dense = [
        graph_cost(g).by_op["cache_attention"].launches
        for g in (packed(None), with_kernels(packed(None), "split"))
    ]
    assert dense == [2, 4]


def test_appends_are_part_of_the_launch_that_rotates(packed, split):
    """What is left of them is packing: in one launch, or in as many as the reference takes."""
    encoding = codec_work(ROTATED, PageShape(GROUPS, PAGE, WIDTH))[0]
    for codec, packing in ((INT4, 1), (ROTATED, encoding.kernels)):
        appends = graph_cost(with_kernels(packed(codec), "split")).by_op["cache_append"]
        usual = graph_cost(packed(codec)).by_op["cache_append"]
        assert appends.at(tokens=1).launches == pytest.approx(4 * packing / PAGE)
        assert appends.at(tokens=2 * PAGE).launches == 4 * packing
        reference = codec_work(codec, PageShape(GROUPS, PAGE, WIDTH))[0].kernels
        assert usual.at(tokens=2 * PAGE).launches == 4 * (1 + reference)
    handed_on = [
        graph_cost(with_kernels(packed(INT4), name)).by_op["cache_append"] for name in ("split", "cpp")
    ]
    small, large = (cost.at(tokens=1).activation_bytes for cost in handed_on)
    assert small == 4 * FULL < large


def test_the_family_is_asked_what_the_op_is_given(packed, split):
    graph = with_kernels(packed(CORRECTED, first=4), "split")
    found = find_streaming(graph)
    assert not found.in_kernel and found.attentions == set(found.obstacles)
    assert set(found.obstacles.values()) == {"low ranks are not for it"}
    given = split[0]
    assert given["q"].shape[1] == HEADS and given["keys"][2].shape[1:] == (GROUPS, 4, WIDTH)
    assert (given["key_codec"], given["value_codec"], given["key_page"], given["value_page"]) == (
        CORRECTED, CORRECTED, PAGE, PAGE,
    )  # fmt: skip
    # Of the one op that lowering makes of it the same is asked, and it costs the same.
    groups = graph_cost(graph).by_op
    before = (groups["cache_read"] + groups["cache_attention"]).at(context=5000)
    stream_reads(graph)
    assert graph_cost(graph).by_op["packed_attention"].at(context=5000).launches == before.launches
    assert {key: type(value) for key, value in split[-1].items()} == {k: type(v) for k, v in given.items()}


def test_a_family_that_is_not_known_is_an_error(packed):
    with pytest.raises(InputError, match="no kernels 'punched cards'"):
        graph_cost(with_kernels(packed(INT4), "punched cards"))
    assert set(find_streaming(with_kernels(packed(INT4), False)).obstacles.values()) == {
        "there are no kernels"
    }


def test_stores_of_one_layer_are_packed_at_their_own_price(packed):
    """Keys and values of equal shape with other codecs are not taken for one another."""
    graph = packed(INT4)
    for tail in (n for n in graph.placeholders("state") if n.meta.get("store", {}).get("role") == "tail"):
        if "values" in tail.meta["name"]:
            tail.meta["store"] = {**tail.meta["store"], "codec": CORRECTED}
    costs = {
        n.args[0].meta["store"]["codec"]: c
        for n, c in graph_cost(graph).by_node.items()
        if op_name(n) == "cache_append"
    }
    assert costs[CORRECTED].total_flops.subs({T: 1, B: 1}) > 2 * costs[INT4].total_flops.subs({T: 1, B: 1})


# --- against what runs ---------------------------------------------------------------------------


def tensors(codec, tokens, width=WIDTH, batch=1):
    """A packed store of whole pages."""
    shape, parsed = PageShape(GROUPS, PAGE, width), parse_codec(codec)
    constants = parsed.constants(shape)
    pages = parsed.encode(torch.randn(batch * tokens // PAGE, GROUPS, PAGE, width), constants)
    store = [
        torch.full((batch,), tokens - PAGE), torch.randn(batch, GROUPS, 2 * PAGE, width),
        torch.zeros(batch, GROUPS, 0, width),
        *(buffer.unflatten(0, (batch, -1)) for buffer in pages.values()),
    ]  # fmt: skip
    return store, list(constants.values())


@pytest.mark.parametrize("codec", [INT4, ROTATED, CORRECTED])
def test_the_reference_starts_as_many_kernels_as_it_is_charged_for(codec):
    size = 3 * TILE
    store, constants = tensors(codec, size)
    lengths, counts = torch.tensor([size - 1]), torch.tensor([1])
    with KernelCounter() as reading:
        read_tile(PackedStore.of(store, constants, codec, PAGE), lengths, counts, size, 0, TILE)
    decoding = codec_work(codec, PageShape(GROUPS, PAGE, WIDTH))[1]
    assert reading.kernels == pytest.approx(READ_KERNELS + decoding.kernels, rel=0.1)
    q, slots = torch.randn(1, HEADS, 1, WIDTH), torch.zeros(1, 1, size, 0)
    with KernelCounter() as whole:
        packed_attention(
            q, store, constants, store, constants, slots, lengths[:, None], lengths, counts,
            torch.zeros(1, 0, dtype=torch.int64), codec, PAGE, codec, PAGE, 0.25,
        )  # fmt: skip
    charged = 3 * (2 * (READ_KERNELS + decoding.kernels) + ATTEND_KERNELS)
    assert whole.kernels == pytest.approx(charged, rel=0.2)


def test_matrix_products_of_a_codec_are_counted():
    """A rotation as a matrix takes 2 D operations a value; a rank takes 2 for each of its directions."""
    shape = PageShape(2, 64, 64)

    def more(longer, shorter):
        return codec_work(longer, shape)[1].flops - codec_work(shorter, shape)[1].flops

    plain = "token_scale >> uniform(bits=4)"
    assert more(f"hadamard >> {plain}", plain) == pytest.approx(2 * 64, abs=1)
    per_rank = more(f"{plain} >> low_rank(rank=5)", f"{plain} >> low_rank(rank=2)") / 3
    assert per_rank == pytest.approx(2, abs=0.1)


CODECS = (
    INT4, ROTATED, CORRECTED, "uniform(bits=4)", "float(bits=16)", "channel_range >> uniform(bits=8)",
    "token_scale(group=8) >> uniform(bits=2)",
    "random_rotation >> hadamard >> token_norm >> lloyd_max(bits=4)", "hadamard >> float(bits=16)",
    "token_scale >> hadamard >> uniform(bits=4)", "reorder >> token_range >> uniform(bits=1)",
)  # fmt: skip


@pytest.mark.parametrize("codec", CODECS)
def test_the_kernels_serve_what_is_priced_as_a_kernel(codec):
    """What the cost model takes for granted is what the registry answers."""
    store, constants = tensors(codec, 2 * PAGE, width=64)
    numbers = torch.zeros(1, dtype=torch.int64)
    found = select(
        "packed_attention", "cpu", q=torch.randn(1, HEADS, 1, 64), keys=store, key_constants=constants,
        values=store, value_constants=constants, slots=torch.zeros(1, 1, 2 * PAGE, 0),
        positions=numbers[:, None], lengths=numbers, counts=numbers,
        tree=torch.zeros(1, 0, dtype=torch.int64), key_codec=codec, key_page=PAGE, value_codec=codec,
        value_page=PAGE, scale=0.25,
    )  # fmt: skip
    assert (found.provider != "reference") == kernel_decodes(codec)
