"""The shipped set: representative specializations that compile for every architecture, and what they cost.

:func:`cases` lists them, one line a case, as calls of the kernels' Python sides on meta tensors. For each
case and architecture ``resources.json`` holds registers, spilled bytes, shared memory and warps with the
version of Triton named in it; a test compiles all of them again and compares. To write the table anew:
``python -m graphwright.kernels.triton.shipped --write``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from graphwright.ir.codecs import PageShape, parse_codec
from graphwright.ir.errors import CodecError
from graphwright.kernels.registry import providers
from graphwright.kernels.triton.ahead import Compiled, compile_launches, triton_version
from graphwright.kernels.triton.devices import planning_for
from graphwright.kernels.triton.launch import Launch, recording
from graphwright.kernels.triton.variant import CompileError, describe

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
TABLE = Path(__file__).with_name("resources.json")

Case = tuple[str, Callable[[], object]]

INT8 = "token_scale >> uniform(bits=8)"
INT4 = "token_scale >> uniform(bits=4)"
INT2_KEYS, INT2_VALUES = "channel_range >> uniform(bits=2)", "token_range >> uniform(bits=2)"
LLOYD = "hadamard >> token_norm >> lloyd_max(bits={})"
TURNED = "hadamard >> channel_range >> uniform(bits={})"
#: Codecs of keys and of values by a short name.
CODECS = {
    "int8": (INT8, INT8),
    "int4": (INT4, INT4),
    "int2": (INT2_KEYS, INT2_VALUES),
    **{f"combined{bits}": (TURNED.format(bits), LLOYD.format(bits)) for bits in (2, 3, 4)},
    "float16": ("float(bits=16)", "float(bits=16)"),
    "fp8": ("fp8", "fp8"),
}
_BATCH, _SLOTS, _PAGE = 8, 32768, 64
_BF16, _HALF, _SINGLE = torch.bfloat16, torch.float16, torch.float32


def cases() -> Iterator[Case]:
    """Every case by name; the calls must be made inside of ``recording()``."""
    for group in (1, 4, 8):
        for tokens in (1, 8):
            yield f"attend d128 g{group} t{tokens}", partial(_dense, 128, group, tokens)
    for width in (64, 80, 96, 256):
        yield f"attend d{width} g4", partial(_dense, width, 4, 1)
    yield "attend tree", partial(_dense, 128, 4, 8, tree=True)
    yield "attend window softcap sinks", partial(_dense, 64, 8, 1, window=128, softcap=30.0, sinks=True)
    yield "attend float16", partial(_dense, 128, 4, 1, dtype=_HALF)
    yield "attend float32", partial(_dense, 64, 4, 1, dtype=_SINGLE)
    for name in CODECS:
        yield f"packed {name}", partial(_packed, name, 128, 4, 1)
    for name in ("int4", "combined4"):
        yield f"packed {name} t8", partial(_packed, name, 128, 4, 8)
    yield "packed int4 d64 g8", partial(_packed, "int4", 64, 8, 1)
    yield "packed int4 first tokens, tree", partial(_packed, "int4", 128, 4, 8, first=4, tree=True)
    yield "attend listed pages", partial(_dense, 128, 4, 1, listed=16)
    yield "packed int4 listed pages", partial(_packed, "int4", 128, 4, 1, listed=_PAGE)
    for name in CODECS:
        yield f"encode {name} keys", partial(_encode, name, 0)
        yield f"encode {name} values", partial(_encode, name, 1)
    yield "append", partial(_append, 128, 1)
    for tokens in (1, 8):
        yield f"rotary append t{tokens}", partial(_rotary_append, 128, tokens, "half")
    yield "rotary append interleaved", partial(_rotary_append, 64, 1, "interleaved")
    for rows in (1, 32, 64):
        yield f"linear {rows} rows", partial(_linear, rows, (4096,))
    yield "linear bias", partial(_linear, 1, (4096,), bias=True)
    yield "linear float32", partial(_linear, 1, (4096,), dtype=_SINGLE)
    yield "linear group of 3", partial(_linear, 1, (4096, 1024, 1024))
    yield "linear group of 2, 8 rows", partial(_linear, 8, (14336, 14336))
    yield "linear narrow, split", partial(_linear, 1, (1024,), features=14336)
    yield "routed", partial(_routed, 1)
    yield "routed, sorted", partial(_routed, 256)
    yield "routed, transposed, bias", partial(_routed, 1, transposed=True, bias=True)
    yield "score pages", partial(_score_pages, 128, 4)
    yield "choose pages", partial(_choose_pages, 2048)
    yield "choose pages, many, by mass", partial(_choose_pages, 65536, share=0.9)
    yield "argmax", _argmax
    yield "verify greedy", _verify


# --- one function a kind of case -------------------------------------------------------------------


def _new(*size: int, dtype: torch.dtype = _BF16) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def _longs(*size: int) -> torch.Tensor:
    return _new(*size, dtype=torch.int64)


def _step(tokens: int, scale: float, tree: bool = False, **more: Any) -> dict[str, Any]:
    """The arguments that say who sees what."""
    return {
        "positions": _longs(_BATCH, tokens), "lengths": _longs(_BATCH), "counts": _longs(_BATCH),
        "tree": _longs(_BATCH, tokens if tree else 0), "scale": scale, **more,
    }  # fmt: skip


def _dense(
    width: int,
    group: int,
    tokens: int,
    dtype: torch.dtype = _BF16,
    sinks: bool = False,
    listed: int = 0,
    **more: Any,
) -> object:
    from graphwright.kernels.triton.attention_ops import cache_attention

    groups = 8
    q = _new(_BATCH, groups * group, tokens, width, dtype=dtype)
    keys, values = (_new(_BATCH, groups, _SLOTS, width, dtype=dtype) for _ in range(2))
    more["sinks"] = _new(groups * group, dtype=dtype) if sinks else None
    more |= _lists(tokens, listed) if listed else {}
    return cache_attention(q, keys, values, **_step(tokens, width**-0.5, **more))


def _lists(tokens: int, page: int, first: int = 0) -> dict[str, Any]:
    """The arguments that say which pages are read."""
    size = (_BATCH, tokens, 8)
    pages = _new(*size, _SLOTS // page, dtype=torch.int32)
    return {"pages": pages, "chosen": _new(*size, dtype=torch.int32), "page": page, "first": first}


def _store(codec: str, width: int, first: int = 0, groups: int = 8) -> tuple[list[torch.Tensor], list[Any]]:
    """A packed store and its codec's tables."""
    shape, parsed = PageShape(groups, _PAGE, width), parse_codec(codec)
    tail = _new(_BATCH, groups, 2 * _PAGE + first + 64, width)
    buffers = [
        _new(_BATCH, _SLOTS // _PAGE, *size, dtype=kind) for size, kind in parsed.layout(shape).values()
    ]
    samples = torch.randn(1, groups, _PAGE, width, generator=torch.Generator().manual_seed(0))
    tables = [table.to("meta") for table in parsed.constants(shape, samples).values()]
    return [_longs(_BATCH), tail, _new(_BATCH, groups, first, width), *buffers], tables


def _packed(
    name: str, width: int, group: int, tokens: int, first: int = 0, listed: int = 0, **more: Any
) -> object:
    from graphwright.kernels.triton.attention_ops import packed_attention

    codecs = CODECS[name]
    (keys, key_tables), (values, value_tables) = (_store(codec, width, first) for codec in codecs)
    q, slots = _new(_BATCH, 8 * group, tokens, width), _new(_BATCH, 1, _SLOTS, 0)
    step = _step(tokens, width**-0.5, **more) | (_lists(tokens, listed, first) if listed else {})
    return packed_attention(
        q, keys, key_tables, values, value_tables, slots, key_codec=codecs[0], key_page=_PAGE,
        value_codec=codecs[1], value_page=_PAGE, **step,
    )  # fmt: skip


def _encode(name: str, side: int) -> None:
    from graphwright.kernels.triton.encode import encode_obstacle, encode_pages

    codec = CODECS[name][side]
    store, tables = _store(codec, 128)
    if reason := encode_obstacle(codec, PageShape(8, _PAGE, 128)):
        raise CompileError(f"no kernel packs by {codec}: {reason}")
    encode_pages(store, tables, codec, _PAGE, _longs(_BATCH), _longs(_BATCH))


def _append(width: int, tokens: int) -> object:
    from graphwright.kernels.triton.append import cache_append

    store, new = _new(_BATCH, 8, _SLOTS, width), _new(_BATCH, tokens, 8, width).transpose(1, 2)
    return cache_append(store, new, _longs(_BATCH), _longs(_BATCH))


def _rotary_append(width: int, tokens: int, layout: str) -> object:
    from graphwright.kernels.triton.append import rotary_append

    q = _new(_BATCH, tokens, 32, width).transpose(1, 2)
    k, v = (_new(_BATCH, tokens, 8, width).transpose(1, 2) for _ in range(2))
    cos, sin = (_new(_BATCH, 1, tokens, width) for _ in range(2))
    keys, values = (_new(_BATCH, 8, _SLOTS, width) for _ in range(2))
    return rotary_append(q, k, v, cos, sin, keys, values, _longs(_BATCH), _longs(_BATCH), layout)


def _linear(
    rows: int, columns: Sequence[int], features: int = 4096, bias: bool = False, dtype: torch.dtype = _BF16
) -> object:
    from graphwright.kernels.triton.linear import linear, linear_group

    x = _new(1, rows, features, dtype=dtype)
    weights = [_new(n, features, dtype=dtype) for n in columns]
    biases = [_new(n, dtype=dtype) if bias else None for n in columns]
    return linear(x, weights[0], biases[0]) if len(columns) == 1 else linear_group(x, weights, biases)


def _routed(tokens: int, transposed: bool = False, bias: bool = False) -> object:
    from graphwright.kernels.triton.routed import routed_linear

    weight = _new(32, 2048, 1536) if transposed else _new(32, 1536, 2048)
    own = _new(32, 1536) if bias else None
    return routed_linear(_new(tokens, 1, 2048), _longs(tokens, 4), weight, own, transposed)


def _score_pages(width: int, group: int) -> object:
    from graphwright.kernels.triton.score_pages import score_pages

    q, summary = _new(_BATCH, 8 * group, 1, width), _new(_BATCH, _SLOTS // 16, 8, 2, width)
    who = (_longs(_BATCH, 1), _longs(_BATCH), _longs(_BATCH), _longs(_BATCH))
    return score_pages(q, [summary], [], *who, "bounds", 8, 16, 0, 96, 32, width**-0.5)


def _choose_pages(pages: int, share: float = 0.0) -> object:
    from graphwright.kernels.triton.choose_pages import choose_pages

    scores = _new(_BATCH, 1, 8, pages, dtype=_SINGLE)
    who = (_longs(_BATCH, 1), _longs(_BATCH), _longs(_BATCH), _longs(_BATCH))
    return choose_pages(scores, *who, 16, 0, 96, 32, 1, 0.125, share)


def _argmax() -> object:
    from graphwright.kernels.triton.sampling import argmax_rows

    return argmax_rows(_new(_BATCH, 128256))


def _verify() -> object:
    from graphwright.kernels.triton.sampling import verify_greedy

    return verify_greedy(_longs(_BATCH, 9), _longs(_BATCH, 9), _longs(_BATCH))


# --- the table -------------------------------------------------------------------------------------


def shipped_launches(arch: str) -> dict[str, Launch]:
    """The distinct launches of all cases by ``case: launch``, planned for an architecture.

    Raises:
        CompileError: a case launches nothing, or cannot be made.
    """
    providers()  # imports the kernels in the registry's order
    found: dict[str, Launch] = {}
    known: set[str] = set()
    for name, run in cases():
        try:
            with planning_for(arch), recording() as launches:
                run()
        except CodecError as error:
            raise CompileError(f"the case {name!r} has no kernel: {error.what}") from error
        if not launches:
            raise CompileError(f"the case {name!r} launches nothing")
        for launch in launches:
            key = json.dumps(describe(launch), sort_keys=True)
            if key not in known:
                known.add(key)
                found[_unused(f"{name}: {launch.label}", found)] = launch
    return found


def _unused(label: str, taken: dict[str, Launch]) -> str:
    return next(x for n in range(1, 99) if (x := label if n == 1 else f"{label} #{n}") not in taken)


def compile_shipped(arch: str, processes: int | None = None) -> dict[str, Compiled]:
    """The shipped set compiled for an architecture, by label."""
    launches = shipped_launches(arch)
    return dict(zip(launches, compile_launches([*launches.values()], arch, processes), strict=True))


def row_of(made: Compiled) -> dict[str, Any]:
    """A line of the table: resources, or an error."""
    return {"error": made.error} if made.error is not None else dict(made.resources)


def read_table() -> dict[str, Any]:
    """The committed table: ``triton``, and ``kernels`` by architecture and label."""
    table: dict[str, Any] = json.loads(TABLE.read_text())
    return table


def write_table(path: Path = TABLE) -> list[str]:
    """Compile everything and write the table.

    Returns:
        What did not compile, a line each; nothing is written then.
    """
    made = {arch: compile_shipped(arch) for arch in ARCHITECTURES}
    rows = {arch: {label: row_of(c) for label, c in made[arch].items()} for arch in made}
    wrong = [
        f"{arch} {x}: {made[arch][x].error}" for arch in rows for x in rows[arch] if "error" in rows[arch][x]
    ]
    if not wrong:
        path.write_text(_as_text({"triton": triton_version(), "kernels": rows}))
    return wrong


def _as_text(table: dict[str, Any]) -> str:
    """JSON with one kernel a line, so that changes read well."""
    blocks = []
    for arch, rows in table["kernels"].items():
        lines = [f"      {json.dumps(label)}: {json.dumps(row)}" for label, row in rows.items()]
        blocks.append(f"    {json.dumps(arch)}: {{\n" + ",\n".join(lines) + "\n    }")
    inside = ",\n".join(blocks)
    return f'{{\n  "triton": {json.dumps(table["triton"])},\n  "kernels": {{\n{inside}\n  }}\n}}\n'


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    if not parser.parse_args().write:
        for arch in ARCHITECTURES:
            print(f"{arch}: {len(shipped_launches(arch))} kernels")
        return 0
    wrong = write_table()
    print("\n".join(wrong) or f"wrote {TABLE}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
