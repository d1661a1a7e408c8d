"""Inputs for every semantic op: odd shapes and every option, one generator an op.

``CASES[op](dtype)`` yields ``(name, arguments)``; the arguments are by name, as the op's schema has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

Case = tuple[str, dict[str, Any]]
Generator = Callable[[torch.dtype], Iterator[Case]]

CASES: dict[str, Generator] = {}


def generator(op_name: str) -> Callable[[Generator], Generator]:
    """Register the generator of an op."""

    def register(function: Generator) -> Generator:
        CASES[op_name] = function
        return function

    return register


def randn(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers, rounded to ``dtype``."""
    return (torch.randn(shape) * scale).to(dtype)


@generator("rms_norm")
def rms_norm(dtype: torch.dtype) -> Iterator[Case]:
    for shape in ((1, 1, 64), (2, 3, 33), (7, 576)):
        for offset, in_float in ((0.0, False), (1.0, True)):
            x, weight = randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype)
            yield (
                f"{shape}-{offset}",
                dict(x=x, weight=weight, eps=1e-5, offset=offset, weight_in_float=in_float),
            )


@generator("layer_norm")
def layer_norm(dtype: torch.dtype) -> Iterator[Case]:
    for affine in (True, False):
        weight, bias = (randn(33, dtype=dtype), randn(33, dtype=dtype)) if affine else (None, None)
        yield f"affine={affine}", dict(x=randn(2, 3, 33, dtype=dtype), weight=weight, bias=bias, eps=1e-5)


@generator("rotary")
def rotary(dtype: torch.dtype) -> Iterator[Case]:
    for layout in ("half", "interleaved", "interleaved_to_half"):
        for width in (16, 32):
            angle = torch.randn(1, 1, 5, width)
            yield (
                f"{layout}-{width}",
                dict(
                    x=randn(2, 3, 5, 32, dtype=dtype),
                    cos=angle.cos().to(dtype),
                    sin=angle.sin().to(dtype),
                    layout=layout,
                ),
            )


LINEAR_SHAPES = (
    # rows, K, N: one row, odd sizes, less than a tile, tiles with a rest, SmolLM2's, more than a step
    (1, 576, 192),
    (1, 7, 3),
    (3, 64, 70),
    (5, 33, 31),
    (8, 1536, 576),
    (17, 90, 100),
    (33, 66, 32),
    (64, 576, 49),
    (70, 96, 65),
)


@generator("linear")
def linear(dtype: torch.dtype) -> Iterator[Case]:
    for rows, k, n in LINEAR_SHAPES:
        weight = randn(n, k, dtype=dtype, scale=k**-0.5)
        for bias in (None, randn(n, dtype=dtype)):
            yield (
                f"{rows}x{k}x{n}-{bias is not None}",
                dict(x=randn(rows, k, dtype=dtype), weight=weight, bias=bias),
            )
    wide = randn(40, 128, dtype=dtype, scale=0.1)
    yield "row-stride", dict(x=randn(2, 3, 64, dtype=dtype), weight=wide[:, 32:96], bias=None)
    turned = randn(64, 3, 2, dtype=dtype).permute(2, 1, 0)
    yield "strided-input", dict(x=turned, weight=wide[:, :64], bias=None)
    yield "no-rows", dict(x=randn(0, 64, dtype=dtype), weight=wide[:, :64].contiguous(), bias=None)


@generator("linear_group")
def linear_group(dtype: torch.dtype) -> Iterator[Case]:
    for rows, k, sizes in (
        (1, 576, (576, 192, 192)),
        (8, 64, (33, 64)),
        (3, 35, (5, 1, 40)),
        (64, 32, (32, 48)),
    ):
        weights = [randn(n, k, dtype=dtype, scale=k**-0.5) for n in sizes]
        biases = [None if i % 2 else randn(n, dtype=dtype) for i, n in enumerate(sizes)]
        yield f"{rows}x{k}x{sizes}", dict(x=randn(1, rows, k, dtype=dtype), weights=weights, biases=biases)


