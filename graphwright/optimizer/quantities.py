"""Numbers as words: the unit is read from the key, so that every view of a report says the same."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_DECIMAL = ("", "k", "M", "G", "T", "P")
# What a reader wants to see first of a decision's several quantities.
_HEADLINES = ("speedup", "seconds_per_token", "seconds", "tokens_per_cycle", "bytes_read", "total_bytes")
_ACRONYMS = frozenset({"cpu", "gpu", "kl", "kv"})
_RATIOS = ("speedup", "ratio", "per_second", "per_cycle", "agreement", "fraction", "kl", "difference")


def clean(text: object) -> str:
    """``text`` without control characters (names come from configs that anyone may have written)."""
    return "".join(c if c == "\n" or unicodedata.category(c)[0] != "C" else "\ufffd" for c in str(text))


def shorten(text: str, most: int = 26) -> str:
    """``text`` in at most ``most`` characters, for where there is no room to wrap."""
    return text if len(text) <= most else f"{text[: most - 1]}\u2026"


def label(key: str) -> str:
    """The key without its unit: ``seconds_per_token`` -> ``time per token``."""
    special = {
        "seconds": "time",
        "seconds_per_token": "time per token",
        "tokens_per_second": "tokens/s",
        "bytes": "size",
        "flops": "arithmetic",
        "kl": "KL (nats)",
    }
    if key in special:
        return special[key]
    if key.startswith("seconds_by_op_"):
        return clean(f"time in {key.removeprefix('seconds_by_op_')}")
    for suffix in ("_seconds", "_bytes"):
        key = key.removesuffix(suffix)
    words = (word.upper() if word in _ACRONYMS else word for word in key.split("_"))
    return clean(" ".join(words))


def quantity(key: str, value: Any) -> str:
    """``value`` with the unit that ``key`` names, in three significant digits."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, (int, float)):
        return clean(value)
    words = key.split("_")
    if "agreement" in key or "fraction" in words:
        return f"{value:.2%}"
    if "perplexity" in words:
        return f"{value:.4g}"
    if "kl" in words:
        return f"{value:.3g}"
    if key == "speedup" or "ratio" in words:
        return f"{value:.2f}x"
    if key.endswith("bytes_per_second"):
        return _scaled(value, 1000, tuple(f"{unit}B/s" for unit in _DECIMAL))
    if key.endswith("flops_per_second"):
        return _scaled(value, 1000, tuple(f"{unit}FLOP/s" for unit in _DECIMAL))
    if key.endswith("per_second"):
        return _digits(value) if abs(value) < 1e6 else _scaled(value, 1000, _DECIMAL)
    if "seconds" in words:
        return duration(value)
    if "bytes" in words:
        return _scaled(value, 1024, _BINARY)
    if "flops" in words:
        return _scaled(value, 1000, tuple(f"{unit}FLOP".strip() for unit in _DECIMAL))
    return f"{value:,}" if isinstance(value, int) else _digits(value)


def duration(seconds: float) -> str:
    """Seconds in the unit that keeps the number readable."""
    size = abs(seconds)
    if size == 0:
        return "0 s"
    if size < 1e-3:
        return f"{_digits(seconds * 1e6)} us"
    if size < 1:
        return f"{_digits(seconds * 1e3)} ms"
    return f"{_digits(seconds)} s"


def count(value: float) -> str:
    """A number of things, such as sequences or tokens; whole from ten on."""
    return f"{value:,.0f}" if abs(value) >= 10 or value == round(value) else f"{value:.2g}"


def magnitude(value: float) -> str:
    """A bare number with a decimal prefix, short enough for a tick of an axis: ``20 G``."""
    small = f"{value:g}" if abs(value) < 1 else ""
    return small or _scaled(value, 1000, _DECIMAL)


def memory_unit(size: float) -> tuple[float, str]:
    """The largest binary unit, in bytes and by name, of which ``size`` holds at least one."""
    rank = max((r for r in range(len(_BINARY)) if size >= 1024**r), default=0)
    return float(1024**rank), _BINARY[rank]


def time_unit(seconds: float) -> tuple[float, str]:
    """The unit, in seconds and by name, in which :func:`duration` writes ``seconds``."""
    return (1e-6, "us") if seconds < 1e-3 else (1e-3, "ms") if seconds < 1 else (1.0, "s")


def _digits(value: float) -> str:
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1e6 or size < 1e-3:
        return f"{value:.2e}"
    return f"{value:,.0f}" if size >= 100 else f"{value:.3g}"


def _scaled(value: float, step: int, units: tuple[str, ...]) -> str:
    rank = 0
    while abs(value) >= step and rank < len(units) - 1:
        value, rank = value / step, rank + 1
    digits = f"{value:.0f}" if rank == 0 else _digits(value)
    return f"{digits} {units[rank]}".strip()


def ordered_keys(items: Iterable[Mapping[str, float] | None]) -> list[str]:
    """The keys of all ``items`` that say something, what a reader wants first in front."""
    keys = {key: None for item in items if item for key, value in item.items() if value}
    return sorted(keys, key=lambda key: _HEADLINES.index(key) if key in _HEADLINES else len(_HEADLINES))


def combined(items: Iterable[Mapping[str, float] | None], key: str) -> str:
    """One text for ``key`` over several sites: the sum of what adds up, the range of a ratio."""
    values = [item[key] for item in items if item and item.get(key) is not None]
    if not values:
        return ""
    if any(word in key for word in _RATIOS):
        low, high = quantity(key, min(values)), quantity(key, max(values))
        return low if low == high else f"{low} to {high}"
    return quantity(key, sum(values))
