"""The pack kernel in Triton's interpreter: the bytes of the reference, in the right pages, and no others."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.ir.codecs import PageShape, parse_codec

pytest.importorskip("triton")
encode = pytest.importorskip("graphwright.kernels.triton.encode")

# NaN and infinity are among the inputs, and numpy does the interpreter's arithmetic.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SCALINGS = ("token_scale", "token_range", "channel_scale", "channel_range")


@dataclass
class Case:
    """A packed store whose tail holds complete pages, and which of them to pack.

    Attributes:
        store, constants: as ``encode_pages`` takes them; buffers are poisoned.
        rows, starts: pages to pack.
        expected: what the buffers should be afterwards.
    """

    codec: str
    page: int
    store: list[torch.Tensor]
    constants: list[torch.Tensor]
    rows: torch.Tensor
    starts: torch.Tensor
    expected: list[torch.Tensor]
    pages: torch.Tensor

    def run(self) -> list[torch.Tensor]:
        """Pack by the kernel."""
        encode.encode_pages(self.store, self.constants, self.codec, self.page, self.rows, self.starts)
        return self.store[3:]


def case(
    codec: str,
    shape: PageShape,
    *,
    dtype: torch.dtype = torch.float32,
    first: int = 0,
    places: int = 3,
    todo: tuple[tuple[int, int], ...] = ((0, 0), (1, 2), (1, 3), (0, 4)),
    tail: torch.Tensor | None = None,
) -> Case:
    """Pages ``todo`` of (row, number) from a tail whose slots wrap around in the middle of a page."""
    made = parse_codec(codec)
    groups, page, width = shape.groups, shape.tokens, shape.features
    slots = 5 * page + first + 3
    if tail is None:
        tail = (torch.randn(2, groups, slots, width) * (torch.rand(width) * 3 + 0.01)).to(dtype)
        tail[0, 0, 1], tail[1, -1, :, 0] = 0, 0  # a token and a channel of zeros
    constants = made.constants(shape, torch.randn(3, *vars(shape).values()))
    buffers = [
        torch.full((2, places, *size), 77, dtype=torch.uint8).repeat_interleave(kind.itemsize, -1).view(kind)
        for size, kind in made.layout(shape).values()
    ]
    rows = torch.tensor([row for row, _ in todo])
    starts = torch.tensor([first + number * page for _, number in todo])
    pages = torch.stack(
        [tail[b][:, (s + torch.arange(page)) % tail.shape[2]] for b, s in zip(rows, starts, strict=True)]
    )
    expected = [buffer.clone() for buffer in buffers]
    for buffer, new in zip(expected, made.encode(pages, constants).values(), strict=True):
        for i, (row, number) in enumerate(todo):
            buffer[row, number % places] = new[i]
    store = [torch.zeros(2, dtype=torch.int64), tail, torch.zeros(2, groups, first, width), *buffers]
    return Case(codec, page, store, list(constants.values()), rows, starts, expected, pages)


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Equal to the bit; one NaN is as good as another."""
    for mine, reference in zip(found, expected, strict=True):
        assert mine.dtype == reference.dtype
        if reference.dtype.is_floating_point:
            mine, reference = mine.float(), reference.float()
            assert torch.equal(mine.isnan(), reference.isnan())
            mine, reference = (x.nan_to_num(9.0, torch.inf, -torch.inf) for x in (mine, reference))
            assert torch.equal(torch.signbit(mine), torch.signbit(reference))
        assert torch.equal(mine, reference)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("scaling", SCALINGS)
def test_uniform_codes(scaling: str, bits: int) -> None:
    same((c := case(f"{scaling} >> uniform(bits={bits})", PageShape(1, 8, 48))).run(), c.expected)


@pytest.mark.parametrize("bits", range(1, 9))
def test_lloyd_max_codes(bits: int) -> None:
    same((c := case(f"token_norm >> lloyd_max(bits={bits})", PageShape(1, 8, 48))).run(), c.expected)


@pytest.mark.parametrize(
    "codec",
    [
        "float", "float(bits=32)", "fp8", "fp8(format=e5m2)", "token_scale >> fp8(top=1)",
        "channel_range >> fp8(format=e5m2, top=1.5)", "channel_scale >> float",
    ],
)  # fmt: skip
def test_floats(codec: str) -> None:
    shape = PageShape(2, 16, 32)
    tail = torch.randn(2, 2, 83, 32) * 10.0 ** torch.randint(-12, 6, (2, 2, 83, 32))
    tail[:, :, ::7, 3] = torch.tensor([torch.inf, -torch.inf])[:, None, None]
    tail[:, :, ::5, 4] = torch.nan
    same((c := case(codec, shape, tail=tail)).run(), c.expected)