@generator("gated_mlp")
def gated_mlp(dtype: torch.dtype) -> Iterator[Case]:
    for activation in ("silu", "gelu", "gelu_tanh", "relu"):
        gate, up, down = (randn(*s, dtype=dtype, scale=0.1) for s in ((48, 33), (48, 33), (33, 48)))
        bias = randn(48, dtype=dtype) if activation == "silu" else None
        yield (
            activation,
            dict(
                x=randn(2, 3, 33, dtype=dtype),
                gate=gate,
                up=up,
                down=down,
                gate_bias=bias,
                activation=activation,
            ),
        )


@generator("mlp")
def mlp(dtype: torch.dtype) -> Iterator[Case]:
    up, down = randn(48, 33, dtype=dtype, scale=0.1), randn(33, 48, dtype=dtype, scale=0.1)
    for bias in (None, randn(48, dtype=dtype)):
        yield f"bias={bias is not None}", dict(x=randn(2, 3, 33, dtype=dtype), up=up, down=down, up_bias=bias)


ROUTED_SHAPES = (
    # tokens, choices, experts, K, N: one token, odd sizes, more rows an expert than a block, one expert
    (1, 2, 4, 64, 48),
    (1, 8, 8, 33, 300),
    (3, 4, 8, 7, 3),
    (5, 2, 4, 33, 20),
    (17, 2, 3, 96, 65),
    (65, 2, 2, 40, 31),
    (65, 1, 1, 35, 274),
)


def routed(
    dtype: torch.dtype, shape: tuple[int, int, int, int, int], transposed: bool, biased: bool, shared: bool
) -> dict[str, Any]:
    """Arguments of ``routed_linear``; a ``shared`` x is the same for all choices of a token."""
    tokens, choices, experts, k, n = shape
    weight = randn(experts, *((k, n) if transposed else (n, k)), dtype=dtype, scale=k**-0.5)
    return dict(
        x=randn(tokens, 1 if shared else choices, k, dtype=dtype),
        index=torch.randint(0, experts, (tokens, choices)),
        weight=weight,
        bias=randn(experts, n, dtype=dtype) if biased else None,
        transposed=transposed,
    )


@generator("routed_linear")
def routed_linear(dtype: torch.dtype) -> Iterator[Case]:
    for transposed in (False, True):
        for i, shape in enumerate(ROUTED_SHAPES):
            for shared in (False, True):
                biased = (i + shared) % 2 == 0
                name = f"{shape}-{transposed}-{biased}-{shared}"
                yield name, routed(dtype, shape, transposed, biased, shared)
        # Projections by head: every token goes through all matrices, which are parts of one.
        by_head = torch.arange(6).expand(3, 6)
        whole = randn(6, 40, 48, dtype=dtype, scale=0.2)
        x = randn(3, 6, 64, dtype=dtype)[:, :, 8 : 8 + (24 if transposed else 32)]
        weight = whole[:, 5:29, :33] if transposed else whole[:, 5:38, 16:48]
        bias = randn(6, 40, dtype=dtype)[:, 2:35]
        yield (
            f"heads-{transposed}",
            dict(x=x, index=by_head, weight=weight, bias=bias, transposed=transposed),
        )


@generator("attention")
def attention(dtype: torch.dtype) -> Iterator[Case]:
    for name, options in (("plain", {}), ("window", {"window": 4}), ("softcap", {"softcap": 5.0})):
        q, k, v = (randn(2, h, 9, d, dtype=dtype) for h, d in ((6, 16), (2, 16), (2, 24)))
        yield name, dict(q=q, k=k, v=v, scale=0.25, **options)
    yield "sinks", dict(q=q, k=k, v=v, scale=0.25, sinks=randn(6, dtype=dtype))


