"""The kernel over packed pages against the op's reference body, and its bits."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from graphwright.ir.ops import SEMANTIC_OPS
from graphwright.kernels import registry
from tests.numerics import inputs
from tests.numerics.packed_inputs import Packing, packed_step

REFERENCE = SEMANTIC_OPS["packed_attention"].overload
# float32: sums in another order; a map done to the query and not undone on the keys. bfloat16: decoded keys,
# mapped queries and the result are each rounded once more (2^-9) than in the float32 oracle.
TOLERANCE = {torch.float32: (3e-5, 1e-5), torch.bfloat16: (2e-2, 2**-7)}
DTYPES = tuple(TOLERANCE)
SCALINGS = ("token_scale", "token_range", "channel_scale", "channel_range")
CODECS = (
    *(f"{scaling} >> uniform(bits={bits})" for scaling in SCALINGS for bits in (2, 3, 4, 8)),
    *(f"token_norm >> lloyd_max(bits={bits})" for bits in (2, 3, 4)),
    *(f"token_scale >> uniform(bits={bits})" for bits in (1, 5, 6, 7)),
    "token_scale(group=32) >> uniform(bits=4)",
    "token_range(group=32) >> uniform(bits=8)",
    "hadamard >> token_norm >> lloyd_max(bits=3)",
    "hadamard(block=16) >> token_range >> uniform(bits=2)",
    "random_rotation(seed=3) >> token_norm >> lloyd_max(bits=4)",
    "random_hadamard >> token_scale >> uniform(bits=4)",
    "reorder >> token_scale(group=32) >> uniform(bits=4)",
    "reorder >> random_rotation >> channel_range >> uniform(bits=8)",
    "float(bits=16)",
    "hadamard >> float(bits=16)",
)
PLAIN, TURNED = "token_scale >> uniform(bits=4)", "random_rotation >> token_norm >> lloyd_max(bits=3)"


def cpp(**arguments: Any) -> torch.Tensor:
    """The C++ kernel's result; fails where another would run."""
    kernel = registry.select("packed_attention", "cpu", **arguments)
    assert kernel.provider == "cpp", kernel.reason
    return kernel.op(**arguments)


