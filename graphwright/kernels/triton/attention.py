"""Attention over caches on GPUs: the Python side of the template in ``attend.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from graphwright.ir.codecs import PageShape
from graphwright.ir.packed_ops import page_shape
from graphwright.kernels.registry import implements
from graphwright.kernels.triton.append import cache_append
from graphwright.kernels.triton.attend import attend
from graphwright.kernels.triton.combine import combine, turn
from graphwright.kernels.triton.configs import AttendConfig, AttendShape, attend_config, device_facts
from graphwright.kernels.triton.launch import Launch
from graphwright.kernels.triton.tiles import TileCodec, obstacle, tile_codec

PROVIDER = "triton"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_WIDTH = 256
#: 8-bit floats are read as bytes.
_BYTES = (torch.float8_e4m3fn, torch.float8_e5m2)
#: Query tokens that a tree mask has bits for.
MAX_TREE_TOKENS = 63
# Rows, and sides of the pieces of a matrix, that a program turns at once: float32 has no tensor cores.
_ROWS, _SQUARE = 16, 32
# Probabilities beside codes are float16: times 2**10, small ones keep their digits.
_LIFT = 10.0


@dataclass(frozen=True)
class Side:
    """Keys or values of a packed store, as the template takes them.

    Attributes:
        tile: the codec's tiles; None without pages.
        buffers, constants: of the codec, in its order, with their names.
        width: D or E.
        parts: runs of the features that a tile is made of.
    """

    width: int
    tile: TileCodec | None = None
    names: tuple[str, ...] = ()
    buffers: tuple[torch.Tensor, ...] = ()
    constant_names: tuple[str, ...] = ()
    constants: tuple[torch.Tensor, ...] = ()
    shape: PageShape | None = None

    @classmethod
    def of(
        cls, store: Sequence[torch.Tensor], constants: Sequence[torch.Tensor], codec: str, page: int
    ) -> Side:
        """From an op's arguments."""
        _, tail, _, *buffers = store
        buffers = [b.view(torch.uint8) if b.dtype in _BYTES else b for b in buffers]
        shape = page_shape(tail, page)
        tile = tile_codec(codec, shape)
        names = tuple(tile.codec.layout(shape))
        table_names = tile.codec.constant_names(shape)
        return cls(shape.features, tile, names, tuple(buffers), table_names, tuple(constants), shape)

    @property
    def parts(self) -> int:
        """Runs of the features; those of codes, else powers of two that need no padding."""
        if self.tile is not None and not self.tile.level.is_float:
            return self.tile.level.parts
        run = self.width & -self.width
        return self.width // run if run >= 16 and self.tile is None else 1

    @property
    def tile_width(self) -> int:
        """Features of a part, padded to what a matrix instruction takes."""
        return max(16, 1 << (self.width // self.parts - 1).bit_length())

    @property
    def token_bytes(self) -> float:
        """Stored bytes of a token of one head."""
        if self.tile is None or self.shape is None:
            return 0.0
        return self.tile.codec.page_bytes(self.shape) / (self.shape.groups * self.shape.tokens)

    def matrix(self) -> torch.Tensor | None:
        """The orthogonal maps before the scaling as one float32 matrix ``[1 or G, D, D]``; None for none."""
        if self.tile is None or not self.tile.maps:
            return None
        return _matrix(self)

    def arguments(self, prefix: str) -> dict[str, Any]:
        """The tuples of pointers."""
        scales, codes = self._own(self.names, self.buffers)
        scale_constants, constants = self._own(self.constant_names, self.constants)
        return {
            f"{prefix}_codes": codes,
            f"{prefix}_constants": constants,
            f"{prefix}_scales": scales,
            f"{prefix}_scale_constants": scale_constants,
        }

    def _own(self, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> tuple[Any, Any]:
        """Those of the scaling and those of the quantizer; None where there are none."""
        if self.tile is None:
            return None, None
        quantizer = self.tile.maps + (self.tile.scale is not None)
        scales = self.tile.own(names, tensors, self.tile.maps) if self.tile.scale is not None else ()
        return scales or None, self.tile.own(names, tensors, quantizer) or None

    def constants_of(self, letter: str) -> dict[str, Any]:
        """The template's constants for this side, ``letter`` K or V."""
        scale = None if self.tile is None else self.tile.scale
        level = None if self.tile is None else self.tile.level
        own = {
            "LEVEL": level and level.decode,
            "OPTION": level.option if level else 0,
            "PARTS": self.parts,
            "UNIT": level.unit if level else 1.0,
            "SHIFT": level.shift if level else 0.0,
            "SCALE": scale and scale.decode,
            "AXIS": scale.axis if scale else "none",
            "SCALE_OPTION": scale.option if scale else 0,
            "FLOAT": bool(level and level.is_float and scale is None),
        }
        return {f"{letter}_{name}": value for name, value in own.items()}


_MATRICES: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _matrix(side: Side) -> torch.Tensor:
    """Kept beside the first map's table, for every chain of maps that starts with it."""
    assert side.tile is not None and side.shape is not None
    first = side.constants[0]
    chains = _MATRICES.setdefault(first, {})
    key = (str(side.tile.codec), side.shape)
    if key not in chains:
        chains[key] = _product(side)
    found: torch.Tensor = chains[key]
    return found


def _product(side: Side) -> torch.Tensor:
    assert side.tile is not None and side.shape is not None
    width, groups = side.width, side.shape.groups
    device = side.constants[0].device
    rows = torch.eye(width, device=device).expand(1, groups, width, width)
    for index, part in enumerate(side.tile.codec.transforms[: side.tile.maps]):
        own = side.tile.own(side.constant_names, side.constants, index)
        names = [n.split(".", 1)[1] for n in side.constant_names if n.split(".")[0] == str(index)]
        rows, _ = part.forward(rows, dict(zip(names, own, strict=True)))
    by_head = any(p.name == "reorder" for p in side.tile.codec.transforms[: side.tile.maps])
    return (rows[0] if by_head else rows[0, :1]).contiguous()


@dataclass(frozen=True)
class Pages:
    """What of a cache lies in pages.

    Attributes:
        keys, values: their sides.
        packed: ``[B]`` int64 tokens that are in pages or first.
        first: ``[B, G, F, D]`` and ``[B, G, F, E]``.
        page: P.
        listed: places to read ``[B, G, L]`` int32 and how many ``[B, G]`` int32; None reads all.
        by_head: pages are ``[B, G, N, P, ..]``.
    """

    keys: Side
    values: Side
    packed: torch.Tensor
    first: tuple[torch.Tensor, torch.Tensor]
    page: int
    listed: tuple[torch.Tensor, torch.Tensor] | None = None
    by_head: bool = False

    @property
    def places(self) -> int:
        """Pages of a row."""
        return int(self.keys.buffers[0].shape[2 if self.by_head else 1])


@dataclass(frozen=True)
class Step:
    """The step's part of an attention; see ``cache_attention``."""

    positions: torch.Tensor
    lengths: torch.Tensor
    counts: torch.Tensor
    tree: torch.Tensor
    scale: float
    window: int = 0
    softcap: float = 0.0
    sinks: torch.Tensor | None = None


@dataclass
class Attention:
    """One attention: the template's launches for given tensors.

    Args:
        q: ``[B, H, T, D]``, last dimension contiguous.
        keys, values: dense rings ``[B, G, S, D]``, ``[B, G, S, E]``, contiguous.
        step: who sees what.
        pages: what is packed; None for a cache of slots alone.
        with_lse: also give the log-sum-exp of the scores, ``[B, H, T]`` float32.
    """

    q: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    step: Step
    pages: Pages | None = None
    with_lse: bool = False
    config: AttendConfig | None = None
    result: torch.Tensor = field(init=False)
    lse: torch.Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        batch, heads, tokens, _ = self.q.shape
        self.result = self.q.new_empty((batch, tokens, heads, self.values.shape[3]))
        if self.with_lse:
            self.lse = self.q.new_empty((batch, heads, tokens), dtype=torch.float32)

    def run(self) -> torch.Tensor:
        """All launches in order; ``[B, T, H, E]``."""
        if self.q.shape[2] == 0 or self.q.shape[0] == 0:
            return self.result
        turned = self._turned()
        config = self.config or attend_config(self._shape())
        page_splits = 0 if self.pages is None else self._page_splits(config)
        chunk = config.chunk if self.pages is None else max(config.block_n, self.keys.shape[2])
        splits = page_splits + max(1, -(-self.keys.shape[2] // chunk))
        batch, heads, tokens, _ = self.q.shape
        part = self.q.new_empty((batch, heads, tokens, splits, self.values.shape[3]), dtype=torch.float32)
        lse = self.q.new_empty((batch, heads, tokens, splits), dtype=torch.float32)
        self._attend(config, turned, part, lse, page_splits, chunk)
        self._combine(part, lse, page_splits)
        return self.result

    # --- launches --------------------------------------------------------------------------------

    def _turned(self) -> torch.Tensor:
        """The queries as pages are read with."""
        matrix = None if self.pages is None else self.pages.keys.matrix()
        if matrix is None:
            return self.q
        batch, heads, tokens, width = self.q.shape
        out = torch.empty(tuple(self.q.shape), dtype=torch.float32, device=self.q.device)
        Launch(
            turn,
            (-(-batch * tokens // _ROWS), heads, -(-width // _SQUARE)),
            dict(
                x=self.q,
                matrix=matrix,
                out=out,
                **_strides(self.q, ""),
                heads=heads,
                tokens=tokens,
                rows=batch * tokens,
            ),
            dict(
                GROUP=heads // self.keys.shape[1],
                WIDTH=width,
                TILE=_SQUARE,
                ROWS=_ROWS,
                COLUMNS=_SQUARE,
                BY_HEAD=matrix.shape[0] > 1,
            ),
            label=f"turn d{width}",
        ).run()
        return out

    def _page_splits(self, config: AttendConfig) -> int:
        assert self.pages is not None
        return -(-self._listed_pages() * self.pages.page // config.chunk)

    def _attend(
        self,
        config: AttendConfig,
        turned: torch.Tensor,
        part: torch.Tensor,
        lse: torch.Tensor,
        page_splits: int,
        chunk_slots: int,
    ) -> None:
        q, step, pages = self.q, self.step, self.pages
        batch, heads, tokens, width = q.shape
        groups = self.keys.shape[1]
        keys = Side(width) if pages is None else pages.keys
        values = Side(self.values.shape[3]) if pages is None else pages.values
        half = q.dtype != torch.float32
        v_float = values.constants_of("V")["V_FLOAT"]
        row_tiles = -(-heads // groups * tokens // config.block_m)
        listed = None if pages is None else pages.listed
        Launch(
            attend,
            (part.shape[3], row_tiles * groups, batch),
            dict(
                q=q,
                turned=turned,
                keys=self.keys,
                values=self.values,
                first_keys=None if pages is None else pages.first[0],
                first_values=None if pages is None else pages.first[1],
                **keys.arguments("key"),
                **values.arguments("value"),
                packed=None if pages is None else pages.packed,
                pages=listed and listed[0],
                page_counts=listed and listed[1],
                positions=step.positions,
                lengths=step.lengths,
                counts=step.counts,
                tree=step.tree,
                out=part,
                lse=lse,
                **_strides(q, ""),
                **_strides(turned, "turned_"),
                scale=step.scale,
                softcap=step.softcap,
                tokens=tokens,
                slots=self.keys.shape[2],
                places=1 if pages is None else pages.places,
                page_splits=page_splits,
                chunk_pages=1 if pages is None else config.chunk // pages.page,
                chunk_slots=chunk_slots,
                listed=0 if listed is None else listed[0].shape[2],
            ),
            dict(
                GROUPS=groups,
                GROUP=heads // groups,
                KEY_WIDTH=width,
                VALUE_WIDTH=values.width,
                KEY_TILE=keys.tile_width,
                VALUE_TILE=values.tile_width,
                BLOCK_M=config.block_m,
                BLOCK_N=config.block_n,
                SOFTCAP=step.softcap != 0.0,
                WINDOW=step.window,
                TREE=step.tree.shape[1] > 0,
                PAGED=pages is not None,
                LISTED=listed is not None,
                BY_HEAD=pages is not None and pages.by_head,
                FIRST=0 if pages is None else int(pages.first[0].shape[2]),
                PAGE=config.block_n if pages is None else pages.page,
                HALF=half,
                LIFTED=_LIFT if half and not v_float else 0.0,
                **keys.constants_of("K"),
                **values.constants_of("V"),
            ),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            label=self._label(config),
        ).run()

    def _combine(self, part: torch.Tensor, lse: torch.Tensor, page_splits: int) -> None:
        batch, heads, tokens, splits, width = part.shape
        matrix = None if self.pages is None else self.pages.values.matrix()
        tile = max(16, 1 << (width - 1).bit_length())
        Launch(
            combine,
            (batch * heads * tokens,),
            dict(
                out=part,
                lse=lse,
                sinks=self.step.sinks,
                matrix=matrix,
                counts=self.step.counts,
                result=self.result,
                result_lse=self.lse,
                heads=heads,
                tokens=tokens,
                splits=splits,
                page_splits=page_splits,
            ),
            dict(
                GROUP=heads // self.keys.shape[1],
                WIDTH=width,
                TILE=tile,
                SPLITS=32,
                SINKS=self.step.sinks is not None,
                TURNED=matrix is not None,
                BY_HEAD=matrix is not None and matrix.shape[0] > 1,
                WITH_LSE=self.lse is not None,
                CHUNK=min(32, tile),
            ),
            label=f"combine d{width}" + (" turned" if matrix is not None else ""),
        ).run()

    # --- sizes -----------------------------------------------------------------------------------

    def _shape(self) -> AttendShape:
        batch, heads, tokens, width = self.q.shape
        groups, pages = self.keys.shape[1], self.pages
        full = self.q.dtype.itemsize
        return AttendShape(
            device_facts(self.q.device),
            batch,
            groups,
            heads // groups,
            tokens,
            width,
            self.values.shape[3],
            self.keys.shape[2] if pages is None else self._listed_pages() * pages.page,
            0 if pages is None else pages.page,
            width * full if pages is None else pages.keys.token_bytes,
            self.values.shape[3] * full if pages is None else pages.values.token_bytes,
            self.q.dtype,
            () if pages is None else (str(pages.keys.tile.codec), str(pages.values.tile.codec)),  # type: ignore[union-attr]
        )

    def _listed_pages(self) -> int:
        """Pages of a row that may be read."""
        assert self.pages is not None
        return self.pages.places if self.pages.listed is None else int(self.pages.listed[0].shape[2])

    def _label(self, config: AttendConfig) -> str:
        groups, width = self.keys.shape[1], self.q.shape[3]
        words = [f"attend d{width} g{self.q.shape[1] // groups} m{config.block_m} n{config.block_n}"]
        words += [str(self.q.dtype).removeprefix("torch.")]
        if self.pages is not None:
            words += [f"{self.pages.keys.tile.codec} | {self.pages.values.tile.codec}"]  # type: ignore[union-attr]
            words += ["listed"] if self.pages.listed is not None else []
        step = self.step
        words += ["tree"] if step.tree.shape[1] else []
        words += [f"window {step.window}"] if step.window else []
        words += ["softcap"] if step.softcap else []
        return " ".join(words)


def _strides(x: torch.Tensor, prefix: str) -> dict[str, int]:
    names = ("batch_stride", "head_stride", "token_stride")
    return {f"{prefix}{name}": stride for name, stride in zip(names, x.stride()[:3], strict=True)}


# --- ops -----------------------------------------------------------------------------------------


def cache_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    tree: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The semantic op ``cache_attention``."""
    step = Step(positions, lengths, counts, tree, scale, window, softcap, sinks)
    return Attention(_rows(q), keys, values, step).run()


def packed_attention(
    q: torch.Tensor,
    keys: Sequence[torch.Tensor],
    key_constants: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    value_constants: Sequence[torch.Tensor],
    slots: torch.Tensor,
    positions: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    tree: torch.Tensor,
    key_codec: str,
    key_page: int,
    value_codec: str,
    value_page: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The semantic op ``packed_attention``."""
    pages = Pages(
        Side.of(keys, key_constants, key_codec, key_page),
        Side.of(values, value_constants, value_codec, value_page),
        keys[0],
        (keys[2], values[2]),
        key_page,
    )
    step = Step(positions, lengths, counts, tree, scale, window, softcap, sinks)
    return Attention(_rows(q), keys[1], values[1], step, pages).run()


def _rows(q: torch.Tensor) -> torch.Tensor:
    return q if q.stride(3) == 1 or q.shape[3] == 1 else q.contiguous()


def supports_cache_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tree: torch.Tensor, **_: Any
) -> str | None:
    """None when the template takes these, else the reason."""
    return (
        _dtype_reason(q, keys, values)
        or _width_reason(q.shape[3], values.shape[3])
        or _contiguous_reason(keys, values)
        or _tree_reason(tree)
    )


def supports_packed_attention(
    q: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    key_codec: str,
    key_page: int,
    value_codec: str,
    value_page: int,
    **_: Any,
) -> str | None:
    """None when the template takes these, else the reason."""
    tails, firsts = (keys[1], values[1]), (keys[2], values[2])
    return (
        _dtype_reason(q, *tails, *firsts)
        or _width_reason(q.shape[3], values[1].shape[3])
        or page_reason(key_page, value_page, firsts, tails)
        or _eighths_reason(q.shape[3], values[1].shape[3])
        or obstacle(key_codec, page_shape(tails[0], key_page))
        or obstacle(value_codec, page_shape(tails[1], value_page))
    )


def page_reason(
    key_page: int, value_page: int, firsts: Sequence[torch.Tensor], tails: Sequence[torch.Tensor]
) -> str | None:
    """Why keys and values cannot be read page by page together; None if they can."""
    if key_page != value_page:
        return f"pages of keys have {key_page} tokens, those of values {value_page}"
    for name, (own, other) in (("first", firsts), ("newest", tails)):
        if own.shape[2] != other.shape[2]:
            return f"keys and values keep different numbers of {name} tokens"
    if key_page % 16:
        return f"pages of {key_page} tokens are not multiples of 16"
    return None


def _dtype_reason(*tensors: torch.Tensor) -> str | None:
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) > 1:
        return f"the inputs have several dtypes: {', '.join(sorted(map(str, dtypes)))}"
    found = next(iter(dtypes))
    return None if found in DTYPES else f"{found} is not float32, float16 or bfloat16"


def _width_reason(*widths: int) -> str | None:
    return f"a head of {max(widths)} features is above {MAX_WIDTH}" if max(widths) > MAX_WIDTH else None


def _eighths_reason(*widths: int) -> str | None:
    odd = next((w for w in widths if w % 8), None)
    return None if odd is None else f"a head of {odd} features is not a multiple of 8"


def _tree_reason(tree: torch.Tensor) -> str | None:
    columns = tree.shape[1]
    if isinstance(columns, int) and columns > MAX_TREE_TOKENS:
        return f"a tree of {columns} tokens is above the {MAX_TREE_TOKENS} that its mask has bits for"
    return None


def _contiguous_reason(*stores: torch.Tensor) -> str | None:
    return None if all(s.is_contiguous() for s in stores) else "a store is not contiguous"


def append_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    tree: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The semantic op ``append_attention``."""
    cache_append(keys, k, lengths, counts)
    cache_append(values, v, lengths, counts)
    return cache_attention(q, keys, values, positions, lengths, counts, tree, scale, window, softcap, sinks)


def supports_append_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tree: torch.Tensor,
    **_: Any,
) -> str | None:
    """None when the template takes these, else the reason."""
    return _dtype_reason(q, k, v) or supports_cache_attention(q, keys, values, tree)


implements("cache_attention", PROVIDER, supports_cache_attention)(cache_attention)
implements("append_attention", PROVIDER, supports_append_attention)(append_attention)
implements("packed_attention", PROVIDER, supports_packed_attention)(packed_attention)