@generator("cache_append")
def cache_append(dtype: torch.dtype) -> Iterator[Case]:
    for tokens, slots, lengths, counts in (
        (1, 8, [3, 0], [1, 1]),
        (5, 8, [6, 21], [5, 2]),
        (7, 40, [0, 9], [0, 7]),
    ):
        new = randn(2, tokens, 3, 10, dtype=dtype).transpose(1, 2)
        yield (
            f"{tokens}-{slots}",
            dict(
                store=randn(2, 3, slots, 10, dtype=dtype),
                new=new,
                lengths=torch.tensor(lengths),
                counts=torch.tensor(counts),
            ),
        )


@generator("rotary_append")
def rotary_append(dtype: torch.dtype) -> Iterator[Case]:
    for layout, heads, width, tokens, lengths, counts in (
        ("half", (6, 2), 16, 1, [5, 0], [1, 1]),
        ("half", (3, 3), 80, 5, [6, 21], [5, 2]),
        ("interleaved", (8, 1), 24, 3, [0, 9], [0, 3]),
        ("interleaved_to_half", (4, 2), 32, 7, [30, 4], [7, 6]),
    ):
        for shared in (False, True):  # cos and sin of each pair once, and the same for all rows
            yield (
                f"{layout}-{heads}-{width}-{shared}",
                rotary_step(dtype, layout, heads, width, tokens, lengths, counts, shared),
            )


