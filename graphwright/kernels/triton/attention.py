"""Attention over caches on GPUs: the Python side of the template in ``attend.py``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from graphwright.kernels.triton.attend import attend
from graphwright.kernels.triton.combine import combine, turn
from graphwright.kernels.triton.configs import AttendConfig, AttendShape, attend_config, device_facts
from graphwright.kernels.triton.launch import Launch
from graphwright.kernels.triton.sides import Pages, Side

# Rows, and sides of the pieces of a matrix, that a program turns at once: float32 has no tensor cores.
_ROWS, _SQUARE = 16, 32
# Probabilities beside codes are float16: times 2**10, small ones keep their digits.
_LIFT = 10.0


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
        page_splits, slot_splits = self._splits(config)
        splits = page_splits + slot_splits
        batch, heads, tokens, _ = self.q.shape
        part = self.q.new_empty((batch, heads, tokens, splits, self.values.shape[3]), dtype=torch.float32)
        lse = self.q.new_empty((batch, heads, tokens, splits), dtype=torch.float32)
        self._attend(config, turned, part, lse, page_splits)
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

    def _splits(self, config: AttendConfig) -> tuple[int, int]:
        """Of the pages, and of the slots."""
        slots = max(1, -(-self.keys.shape[2] // self._chunk_slots(config)))
        return (0 if self.pages is None else -(-self.pages.places * self.pages.page // config.chunk)), slots

    def _chunk_slots(self, config: AttendConfig) -> int:
        """Slots of a split; beside pages one split has them all."""
        return config.chunk if self.pages is None else max(config.block_n, self.keys.shape[2])

    def _attend(
        self,
        config: AttendConfig,
        turned: torch.Tensor,
        part: torch.Tensor,
        lse: torch.Tensor,
        page_splits: int,
    ) -> None:
        batch, heads, tokens, _ = self.q.shape
        groups = self.keys.shape[1]
        row_tiles = -(-heads // groups * tokens // config.block_m)
        Launch(
            attend,
            (part.shape[3], row_tiles * groups, batch),
            dict(
                **self._arguments(turned, part, lse, page_splits),
                chunk_pages=1 if self.pages is None else config.chunk // self.pages.page,
                chunk_slots=self._chunk_slots(config),
            ),
            dict(**self._constants(config), WINDOW=self.step.window),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            label=self._label(config),
        ).run()

    def _arguments(
        self, turned: torch.Tensor, part: torch.Tensor, lse: torch.Tensor, page_splits: int
    ) -> dict[str, Any]:
        """What the kernels of attention take alike."""
        q, step, pages = self.q, self.step, self.pages
        keys, values = self._sides()
        return dict(
            q=q,
            turned=turned,
            keys=self.keys,
            values=self.values,
            first_keys=None if pages is None else pages.first[0],
            first_values=None if pages is None else pages.first[1],
            **keys.arguments("key"),
            **values.arguments("value"),
            packed=None if pages is None else pages.packed,
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
            tokens=q.shape[2],
            slots=self.keys.shape[2],
            places=1 if pages is None else pages.places,
            page_splits=page_splits,
        )

    def _constants(self, config: AttendConfig) -> dict[str, Any]:
        """Those of the kernels of attention alike."""
        step, pages = self.step, self.pages
        keys, values = self._sides()
        half = self.q.dtype != torch.float32
        v_float = values.constants_of("V")["V_FLOAT"]
        return dict(
            GROUPS=self.keys.shape[1],
            GROUP=self.q.shape[1] // self.keys.shape[1],
            KEY_WIDTH=keys.width,
            VALUE_WIDTH=values.width,
            KEY_TILE=keys.tile_width,
            VALUE_TILE=values.tile_width,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            SOFTCAP=step.softcap != 0.0,
            TREE=step.tree.shape[1] > 0,
            PAGED=pages is not None,
            FIRST=0 if pages is None else int(pages.first[0].shape[2]),
            PAGE=config.block_n if pages is None else pages.page,
            HALF=half,
            LIFTED=_LIFT if half and not v_float else 0.0,
            **keys.constants_of("K"),
            **values.constants_of("V"),
        )

    def _sides(self) -> tuple[Side, Side]:
        if self.pages is None:
            return Side(self.q.shape[3]), Side(self.values.shape[3])
        return self.pages.keys, self.pages.values

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
            self.keys.shape[2] if pages is None else pages.places * pages.page,
            0 if pages is None else pages.page,
            width * full if pages is None else pages.keys.token_bytes,
            self.values.shape[3] * full if pages is None else pages.values.token_bytes,
            self.q.dtype,
            () if pages is None else (str(pages.keys.tile.codec), str(pages.values.tile.codec)),  # type: ignore[union-attr]
        )

    def _label(self, config: AttendConfig) -> str:
        groups, width = self.keys.shape[1], self.q.shape[3]
        words = [f"attend d{width} g{self.q.shape[1] // groups} m{config.block_m} n{config.block_n}"]
        words += [str(self.q.dtype).removeprefix("torch.")]
        if self.pages is not None:
            words += [f"{self.pages.keys.tile.codec} | {self.pages.values.tile.codec}"]  # type: ignore[union-attr]
        step = self.step
        words += ["tree"] if step.tree.shape[1] else []
        words += [f"window {step.window}"] if step.window else []
        words += ["softcap"] if step.softcap else []
        return " ".join(words)


def _strides(x: torch.Tensor, prefix: str) -> dict[str, int]:
    names = ("batch_stride", "head_stride", "token_stride")
    return {f"{prefix}{name}": stride for name, stride in zip(names, x.stride()[:3], strict=True)}