@pytest.mark.parametrize("group", [8, 24, 32, 48])
@pytest.mark.parametrize("scaling", ["token_scale", "token_range"])
def test_groups_of_features(scaling: str, group: int) -> None:
    codec = f"{scaling}(group={group}) >> uniform(bits=4)"
    same((c := case(codec, PageShape(2, 16, 96))).run(), c.expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
def test_head_sizes(width: int, dtype: torch.dtype) -> None:
    """Pages that are no power of two, heads that are not either, sinks, and rings of pages."""
    shape = PageShape(2, 20, width)
    for codec in ("token_range >> uniform(bits=3)", "channel_range >> uniform(bits=2)"):
        same((c := case(codec, shape, dtype=dtype, first=4)).run(), c.expected)


@pytest.mark.parametrize(
    "maps",
    [
        "hadamard", "random_rotation(seed=3)", "random_hadamard", "reorder", "reorder >> hadamard(block=16)",
    ],
)  # fmt: skip
@pytest.mark.parametrize("width", [64, 80, 128])
def test_rotated_pages(maps: str, width: int) -> None:
    """The product is summed in another order: codes at a border may fall to the other side."""
    shape = PageShape(2, 16, width)
    codec = f"{maps} >> token_norm >> lloyd_max(bits=4)"
    c = case(codec, shape)
    norms, codes = c.run()
    other = (codes != c.expected[1]).float().mean()
    assert other < 1e-3
    made = parse_codec(codec)
    tables = dict(zip(made.constant_names(shape), c.constants, strict=True))
    places = (c.starts // c.page) % codes.shape[1]
    mine, reference = (
        made.decode(
            {"0": n, **dict(zip(made.layout(shape), (x[c.rows, places] for x in n), strict=True))},
            tables,
            shape,
        )
        for n in ([norms, codes], c.expected)
    )
    assert (mine - reference).norm() < 0.02 * reference.norm()
    assert (mine - c.pages.float()).norm() < 0.2 * c.pages.norm()


def test_nan_and_infinity_come_out_as_the_reference_has_them() -> None:
    """They spoil what they share a scale with."""
    for codec in (
        "token_scale >> uniform(bits=4)", "token_range >> uniform(bits=2)",
        "channel_scale >> uniform(bits=8)", "channel_range >> uniform(bits=3)",
        "token_norm >> lloyd_max(bits=3)", "token_range(group=16) >> uniform(bits=5)",
    ):  # fmt: skip
        tail = torch.randn(2, 2, 83, 32)
        tail[0, 0, 3, 5], tail[1, 1, 40, 31], tail[1, 0, 50, 0] = torch.nan, torch.inf, -torch.inf
        tail[0, 1, 6] = -torch.nan
        same((c := case(codec, PageShape(2, 16, 32), tail=tail)).run(), c.expected)


def test_sizes_of_numbers() -> None:
    """Scales are rounded up and lows down, from the smallest numbers to the largest."""
    size = 10.0 ** torch.randint(-44, 38, (2, 2, 83, 1))
    tail = torch.randn(2, 2, 83, 32) * size
    for codec in (
        "token_scale >> float(bits=32)",
        "token_range >> float(bits=32)",
        "token_norm >> float(bits=32)",
    ):
        same((c := case(codec, PageShape(2, 16, 32), tail=tail)).run(), c.expected)


@pytest.mark.parametrize("codec", ["token_range >> uniform(bits=4)", "token_norm >> lloyd_max(bits=2)"])
def test_pages_of_several_programs(codec: str) -> None:
    same((c := case(codec, PageShape(2, 75, 32))).run(), c.expected)


def test_pages_that_are_not_there_yet_are_passed_over() -> None:
    """A start below F: nothing is written, so that the number of pages can stay on the device."""
    c = case("token_scale >> uniform(bits=4)", PageShape(2, 16, 32), first=4)
    before = [x.clone() for x in c.store[3:]]
    c.starts[:] = torch.tensor([-1, 0, 3, -100])
    same(c.run(), before)


def test_a_tail_with_strides() -> None:
    whole = torch.randn(83, 2, 2, 96).permute(1, 2, 0, 3)[..., ::3]
    same((c := case("token_scale >> uniform(bits=4)", PageShape(2, 16, 32), tail=whole)).run(), c.expected)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    scaling=st.sampled_from([*SCALINGS, "token_scale(group=8)", "token_range(group=16)"]),
    bits=st.integers(1, 8),
    groups=st.integers(1, 3),
    page=st.integers(1, 40),
    width=st.sampled_from([16, 32, 48, 80]),
    first=st.integers(0, 5),
    places=st.integers(1, 6),
    half=st.booleans(),
)
def test_any_page(
    scaling: str, bits: int, groups: int, page: int, width: int, first: int, places: int, half: bool
) -> None:
    codec = f"{scaling} >> uniform(bits={bits})"
    dtype = torch.float16 if half else torch.float32
    todo = ((0, 0), (1, 3))
    c = case(codec, PageShape(groups, page, width), dtype=dtype, first=first, places=places, todo=todo)
    same(c.run(), c.expected)


def test_what_no_kernel_packs() -> None:
    for codec, shape, reason in (
        ("token_scale >> uniform(bits=4) >> sign_sketch", PageShape(2, 16, 64), "corrector"),
        ("token_scale >> uniform(bits=3)", PageShape(2, 16, 20), "do not fill the bytes"),
        ("channel_scale >> uniform(bits=4)", PageShape(2, 512, 128), "more than a program holds"),
        ("balance >> uniform(bits=4)", PageShape(2, 16, 64), "balance"),
    ):
        assert reason in (encode.encode_obstacle(codec, shape) or "")
    large = ("token_scale >> uniform(bits=4)", PageShape(2, 512, 128))
    assert encode.encode_obstacle(*large) is None