def rotary_step(
    dtype: torch.dtype,
    layout: str,
    heads: tuple[int, int],
    width: int,
    tokens: int,
    lengths: list[int],
    counts: list[int],
    shared: bool = False,
    slots: int = 8,
) -> dict[str, Any]:
    """Arguments of ``rotary_append``, values 6 features narrower than keys."""
    batch, (h, g) = len(lengths), heads
    angle = torch.randn(1 if shared else batch, 1, tokens, width // 2 if shared else width)
    return dict(
        q=randn(batch, tokens, h, width, dtype=dtype).transpose(1, 2),
        k=randn(batch, tokens, g, width, dtype=dtype).transpose(1, 2),
        v=randn(batch, tokens, g, width - 6, dtype=dtype).transpose(1, 2),
        cos=angle.cos().to(dtype),
        sin=angle.sin().to(dtype),
        keys=randn(batch, g, slots, width, dtype=dtype),
        values=randn(batch, g, slots, width - 6, dtype=dtype),
        lengths=torch.tensor(lengths),
        counts=torch.tensor(counts),
        layout=layout,
    )


def binary_tree(batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bit masks ``[B, T]`` and depths ``[T]`` of a complete binary tree in breadth-first order."""
    masks, depths = [1], [0]
    for t in range(1, tokens):
        parent = (t - 1) // 2
        masks.append(masks[parent] | 1 << t)
        depths.append(depths[parent] + 1)
    return torch.tensor([masks[:tokens]] * batch), torch.tensor(depths[:tokens])


def random_trees(arguments: dict[str, Any], depth_first: float = 0.6) -> dict[str, Any]:
    """The arguments of an attention op with a random tree for each row.

    Args:
        arguments: those of a chain.
        depth_first: how likely a token follows the one before it, and not just any.
    """
    batch, tokens = arguments["positions"].shape
    masks = torch.ones(batch, tokens, dtype=torch.int64)
    depths = torch.zeros_like(masks)
    for row in range(batch):
        for t in range(1, tokens):
            parent = t - 1 if torch.rand(()) < depth_first else int(torch.randint(t, ()))
            masks[row, t] = masks[row, parent] | 1 << t
            depths[row, t] = depths[row, parent] + 1
    return {**arguments, "tree": masks, "positions": arguments["positions"][:, :1] + depths}


def paths(arguments: dict[str, Any]) -> Iterator[tuple[int, int, list[int]]]:
    """Each token of each row's tree: the row, the token, and its ancestors with itself."""
    for row, count in enumerate(arguments["counts"].tolist()):
        for t in range(count):
            mask = int(arguments["tree"][row, t])
            yield row, t, [column for column in range(t + 1) if mask >> column & 1]


OF_ROWS = ("q", "k", "v", "keys", "values", "slots", "positions", "lengths", "counts", "pages", "chosen")


def path_step(arguments: dict[str, Any], row: int, path: list[int]) -> dict[str, Any]:
    """The step of one row whose tokens are a path of its tree, as a chain; caches are copied as they are."""
    own = dict(arguments)
    for name in set(OF_ROWS) & set(own):
        x = own[name]
        own[name] = [y[row : row + 1] for y in x] if isinstance(x, list) else x[row : row + 1].clone()
    for name in {"q", "k", "v"} & set(own):
        own[name] = own[name][:, :, path]
    for name in {"pages", "chosen"} & set(own):
        own[name] = own[name][:, path]
    own["positions"] = own["positions"][:, :1] + torch.arange(len(path))
    own["counts"], own["tree"] = torch.tensor([len(path)]), torch.zeros(1, 0, dtype=torch.int64)
    return own


def move_path(store: torch.Tensor, lengths: torch.Tensor, path: list[int]) -> torch.Tensor:
    """A store ``[1, G, S, D]`` whose step's tokens are the path's."""
    moved, slots = store.clone(), store.shape[2]
    to, come = (int(lengths) + torch.tensor(columns) for columns in (range(len(path)), path))
    moved[:, :, to % slots] = store[:, :, come % slots]
    return moved


def step(
    dtype: torch.dtype,
    *,
    tokens: int,
    lengths: list[int],
    counts: list[int] | None = None,
    heads: tuple[int, int] = (6, 2),
    dims: tuple[int, int] = (64, 64),
    slots: int = 300,
    tree: bool = False,
    sinks: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Arguments of ``append_attention``; slots that hold no token are NaN: nobody may read them."""
    batch, (h, g), (d, e) = len(lengths), heads, dims
    keys, values = torch.full((batch, g, slots, d), torch.nan), torch.full((batch, g, slots, e), torch.nan)
    for row, length in enumerate(lengths):
        held = torch.arange(max(0, length - slots), length) % slots
        keys[row, :, held], values[row, :, held] = torch.randn(g, len(held), d), torch.randn(g, len(held), e)
    at = torch.tensor(lengths)
    depth = torch.arange(tokens)
    masks = torch.zeros(batch, 0, dtype=torch.int64)
    if tree:
        masks, depth = binary_tree(batch, tokens)
    return dict(
        q=randn(batch, tokens, h, d, dtype=dtype).transpose(1, 2),
        k=randn(batch, tokens, g, d, dtype=dtype).transpose(1, 2),
        v=randn(batch, tokens, g, e, dtype=dtype).transpose(1, 2),
        keys=keys.to(dtype),
        values=values.to(dtype),
        positions=at[:, None] + depth,
        lengths=at,
        counts=torch.tensor(counts or [tokens] * batch),
        tree=masks,
        scale=d**-0.5,
        sinks=randn(h, dtype=dtype) if sinks else None,
        **options,
    )


STEPS: dict[str, dict[str, Any]] = {
    "one-token": dict(tokens=1, lengths=[200]),
    "empty-cache": dict(tokens=3, lengths=[0, 5]),
    "chunk-borders": dict(tokens=2, lengths=[126, 127, 255]),
    "smollm2": dict(tokens=8, lengths=[150, 20], counts=[8, 3], heads=(9, 3)),
    "padding-row": dict(tokens=4, lengths=[10, 30], counts=[4, 1]),
    "odd-dims": dict(tokens=5, lengths=[40], dims=(7, 5)),
    "unequal-dims": dict(tokens=5, lengths=[140], dims=(48, 20), heads=(4, 1)),
    "wide": dict(tokens=3, lengths=[20], dims=(96, 136), heads=(2, 2)),
    "tree": dict(tokens=15, lengths=[120, 0], tree=True),
    "tree-63": dict(tokens=63, lengths=[100], tree=True, heads=(2, 1), dims=(16, 16)),
    "tree-sinks-window": dict(tokens=7, lengths=[100], tree=True, sinks=True, window=12),
    "softcap": dict(tokens=4, lengths=[60], softcap=3.0),
    "sinks": dict(tokens=4, lengths=[60, 0], counts=[4, 2], sinks=True),
    "ring": dict(tokens=6, lengths=[100, 37], slots=40, window=30),
    "ring-long": dict(tokens=3, lengths=[1000], slots=200, window=190),
    "window": dict(tokens=9, lengths=[250], window=17),
    "many-heads": dict(tokens=8, lengths=[20], heads=(20, 1), dims=(16, 16)),
    "prefill": dict(tokens=100, lengths=[30, 0], counts=[100, 77], heads=(4, 2)),
    "prefill-ring": dict(tokens=70, lengths=[170], slots=120, window=50, heads=(2, 1)),
}


@generator("append_attention")
def append_attention(dtype: torch.dtype) -> Iterator[Case]:
    for name, options in STEPS.items():
        yield name, step(dtype, **options)


def after_append(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``cache_attention`` for a step whose tokens are in the cache."""
    rest = dict(arguments)
    for store, new in (("keys", "k"), ("values", "v")):
        rest[store] = rest[store].clone()
        torch.ops.graphwright.cache_append(rest[store], rest.pop(new), rest["lengths"], rest["counts"])
    return rest


@generator("cache_attention")
def cache_attention(dtype: torch.dtype) -> Iterator[Case]:
    from tests.numerics.sparse_inputs import listed_cases  # it needs steps from here

    for name, options in STEPS.items():
        yield name, after_append(step(dtype, **options))
    yield from listed_cases(dtype)


@generator("slot_positions")
def slot_positions(dtype: torch.dtype) -> Iterator[Case]:
    yield "ring", dict(lengths=torch.tensor([0, 3, 30]), counts=torch.tensor([0, 2, 5]), slots=8)


@generator("cache_read")
def cache_read(dtype: torch.dtype) -> Iterator[Case]:
    from tests.numerics.packed_inputs import read_cases  # it needs steps from here

    yield from read_cases(dtype)


@generator("packed_attention")
def packed_attention(dtype: torch.dtype) -> Iterator[Case]:
    from tests.numerics.packed_inputs import packed_cases
    from tests.numerics.sparse_inputs import listed_packed_cases

    yield from packed_cases(dtype)
    yield from listed_packed_cases(dtype)


@generator("score_pages")
def score_pages(dtype: torch.dtype) -> Iterator[Case]:
    from tests.numerics.sparse_inputs import score_cases

    yield from score_cases(dtype)


@generator("choose_pages")
def choose_pages(dtype: torch.dtype) -> Iterator[Case]:
    from tests.numerics.sparse_inputs import choose_cases

    yield from choose_cases(dtype)


@generator("prefix_attention")
def prefix_attention(dtype: torch.dtype) -> Iterator[Case]:
    from tests.numerics.prefix_inputs import prefix_cases

    yield from prefix_cases(dtype)


@generator("prefill_attention")
def prefill_attention(dtype: torch.dtype) -> Iterator[Case]:
    from tests.numerics.prefill_inputs import prefill_cases

    yield from prefill_cases(dtype)


@generator("observe_queries")
def observe_queries(dtype: torch.dtype) -> Iterator[Case]:
    from tests.numerics.eviction_inputs import eviction_cases

    yield from eviction_cases(dtype)


@generator("bypass")
def bypass(dtype: torch.dtype) -> Iterator[Case]:
    for label, shape in (("decode", (1, 1, 8)), ("ragged", (3, 5, 16))):
        given = {name: torch.randn(shape).to(dtype) for name in ("entry", "exit")}
        yield label, {**given, "passing": torch.rand(shape[:2]) < 0.5}


@generator("exits")
def exits(dtype: torch.dtype) -> Iterator[Case]:
    for measure in ("top", "margin"):
        yield (
            measure,
            dict(
                stream=randn(3, 5, 16, dtype=dtype),
                logits=randn(3, 5, 9, dtype=dtype, scale=4.0),
                generated=torch.arange(-1, 4).repeat(3, 1),
                counts=torch.tensor([5, 2, 0]),
                threshold=0.5,
                measure=measure,
            ),
        )