def wide(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same step with a float32 query and float32 tails, so that the reference rounds nothing."""
    own = copy.deepcopy(arguments)
    own["q"] = own["q"].float()
    for store in ("keys", "values"):
        own[store][1:3] = [x.float() for x in own[store][1:3]]
    return own


def check(arguments: dict[str, Any]) -> None:
    """The kernel gives what the reference gives, and writes to nothing."""
    before, dtype = copy.deepcopy(arguments), arguments["q"].dtype
    mine = cpp(**arguments)
    absolute, relative = TOLERANCE[dtype]
    assert mine.dtype == dtype and mine.is_contiguous() and not mine.isnan().any()
    torch.testing.assert_close(mine.float(), REFERENCE(**wide(arguments)), atol=absolute, rtol=relative)
    for a, b in zip(tree_leaves(before), tree_leaves(arguments), strict=True):
        assert not isinstance(a, torch.Tensor) or torch.equal(a.nan_to_num(7), b.nan_to_num(7))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", CODECS)
def test_every_codec(codec: str, dtype: torch.dtype) -> None:
    for width, first in ((64, 4), (96, 0), (128, 0)):
        store = Packing(codec, page=32, first=first, lag=5)
        check(packed_step(dtype, store, store, tokens=3, lengths=[203, 70], dims=(width, width)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [
    dict(tokens=1, lengths=[260], heads=(9, 3)),
    dict(tokens=3, lengths=[0, 5, 31, 36]),
    dict(tokens=8, lengths=[150, 20], counts=[8, 3], heads=(8, 1)),
    dict(tokens=4, lengths=[100, 130], counts=[4, 0], sinks=True),
    dict(tokens=7, lengths=[125, 0], tree=True),
    dict(tokens=3, lengths=[0, 140], counts=[0, 3], tree=True),
    dict(tokens=63, lengths=[140], tree=True, heads=(2, 1)),
    dict(tokens=5, lengths=[140], dims=(80, 80), heads=(2, 2)),
    dict(tokens=5, lengths=[140], dims=(80, 48), heads=(4, 1)),
    dict(tokens=5, lengths=[140], dims=(7, 5), heads=(4, 1)),
    dict(tokens=2, lengths=[90], dims=(256, 192), heads=(2, 1)),
    dict(tokens=4, lengths=[160], softcap=3.0),
    dict(tokens=6, lengths=[500, 37], slots=106, window=100),
    dict(tokens=7, lengths=[400], slots=67, window=60, tree=True, sinks=True),
    dict(tokens=9, lengths=[350], window=17),
    dict(tokens=3, lengths=[300], slots=100),
    dict(tokens=64, lengths=[130, 0], counts=[64, 41], heads=(3, 1)),
    dict(tokens=150, lengths=[170], heads=(6, 1)),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("stores", [
    (Packing(PLAIN, 32, 4), Packing(PLAIN, 32, 4)),
    (Packing("random_rotation >> channel_range >> uniform(bits=3)", 24), Packing(TURNED, 40, 9, 30)),
], ids=("plain", "turned"))  # fmt: skip
def test_every_kind_of_step(
    stores: tuple[Packing, Packing], options: dict[str, Any], dtype: torch.dtype
) -> None:
    check(packed_step(dtype, *stores, **options))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_shapes(data: st.DataObject) -> None:
    draw = data.draw
    tokens, groups = draw(st.sampled_from([1, 2, 3, 8, 17])), draw(st.integers(1, 3))
    window = draw(st.sampled_from([0, 0, 5, 90]))
    lengths = draw(st.lists(st.integers(0, 400), min_size=1, max_size=3))
    simple = [codec for codec in CODECS if "group" not in codec and "block" not in codec]
    sides = [
        Packing(
            draw(st.sampled_from(simple)),
            page=draw(st.sampled_from([1, 8, 30, 64, 128, 200])),
            first=draw(st.sampled_from([0, 1, 4, 130])),
            lag=draw(st.integers(0, 70)),
        )
        for _ in range(2)
    ]
    check(
        packed_step(
            draw(st.sampled_from(DTYPES)),
            *sides,
            tokens=tokens,
            lengths=lengths,
            counts=[draw(st.integers(0, tokens)) for _ in lengths],
            heads=(groups * draw(st.sampled_from([1, 3, 8])), groups),
            dims=(draw(st.sampled_from([64, 80, 128])), draw(st.sampled_from([16, 64, 72]))),
            slots=window + tokens if window else 4000,
            tree=draw(st.booleans()),
            sinks=draw(st.booleans()),
            window=window,
        )
    )


@pytest.fixture
def threads() -> Iterator[None]:
    """Leaves the number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


SIDES = {
    "plain": (Packing(PLAIN, 32, 4), Packing("token_range >> uniform(bits=8)", 32, 4)),
    "turned": (
        Packing(TURNED, 64),
        Packing("reorder >> random_hadamard >> channel_range >> uniform(bits=3)", 32),
    ),
}


def one_token(arguments: dict[str, Any], t: int) -> dict[str, Any]:
    """The step that decodes token t of a chain; the tokens after it are not in the cache."""
    own = copy.deepcopy(arguments)
    own["q"], own["positions"] = own["q"][:, :, t : t + 1], own["positions"][:, t : t + 1]
    own["lengths"], own["counts"] = own["lengths"] + t, torch.ones_like(own["counts"])
    return own


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("options", [
    dict(tokens=8, lengths=[290, 33], heads=(9, 3)),
    dict(tokens=8, lengths=[700], slots=108, window=100),
    dict(tokens=150, lengths=[250], heads=(4, 2), softcap=9.0, sinks=True),
], ids=str)  # fmt: skip
def test_token_alone_and_in_a_step(sides: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    arguments = packed_step(dtype, *SIDES[sides], **options)
    together = cpp(**arguments)
    for t in {0, 3, 7, options["tokens"] - 1}:
        assert torch.equal(cpp(**one_token(arguments, t))[:, 0], together[:, t]), t


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("options", [
    dict(tokens=16, lengths=[120, 0, 256], counts=[16, 3, 9], heads=(9, 3)),
    dict(tokens=40, lengths=[250, 102], heads=(3, 1), sinks=True),
    dict(tokens=12, lengths=[700], slots=112, window=100),
], ids=str)  # fmt: skip
def test_path_of_a_tree_and_a_chain(sides: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    arguments = inputs.random_trees(packed_step(dtype, *SIDES[sides], **options))
    together = cpp(**arguments)
    for row, t, path in inputs.paths(arguments):
        own = inputs.path_step(arguments, row, path)
        for store in ("keys", "values"):
            own[store][1] = inputs.move_path(own[store][1], own["lengths"], path)
        assert torch.equal(cpp(**own)[0, -1], together[row, t]), (row, t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sides", SIDES)
def test_sequence_alone_and_in_a_batch(sides: str, dtype: torch.dtype) -> None:
    arguments = packed_step(
        dtype, *SIDES[sides], tokens=4, lengths=[200, 0, 129, 60, 250, 7], counts=[4, 1, 2, 3, 4, 4]
    )
    together = cpp(**arguments)
    for row in range(6):
        alone = dict(arguments)
        for name in ("q", "slots", "positions", "lengths", "counts", "tree"):
            alone[name] = arguments[name][row : row + 1]
        for name in ("keys", "values"):
            alone[name] = [x[row : row + 1] for x in arguments[name]]
        assert torch.equal(cpp(**alone)[0], together[row]), row


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sides", SIDES)
def test_bits_do_not_depend_on_threads(sides: str, dtype: torch.dtype, threads: None) -> None:
    for options in (dict(tokens=1, lengths=[900]), dict(tokens=3, lengths=[290, 17, 5, 100, 200])):
        arguments = packed_step(dtype, *SIDES[sides], heads=(9, 3), **options)
        seen = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            seen.append(cpp(**arguments))
        assert all(torch.equal(seen[0], other) for other in seen[1:])


def test_bfloat16_pages_give_the_bits_of_a_plain_cache() -> None:
    """Chunks that are whole in pages or in the tail are cut as the kernel of a plain cache cuts them."""
    packing = Packing("float(bits=16)", page=128)
    arguments = packed_step(torch.bfloat16, packing, packing, tokens=4, lengths=[384, 130])
    plain = {name: arguments[name] for name in ("q", "positions", "lengths", "counts", "tree", "scale")}
    for name in ("keys", "values"):
        plain[name] = torch.ops.graphwright.cache_read(
            arguments[name], [], torch.empty(2, 1, 388, 0), arguments["lengths"], arguments["counts"],
            packing.codec, packing.page,
        )  # fmt: skip
    kernel = registry.select("cache_attention", "cpu", **plain)
    assert kernel.provider == "cpp"
    assert torch.equal(kernel.op(**plain), cpp(**arguments))


def test_a_token_that_is_nan_shows_and_hides_with_its_visibility() -> None:
    """A NaN among what a query sees reaches it; the same token beyond the window's pages does not."""
    packing = Packing(PLAIN, page=128)
    arguments = packed_step(torch.bfloat16, packing, packing, tokens=1, lengths=[600])
    arguments["values"][3][0, 0, :, 5] = torch.nan
    assert cpp(**arguments).isnan().all()
    assert not cpp(**{**arguments, "window": 300}).isnan().any()


@pytest.mark.parametrize(("codec", "reason"), [
    ("token_scale(group=16) >> uniform(bits=4)", "groups of 16 features"),
    ("uniform(bits=4)", "no scaling"),
    ("token_norm >> lloyd_max(bits=5)", "does not decode lloyd_max"),
    ("token_scale >> fp8", "does not decode fp8"),
    ("float(bits=32)", "does not decode float"),
    ("channel_scale >> token_scale >> uniform(bits=4)", "channel_scale is not one of the orthogonal maps"),
    ("token_scale >> hadamard >> uniform(bits=4)", "no scaling"),
    (" >> ".join(["hadamard"] * 5 + ["token_scale", "uniform(bits=4)"]), "at most 4 maps"),
    ("nonsense", "does not parse"),
])  # fmt: skip
def test_other_codecs_are_refused_with_a_reason(codec: str, reason: str) -> None:
    packing = Packing(PLAIN)
    arguments = packed_step(torch.float32, packing, packing, tokens=1, lengths=[40])
    for side in ("key_codec", "value_codec"):
        kernel = registry.select("packed_attention", "cpu", **{**arguments, side: codec})
        assert kernel.provider == registry.REFERENCE and reason in kernel.reason


def test_other_tensors_are_refused_with_a_reason() -> None:
    packing = Packing(PLAIN)
    arguments = packed_step(torch.float32, packing, packing, tokens=1, lengths=[40])
    packed, tail, first, scale, codes = arguments["keys"]
    for changed, reason in (
        (dict(q=arguments["q"].half()), "float16"),
        (dict(q=arguments["q"].bfloat16()), "the newest tokens"),
        (dict(keys=[packed, tail, first, scale, torch.stack([codes, codes], -1)[..., 0]]), "has a stride"),
    ):
        kernel = registry.select("packed_attention", "cpu", **{**arguments, **changed})
        assert kernel.provider == registry.REFERENCE and reason in kernel.reason


def test_bad_arguments_raise_and_do_not_crash() -> None:
    packing = Packing(PLAIN, page=32)
    arguments = packed_step(torch.float32, packing, packing, tokens=2, lengths=[70])
    op = registry.select("packed_attention", "cpu", **arguments).op
    packed, tail, first, scale, codes = arguments["keys"]
    for changed, said in (
        (dict(keys=[packed + 1, tail, first, scale, codes]), "has packed 65"),
        (dict(keys=[packed + 32, tail, first, scale, codes]), "has packed 96"),
        (dict(keys=[packed * 0, tail, first, scale, codes]), "a tail of"),
        (dict(keys=[packed, tail, first, scale[:, :, :1], codes]), "scales of pages"),
        (dict(keys=[packed, tail, first, codes]), "scales is Byte"),
        (dict(keys=[packed, tail, first, scale, codes, codes]), "are 6, not 5"),
        (dict(keys=[packed, tail.bfloat16(), first, scale, codes]), "tail is BFloat16"),
        (dict(key_codec="token_scale >> uniform(bits=2)"), "codes of pages"),
        (dict(key_codec="hadamard >> " + PLAIN), "constants are only 0"),
        (dict(key_codec="token_scale >> fp8"), "no kernel for the codec"),
        (dict(key_page=16), "of pages are"),
        (dict(lengths=torch.tensor([70, 71])), "lengths"),
        (dict(q=arguments["q"][:, :5]), "do not fit"),
    ):
        with pytest.raises(RuntimeError, match=said):
            op(**{**arguments, **changed})
